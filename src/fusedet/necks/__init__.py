"""Necks: feature maps in, a pyramid out; the table is the whole registry."""

from fusedet.necks.aug_fpn import AugFPN
from fusedet.necks.bfp import BFP
from fusedet.necks.bifpn import BiFPN
from fusedet.necks.fpn import FPN
from fusedet.necks.mse_fpn import MSEFPN
from fusedet.necks.pafpn import PAFPN
from fusedet.necks.smsl import SMSL

NECKS = {"fpn": FPN, "pafpn": PAFPN, "bfp": BFP, "bifpn": BiFPN, "aug_fpn": AugFPN, "mse_fpn": MSEFPN, "smsl": SMSL}

__all__ = ["BFP", "FPN", "MSEFPN", "NECKS", "PAFPN", "SMSL", "AugFPN", "BiFPN"]
