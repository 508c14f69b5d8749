"""Images of data and detections, and plots of how good they are."""

from fusedet.visualization.colors import colour
from fusedet.visualization.evaluation_plots import confusion, curves, differences, sizes
from fusedet.visualization.images import boxes, compare, grid
from fusedet.visualization.training_curves import training

__all__ = ["boxes", "colour", "compare", "confusion", "curves", "differences", "grid", "sizes", "training"]
