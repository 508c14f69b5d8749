"""Interactions between the branches of a head: two maps in, two maps of the same shapes out; the table is the whole registry."""

from fusedet.interact.msil import MSIL

INTERACTIONS = {"msil": MSIL}

__all__ = ["INTERACTIONS", "MSIL"]
