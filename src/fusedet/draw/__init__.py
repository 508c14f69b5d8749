"""Pictures of data and detections, and plots of how good they are."""

from fusedet.draw.history import training
from fusedet.draw.pictures import boxes, compare, grid
from fusedet.draw.plots import confusion, curves, differences, sizes
from fusedet.draw.style import colour

__all__ = ["boxes", "colour", "compare", "confusion", "curves", "differences", "grid", "sizes", "training"]
