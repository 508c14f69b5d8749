"""Necks: feature maps in, a pyramid out; the table is the whole registry."""

from fusedet.necks.fpn import FPN

NECKS = {"fpn": FPN}

__all__ = ["FPN", "NECKS"]
