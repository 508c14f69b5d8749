"""NAS-FPN: the pyramid of an architecture search.

References:
    "NAS-FPN: Learning Scalable Feature Pyramid Architecture for Object Detection", Ghiasi et al., 2019, figure 6.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.necks.fpn import pyramid_levels
from fusedet.models.ops.layers import BatchNorm, conv, conv_norm, init_xavier
from fusedet.types import Features, Levels

MERGED = ("gp_64_4", "sum_44_4", "sum_43_3", "sum_34_4", "sum_55_5", "sum_77_7", "gp_75_6")
"""The cells with a convolution, by their two inputs and their output; P3 is the finest of the five levels."""


class NASFPN(nn.Module):
    """Five levels, merged by the searched graph of sums and global-pooling attention, `repeats` times.

    The levels above the backbone's last are 1x1 convolutions and a max-pooling. Details as in MMDetection 3.x, but an
    odd side is rounded up when it is halved; sides in multiples of the coarsest stride are the same there.

    Args:
        levels: The backbone's levels.
        channels: Channels of every level.
        finest: Number of the finest level.
        coarsest: Number of the coarsest level, four above the finest.
        repeats: Number of passes through the graph.

    Raises:
        InputError: As in `FPN`; there are not five levels; `repeats` is below 1.
    """

    def __init__(
        self, levels: Levels, channels: int = 256, finest: int = 3, coarsest: int = 7, repeats: int = 7
    ) -> None:
        super().__init__()
        self.start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        if len(self.levels) != 5:
            raise InputError(
                f"nas_fpn needs five levels, got finest={finest}, coarsest={coarsest}: set "
                f"model.pyramid.coarsest={finest + 4}"
            )
        if repeats < 1:
            raise InputError(f"repeats={repeats} must be at least 1")
        inputs = levels.channels[self.start :]
        self.lateral = nn.ModuleList(conv_norm(c, channels, 1, "bn") for c in inputs)
        self.top = nn.ModuleList(conv_norm(channels, channels, 1, "bn") for _ in range(5 - len(inputs)))
        self.stacks = nn.ModuleList(
            nn.ModuleDict({name: nn.Sequential(conv(channels, channels, 3), BatchNorm(channels)) for name in MERGED})
            for _ in range(repeats)
        )
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute the five levels of the backbone's maps, finest first."""
        levels = [lateral(x) for lateral, x in zip(self.lateral, features[self.start :])]
        for layer in self.top:
            levels.append(F.max_pool2d(layer(levels[-1]), 2, ceil_mode=True))
        p3, p4, p5, p6, p7 = levels
        for stack in self.stacks:

            def merge(name: str, x: Tensor, cells: nn.Module = stack) -> Tensor:
                merged: Tensor = cells[name](F.relu(x))  # type: ignore[index]
                return merged

            inner = merge("gp_64_4", _attend(p6, p4, p4))
            inner = merge("sum_44_4", inner + p4)
            p3 = merge("sum_43_3", _resize(inner, p3) + p3)
            p4 = merge("sum_34_4", _resize(p3, p4) + inner)
            p5 = merge("sum_55_5", p5 + _attend(p4, p3, p5))
            p7 = merge("sum_77_7", p7 + _attend(p5, inner, p7))
            p6 = merge("gp_75_6", _attend(p7, p5, p6))
        return [p3, p4, p5, p6, p7]


def _attend(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Add to b the map a times b's mean per channel as a gate, both resized to the size of `like` (figure 5)."""
    a, b = _resize(a, like), _resize(b, like)
    return b + b.mean(dim=(2, 3), keepdim=True).sigmoid() * a


def _resize(x: Tensor, like: Tensor) -> Tensor:
    """Resize x (N, C, H, W) to another map's size: nearest neighbor up, max-pooling down, zeros around odd sides."""
    height, width = like.shape[2:]
    if x.shape[2] < height or x.shape[3] < width:
        return F.interpolate(x, size=(height, width), mode="nearest")
    kernel = (math.ceil(x.shape[2] / height), math.ceil(x.shape[3] / width))
    rows, columns = kernel[0] * height - x.shape[2], kernel[1] * width - x.shape[3]
    if rows or columns:
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    return F.max_pool2d(x, kernel) if kernel != (1, 1) else x
