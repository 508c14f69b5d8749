"""Ablations: tables whose rows are configs, run with several seeds, and what their figures allow one to conclude."""

from fusedet.ablate.ablation import Launch, ablate, look
from fusedet.ablate.estimate import duration
from fusedet.ablate.plan import Plan, make
from fusedet.ablate.table import Row, Table, load, names

__all__ = ["Launch", "Plan", "Row", "Table", "ablate", "duration", "load", "look", "make", "names"]
