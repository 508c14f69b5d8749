"""Ablations: tables whose rows are configs, trained with several seeds, and conclusions from their results."""

from fusedet.ablation.experiment import LaunchOptions, preview_plan, run_plan
from fusedet.ablation.plan import Plan, make_plan
from fusedet.ablation.spec import Row, Table, list_tables, load_table

__all__ = [
    "LaunchOptions",
    "Plan",
    "Row",
    "Table",
    "list_tables",
    "load_table",
    "make_plan",
    "preview_plan",
    "run_plan",
]
