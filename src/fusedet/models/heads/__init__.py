"""Dense heads: from a pyramid to raw outputs, losses, and boxes with scores."""

from fusedet.models.heads.fcos import FCOSHead
from fusedet.models.heads.reppoints import RepPointsHead
from fusedet.models.heads.retina import RetinaHead
from fusedet.models.heads.rpn import RPNHead
from fusedet.models.heads.vfnet import VFNetHead
from fusedet.models.protocols import DenseHead

HEADS: dict[str, type[DenseHead]] = {
    "fcos": FCOSHead,
    "reppoints": RepPointsHead,
    "retina": RetinaHead,
    "rpn": RPNHead,
    "vfnet": VFNetHead,
}

__all__ = ["HEADS", "FCOSHead", "RPNHead", "RepPointsHead", "RetinaHead", "VFNetHead"]
