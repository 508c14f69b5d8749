"""Dense heads: from a pyramid to raw outputs, losses, and boxes with scores."""

from fusedet.models.heads.atss import ATSSHead
from fusedet.models.heads.autoassign import AutoAssignHead
from fusedet.models.heads.borderdet import BorderDetHead
from fusedet.models.heads.ddod import DDODHead
from fusedet.models.heads.dw import DWHead
from fusedet.models.heads.fcos import FCOSHead
from fusedet.models.heads.fovea import FoveaHead
from fusedet.models.heads.free_anchor import FreeAnchorHead
from fusedet.models.heads.fsaf import FSAFHead
from fusedet.models.heads.gfl import GFLHead
from fusedet.models.heads.ota import OTAHead
from fusedet.models.heads.paa import PAAHead
from fusedet.models.heads.reppoints import RepPointsHead
from fusedet.models.heads.retina import RetinaHead
from fusedet.models.heads.rpn import RPNHead
from fusedet.models.heads.tood import TOODHead
from fusedet.models.heads.vfnet import VFNetHead
from fusedet.models.heads.yolof import YOLOFHead
from fusedet.models.protocols import DenseHead

HEADS: dict[str, type[DenseHead]] = {
    "atss": ATSSHead,
    "autoassign": AutoAssignHead,
    "borderdet": BorderDetHead,
    "ddod": DDODHead,
    "dw": DWHead,
    "fcos": FCOSHead,
    "fovea": FoveaHead,
    "free_anchor": FreeAnchorHead,
    "fsaf": FSAFHead,
    "gfl": GFLHead,
    "ota": OTAHead,
    "paa": PAAHead,
    "reppoints": RepPointsHead,
    "retina": RetinaHead,
    "rpn": RPNHead,
    "tood": TOODHead,
    "vfnet": VFNetHead,
    "yolof": YOLOFHead,
}

__all__ = [
    "HEADS",
    "ATSSHead",
    "AutoAssignHead",
    "BorderDetHead",
    "DDODHead",
    "DWHead",
    "FCOSHead",
    "FSAFHead",
    "FoveaHead",
    "FreeAnchorHead",
    "GFLHead",
    "OTAHead",
    "PAAHead",
    "RPNHead",
    "RepPointsHead",
    "RetinaHead",
    "TOODHead",
    "VFNetHead",
    "YOLOFHead",
]
