"""Dense heads: a pyramid in, raw maps out; loss and decode are methods that forward never calls."""

from fusedet.heads.fcos import FCOSHead
from fusedet.heads.reppoints import RepPointsHead
from fusedet.heads.retina import RetinaHead
from fusedet.heads.rpn import RPNHead
from fusedet.heads.vfnet import VFNetHead

HEADS = {"fcos": FCOSHead, "reppoints": RepPointsHead, "retina": RetinaHead, "rpn": RPNHead, "vfnet": VFNetHead}

__all__ = ["HEADS", "FCOSHead", "RPNHead", "RepPointsHead", "RetinaHead", "VFNetHead"]
