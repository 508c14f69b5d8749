"""FPN: "Feature Pyramid Networks for Object Detection", Lin et al., 2017; P6 and P7 as in RetinaNet, 2017, and FCOS, 2019."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, one_of
from fusedet.models.ops.layers import GroupNorm, conv, init_xavier
from fusedet.types import Features, Levels

Top = Literal["max_pool", "on_input", "on_output", "on_input_relu", "on_output_plain"]

LAST_STRIDE = 32
"""Of a body; levels beyond it are a neck's."""


class FPN(nn.Module):
    """The pyramid P`finest` to P`coarsest` (P3 has stride 8, P4 16, ...) from a body's maps.

    levels: what the body promises. channels: of every level. top: where the levels above the body's last come from:
    "max_pool" takes every second cell of the level below (Faster R-CNN's P6), "on_input" convolves the body's last map
    with stride 2, then its own output (RetinaNet), "on_output" the pyramid's last level, with a ReLU before every
    further convolution (FCOS); "on_input_relu" (torchvision's RetinaNet v2) and "on_output_plain" are these two with and without the ReLU.
    norm: GroupNorm(32) behind every convolution, which then has no bias (MMDetection's gn-neck).
    Raises InputError where the body has no level `finest`, `coarsest` is below its last, channels is below 1, top is unknown, and behind
    another neck, whose levels go beyond a body's.
    """

    def __init__(
        self,
        levels: Levels,
        channels: int = 256,
        finest: int = 3,
        coarsest: int = 7,
        top: Top = "on_input",
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        if norm and channels % 32:
            raise InputError(
                f"norm=true needs channels in multiples of 32, got {channels}: set norm=false, or other channels"
            )
        inputs = levels.channels[self.start :]
        self.lateral = nn.ModuleList(_layer(c, channels, 1, norm) for c in inputs)  # C_i -> channels
        self.output = nn.ModuleList(_layer(channels, channels, 3, norm) for _ in inputs)
        self.top = TopLevels(inputs[-1], channels, len(self.levels) - len(inputs), top, norm)
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """C maps, finest first, to P maps of the promised levels."""
        inputs = features[self.start :]
        merged = top_down([lateral(c) for lateral, c in zip(self.lateral, inputs)])
        outputs = [output(m) for output, m in zip(self.output, merged)]
        return outputs + self.top(inputs[-1], outputs[-1])


def top_down(maps: Features, gates: Sequence[nn.Module] | nn.ModuleList = ()) -> Features:
    """Every map, finest first, plus the sum at the level above, enlarged by nearest neighbours; the sums, of the same shapes.

    gates: one for each map but the coarsest, what the sum above passes before it is enlarged; none by default.
    """
    sums = list(maps)
    for i in range(len(sums) - 1, 0, -1):
        above = gates[i - 1](sums[i]) if gates else sums[i]
        sums[i - 1] = sums[i - 1] + F.interpolate(above, size=sums[i - 1].shape[-2:], mode="nearest")
    return sums


class TopLevels(nn.Module):
    """The levels above the body's last, `count` of them; the same for every neck that makes a pyramid."""

    def __init__(self, inputs: int, channels: int, count: int, top: Top, norm: bool = False) -> None:
        super().__init__()
        one_of("top", top, Top)
        self.count, self.kind = count, top
        sources = [inputs if top.startswith("on_input") else channels] + [channels] * (count - 1)
        self.convs = (
            nn.ModuleList(_layer(c, channels, 3, norm, 2) for c in sources[:count])
            if top != "max_pool"
            else nn.ModuleList()
        )

    def forward(self, last_input: Tensor, last_output: Tensor) -> Features:
        """The body's last map and the pyramid's last level to the levels above, finest first."""
        x = last_input if self.kind.startswith("on_input") else last_output
        levels: Features = []
        for i in range(self.count):
            if self.kind == "max_pool":
                x = F.max_pool2d(x, 1, stride=2)
            else:
                x = self.convs[i](F.relu(x) if self.kind in ("on_output", "on_input_relu") and i > 0 else x)
            levels.append(x)
        return levels


def _layer(inputs: int, channels: int, kernel: int, norm: bool, stride: int = 1) -> nn.Module:
    layer = conv(inputs, channels, kernel, stride, bias=not norm)
    return nn.Sequential(layer, GroupNorm(32, channels)) if norm else layer


def pyramid_levels(levels: Levels, channels: int, finest: int, coarsest: int) -> tuple[int, Levels]:
    """Where P`finest` begins among a body's maps, and the levels P`finest` to P`coarsest`."""
    if levels.strides[-1] > LAST_STRIDE:
        raise InputError(
            f"it takes a body's maps, got levels up to stride {levels.strides[-1]}: put it first in the chain"
        )
    if channels < 1:
        raise InputError(f"channels={channels} must be at least 1")
    if 2**finest not in levels.strides:
        raise InputError(f"finest={finest} (stride {2**finest}) must be one of the body's strides {levels.strides}")
    if 2**coarsest < levels.strides[-1]:
        raise InputError(
            f"coarsest={coarsest} (stride {2**coarsest}) is below the body's last stride {levels.strides[-1]}"
        )
    strides = tuple(2**i for i in range(finest, coarsest + 1))
    return levels.strides.index(2**finest), Levels((channels,) * len(strides), strides)
