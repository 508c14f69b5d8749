"""HRFPN: a pyramid of the concatenated maps of a high-resolution network.

References:
    "High-Resolution Representations for Labeling Pixels and Regions", Sun et al., 2019, section 3.1 and figure 4
    (HRNetV2p).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.models.necks.fpn import pyramid_levels
from fusedet.models.ops.layers import conv, init_xavier
from fusedet.types import Features, Levels


class HRFPN(nn.Module):
    """Concatenate all maps at the finest size, reduce the channels, pool to every level, and convolve each.

    As in MMDetection the pyramid starts at stride 4. One that starts at stride 8 has convolutions of stride 2.

    Args:
        levels: The backbone's levels.
        channels: Channels of every level.
        finest: Number of the finest level; the first convolutions have the stride 2^finest / (the backbone's first).
        coarsest: Number of the coarsest level.

    Raises:
        InputError: As `FPN`.
    """

    def __init__(self, levels: Levels, channels: int = 256, finest: int = 2, coarsest: int = 6) -> None:
        super().__init__()
        start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        self.reduction = conv(sum(levels.channels), channels, 1)
        self.output = nn.ModuleList(conv(channels, channels, 3, stride=2**start) for _ in self.levels.strides)
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute P`finest` to P`coarsest` of the backbone's maps, finest first, each (N, channels, H, W)."""
        finest = features[0]
        size = finest.shape[-2:]
        resized = [F.interpolate(x, size=size, mode="bilinear", align_corners=False) for x in features[1:]]
        x = self.reduction(torch.cat([finest, *resized], dim=1))
        return [layer(_pool(x, 2**i)) for i, layer in enumerate(self.output)]


def _pool(x: Tensor, factor: int) -> Tensor:
    """Average every `factor` x `factor` cells; windows beyond the border average what is inside."""
    return F.avg_pool2d(x, factor, factor, ceil_mode=True, count_include_pad=False) if factor > 1 else x
