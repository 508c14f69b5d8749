"""Necks: feature maps to a feature pyramid. The table is the whole registry."""

from fusedet.models.necks.aug_fpn import AugFPN
from fusedet.models.necks.bfp import BFP
from fusedet.models.necks.bifpn import BiFPN
from fusedet.models.necks.dilated_encoder import DilatedEncoder
from fusedet.models.necks.dyhead import DyHead
from fusedet.models.necks.fpn import FPN
from fusedet.models.necks.hrfpn import HRFPN
from fusedet.models.necks.identity import Identity
from fusedet.models.necks.mse_fpn import MSEFPN
from fusedet.models.necks.nas_fpn import NASFPN
from fusedet.models.necks.pafpn import PAFPN
from fusedet.models.necks.smsl import SMSL
from fusedet.models.protocols import Neck

NECKS: dict[str, type[Neck]] = {
    "fpn": FPN,
    "pafpn": PAFPN,
    "bfp": BFP,
    "bifpn": BiFPN,
    "hrfpn": HRFPN,
    "identity": Identity,
    "aug_fpn": AugFPN,
    "dilated_encoder": DilatedEncoder,
    "dyhead": DyHead,
    "nas_fpn": NASFPN,
    "mse_fpn": MSEFPN,
    "smsl": SMSL,
}

__all__ = [
    "BFP",
    "FPN",
    "HRFPN",
    "MSEFPN",
    "NASFPN",
    "NECKS",
    "PAFPN",
    "SMSL",
    "AugFPN",
    "BiFPN",
    "DilatedEncoder",
    "DyHead",
    "Identity",
]
