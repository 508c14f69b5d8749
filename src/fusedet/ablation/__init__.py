"""Ablations: tables whose rows are configs, run with several seeds, and what their figures allow one to conclude."""

from fusedet.ablation.estimate import duration
from fusedet.ablation.experiment import Launch, ablate, look
from fusedet.ablation.plan import Plan, make
from fusedet.ablation.spec import Row, Table, load, names

__all__ = ["Launch", "Plan", "Row", "Table", "ablate", "duration", "load", "look", "make", "names"]
