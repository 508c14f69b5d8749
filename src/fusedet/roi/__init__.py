"""The second look of two-stage detectors: a stage classifies regions and betters their boxes, a branch adds masks or better boxes."""

from fusedet.roi.box import BoxStage
from fusedet.roi.dynamic import DynamicStage
from fusedet.roi.grid import GridBranch
from fusedet.roi.mask import MaskBranch
from fusedet.roi.pooling import LevelPooling
from fusedet.roi.soft import SoftPooling

STAGES = {"box": BoxStage, "dynamic": DynamicStage}
BRANCHES = {"mask": MaskBranch, "grid": GridBranch}
POOLINGS = {"level": LevelPooling, "soft": SoftPooling}

__all__ = ["BRANCHES", "POOLINGS", "STAGES", "BoxStage", "DynamicStage", "GridBranch", "LevelPooling", "MaskBranch", "SoftPooling"]
