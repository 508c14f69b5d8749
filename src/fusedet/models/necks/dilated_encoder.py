"""YOLOF's dilated encoder.

References:
    "You Only Look One-level Feature", Chen et al., 2021, section 4.1.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.necks.fpn import Top, TopLevels, pyramid_levels
from fusedet.models.ops.layers import BatchNorm, conv, init_normal, init_xavier
from fusedet.types import Features, Levels


class DilatedEncoder(nn.Module):
    """Project each feature map and encode it by residual blocks of growing dilation, without exchange of levels.

    The paper has the one level P5: model.pyramid={channels: 512, finest: 5, coarsest: 5}.

    Args:
        levels: The backbone's levels.
        channels: Channels of every level.
        finest: Number of the finest level.
        coarsest: Number of the coarsest level.
        top: Source of the levels above the backbone's last.
        dilations: Dilation of each residual block (figure 5).
        reduction: Quotient of the channels of a block's input and of its middle.

    Raises:
        InputError: As in `FPN`, or an option is out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        channels: int = 512,
        finest: int = 5,
        coarsest: int = 5,
        top: Top = "on_input",
        dilations: Sequence[int] = (2, 4, 6, 8),
        reduction: int = 4,
    ) -> None:
        super().__init__()
        self.start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        if any(dilation < 1 for dilation in dilations) or reduction < 1:
            raise InputError(f"dilations={list(dilations)}, reduction={reduction} must be at least 1")
        inputs = levels.channels[self.start :]
        self.project = nn.ModuleList(
            nn.Sequential(conv(c, channels, 1), BatchNorm(channels), conv(channels, channels, 3), BatchNorm(channels))
            for c in inputs
        )
        middle = max(channels // reduction, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(channels, middle, dilation) for dilation in dilations)) for _ in inputs
        )
        self.top = TopLevels(inputs[-1], channels, len(self.levels) - len(inputs), top)
        init_xavier(self)
        init_normal(self.blocks)

    def forward(self, features: Features) -> Features:
        """Compute the levels of the backbone's maps, finest first, each (N, channels, H, W)."""
        inputs = features[self.start :]
        outputs = [block(project(x)) for x, project, block in zip(inputs, self.project, self.blocks)]
        return outputs + self.top(inputs[-1], outputs[-1])


class ResidualBlock(nn.Sequential):
    """x plus a 1x1, a dilated 3x3 and a 1x1 convolution of it, each with BatchNorm and ReLU."""

    def __init__(self, channels: int, middle: int, dilation: int) -> None:
        dilated = nn.Conv2d(middle, middle, 3, padding=dilation, dilation=dilation, bias=False)
        layers = [conv(channels, middle, 1, bias=False), dilated, conv(middle, channels, 1, bias=False)]
        super().__init__(*(nn.Sequential(c, BatchNorm(c.out_channels), nn.ReLU(inplace=True)) for c in layers))

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (N, channels, H, W) to the same shape."""
        return x + super().forward(x)
