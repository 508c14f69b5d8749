"""Dense heads: from a pyramid to raw outputs, losses, and boxes with scores."""

from fusedet.models.heads.atss import ATSSHead
from fusedet.models.heads.ddod import DDODHead
from fusedet.models.heads.fcos import FCOSHead
from fusedet.models.heads.gfl import GFLHead
from fusedet.models.heads.paa import PAAHead
from fusedet.models.heads.reppoints import RepPointsHead
from fusedet.models.heads.retina import RetinaHead
from fusedet.models.heads.rpn import RPNHead
from fusedet.models.heads.tood import TOODHead
from fusedet.models.heads.vfnet import VFNetHead
from fusedet.models.protocols import DenseHead

HEADS: dict[str, type[DenseHead]] = {
    "atss": ATSSHead,
    "ddod": DDODHead,
    "fcos": FCOSHead,
    "gfl": GFLHead,
    "paa": PAAHead,
    "reppoints": RepPointsHead,
    "retina": RetinaHead,
    "rpn": RPNHead,
    "tood": TOODHead,
    "vfnet": VFNetHead,
}

__all__ = [
    "HEADS",
    "ATSSHead",
    "DDODHead",
    "FCOSHead",
    "GFLHead",
    "PAAHead",
    "RPNHead",
    "RepPointsHead",
    "RetinaHead",
    "TOODHead",
    "VFNetHead",
]
