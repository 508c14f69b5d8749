"""RoI stages and branches of two-stage detectors: classification, box refinement and masks of proposals."""

from fusedet.models.protocols import BoxRefiner, MaskPredictor, RoIPooling, RoIStage
from fusedet.models.roi.box import BoxStage
from fusedet.models.roi.c4 import C4Stage
from fusedet.models.roi.double_head import DoubleHeadStage
from fusedet.models.roi.dynamic import DynamicStage
from fusedet.models.roi.grid import GridBranch
from fusedet.models.roi.mask import MaskBranch
from fusedet.models.roi.pooling import LevelPooling
from fusedet.models.roi.soft_pooling import SoftPooling

STAGES: dict[str, type[RoIStage]] = {
    "box": BoxStage,
    "c4": C4Stage,
    "double_head": DoubleHeadStage,
    "dynamic": DynamicStage,
}
BRANCHES: dict[str, type[MaskPredictor] | type[BoxRefiner]] = {"mask": MaskBranch, "grid": GridBranch}
POOLINGS: dict[str, type[RoIPooling]] = {"level": LevelPooling, "soft": SoftPooling}

__all__ = [
    "BRANCHES",
    "POOLINGS",
    "STAGES",
    "BoxStage",
    "C4Stage",
    "DoubleHeadStage",
    "DynamicStage",
    "GridBranch",
    "LevelPooling",
    "MaskBranch",
    "SoftPooling",
]
