"""BFP: a balanced feature pyramid.

References:
    "Libra R-CNN: Towards Balanced Learning for Object Detection", Pang et al., 2019, section 3.2.
"""

from typing import Literal

from torch import nn

from fusedet.errors import InputError, require_choice
from fusedet.models.ops.layers import conv, init_xavier
from fusedet.models.ops.pyramid_resize import NonLocal, gather_levels, scatter_level
from fusedet.types import Features, Levels

Refine = Literal["non_local", "conv", "none"]


class BFP(nn.Module):
    """Add to every level of a pyramid the same refined mean of all levels; it follows a neck: neck=[fpn, bfp].

    Values of `refine`:

    - "non_local": the paper's embedded Gaussian non-local block, without reduction and, as in MMDetection, without
      1 / sqrt(C).
    - "conv": the paper's alternative, a 3x3 convolution and a ReLU [H].
    - "none": the mean itself.

    The non-local block starts as the identity, the convolution by Xavier, as in MMDetection 3.x.

    Args:
        levels: The levels of the neck before, of equal channels; the output has the same.
        refine_level: Index of the level whose size the others are resized to, 0 the finest; 2 is the middle of five
            (MMDetection) [H].
        refine: The refinement.

    Raises:
        InputError: The levels have unequal channels, or `refine_level` is out of range.
    """

    def __init__(self, levels: Levels, refine_level: int = 2, refine: Refine = "non_local") -> None:
        super().__init__()
        require_choice("refine", refine, Refine)
        channels = levels.channels[0]
        if set(levels.channels) != {channels}:
            raise InputError(
                f"bfp needs levels of equal channels, got {levels.channels}: put it after another neck, as in "
                "neck=[fpn, bfp]"
            )
        if not 0 <= refine_level < len(levels):
            raise InputError(
                f"refine_level={refine_level} must be the index of one of the {len(levels)} levels, 0 to "
                f"{len(levels) - 1}"
            )
        self.levels, self.refine_level = levels, refine_level
        self.refine: nn.Module = nn.Identity()
        if refine == "non_local":
            self.refine = NonLocal(channels, scale=False)
        elif refine == "conv":
            self.refine = nn.Sequential(conv(channels, channels, 3), nn.ReLU())
            init_xavier(self.refine)

    def forward(self, features: Features) -> Features:
        """Refine levels (N, C, H_l, W_l), finest first, to levels of the same shapes."""
        gathered = gather_levels(features, self.refine_level)
        balanced = self.refine(sum(gathered) / len(gathered))  # (N, C, H, W) of the refine level
        return [f + scatter_level(balanced, f, i, self.refine_level) for i, f in enumerate(features)]
