"""Ablations: tables whose rows are configs."""

from fusedet.ablate.table import Row, Table, load, names

__all__ = ["Row", "Table", "load", "names"]
