"""FPN, with the levels P6 and P7 of RetinaNet and FCOS.

References:
    "Feature Pyramid Networks for Object Detection", Lin et al., 2017.
    "Focal Loss for Dense Object Detection", Lin et al., 2017 (`top="on_input"`).
    "FCOS: Fully Convolutional One-Stage Object Detection", Tian et al., 2019 (`top="on_output"`).
"""

from collections.abc import Callable, Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.ops.layers import Norm, conv_norm, init_xavier
from fusedet.types import Features, Levels

Top = Literal["max_pool", "on_input", "on_output", "on_input_relu", "on_output_plain"]

LAST_STRIDE = 32
"""Largest stride of a backbone; levels beyond it are a neck's."""


class FPN(nn.Module):
    """The pyramid P`finest` to P`coarsest` of a backbone's feature maps; P3 has stride 8, P4 16, and so on.

    Values of `top`, the source of the levels above the backbone's last:

    - "max_pool": every second cell of the level below (Faster R-CNN's P6).
    - "on_input": a convolution of stride 2 on the backbone's last map, then on its own output (RetinaNet).
    - "on_input_relu": the same with a ReLU before every further convolution (torchvision's RetinaNet v2).
    - "on_output": a convolution of stride 2 on the pyramid's last level, with a ReLU before every further one (FCOS).
    - "on_output_plain": the same without the ReLU.

    Args:
        levels: The backbone's levels.
        channels: Channels of every level.
        finest: Number of the finest level.
        coarsest: Number of the coarsest level.
        top: Source of the levels above the backbone's last.
        norm: GroupNorm(32) after every convolution, which has no bias then (MMDetection's gn-neck).

    Raises:
        InputError: The backbone has no level `finest`; `coarsest` is below its last level; `channels` is below 1 or
            no multiple of 32 with `norm`; `top` is unknown; the levels are another neck's, beyond a backbone's.
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
        kind: Norm | None = "gn" if norm else None
        self.lateral = nn.ModuleList(conv_norm(c, channels, 1, kind) for c in inputs)  # C_i -> channels
        self.output = nn.ModuleList(conv_norm(channels, channels, 3, kind) for _ in inputs)
        self.top = TopLevels(inputs[-1], channels, len(self.levels) - len(inputs), top, norm)
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute the P levels of the backbone's C maps, finest first."""
        inputs = features[self.start :]
        merged = top_down([lateral(c) for lateral, c in zip(self.lateral, inputs)])
        outputs = [output(m) for output, m in zip(self.output, merged)]
        return outputs + self.top(inputs[-1], outputs[-1])


def top_down(maps: Features, gates: Sequence[Callable[[Tensor], Tensor]] = ()) -> Features:
    """Add to every map the upsampled sum of the level above; nearest neighbors.

    Args:
        maps: Laterals, finest first.
        gates: For each map but the coarsest what the sum above passes before it is upsampled; none by default.

    Returns:
        The sums, of the same shapes.
    """
    sums = list(maps)
    for i in range(len(sums) - 1, 0, -1):
        above = gates[i - 1](sums[i]) if gates else sums[i]
        sums[i - 1] = sums[i - 1] + F.interpolate(above, size=sums[i - 1].shape[-2:], mode="nearest")
    return sums


class TopLevels(nn.Module):
    """The `count` levels above the backbone's last; shared by all necks that make a pyramid.

    Args:
        inputs: Channels of the backbone's last map.
        channels: Channels of every level.
        count: Number of levels, which may be 0.
        top: What the levels are made from, one of `Top`.
        norm: GroupNorm(32) after every convolution.

    Raises:
        InputError: `top` is unknown.
    """

    def __init__(self, inputs: int, channels: int, count: int, top: Top, norm: bool = False) -> None:
        super().__init__()
        require_choice("top", top, Top)
        self.count, self.kind = count, top
        sources = [inputs if top.startswith("on_input") else channels] + [channels] * (count - 1)
        self.convs = (
            nn.ModuleList(conv_norm(c, channels, 3, "gn" if norm else None, stride=2) for c in sources[:count])
            if top != "max_pool"
            else nn.ModuleList()
        )

    def forward(self, last_input: Tensor, last_output: Tensor) -> Features:
        """Compute the levels above, finest first, of the backbone's last map and the pyramid's last level."""
        x = last_input if self.kind.startswith("on_input") else last_output
        levels: Features = []
        for i in range(self.count):
            if self.kind == "max_pool":
                x = F.max_pool2d(x, 1, stride=2)
            else:
                x = self.convs[i](F.relu(x) if self.kind in ("on_output", "on_input_relu") and i > 0 else x)
            levels.append(x)
        return levels


def pyramid_levels(levels: Levels, channels: int, finest: int, coarsest: int) -> tuple[int, Levels]:
    """Compute the levels P`finest` to P`coarsest` of a pyramid.

    Args:
        levels: The backbone's levels.
        channels: Channels of every level of the pyramid.
        finest: Number of the finest level, 3 for stride 8.
        coarsest: Number of the coarsest level, 7 for stride 128.

    Returns:
        The index of P`finest` among the backbone's levels, and the channels and strides of the pyramid.

    Raises:
        InputError: See `FPN`.
    """
    if levels.strides[-1] > LAST_STRIDE:
        raise InputError(
            f"it takes a backbone's maps, got levels up to stride {levels.strides[-1]}: put it first in the chain"
        )
    if channels < 1:
        raise InputError(f"channels={channels} must be at least 1")
    if 2**finest not in levels.strides:
        raise InputError(f"finest={finest} (stride {2**finest}) must be one of the backbone's strides {levels.strides}")
    if 2**coarsest < levels.strides[-1]:
        raise InputError(
            f"coarsest={coarsest} (stride {2**coarsest}) is below the backbone's last stride {levels.strides[-1]}"
        )
    strides = tuple(2**i for i in range(finest, coarsest + 1))
    return levels.strides.index(2**finest), Levels((channels,) * len(strides), strides)
