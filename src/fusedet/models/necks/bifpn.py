"""BiFPN: bidirectional, weighted, repeated feature fusion.

References:
    "EfficientDet: Scalable and Efficient Object Detection", Tan et al., 2020, section 3.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.necks.fpn import Top, TopLevels, pyramid_levels
from fusedet.models.ops.layers import BatchNorm, GroupNorm, conv, init_xavier
from fusedet.types import Features, Levels

Norm = Literal["bn", "gn"]


class BiFPN(nn.Module):
    """The pyramid P`finest` to P`coarsest`, fused top-down and bottom-up `repeats` times.

    From the paper [T]: the graph of nodes and fast normalized fusion. From its authors' code [H]: SiLU, convolution and
    norm in this order in every node, norms after the laterals, 3x3 max pooling with stride 2, BatchNorm with momentum
    0.01 and eps 0.001. Choices [X]:

    - P6 and P7 come from `top` as in the other necks; EfficientDet pools a 1x1 convolution of C5.
    - A level has one lateral; the authors' code gives P4 and P5 a second one for their second node.
    - Pooling pads both sides alike.
    - Convolutions before norms have no biases.

    Args:
        levels: The backbone's levels, as in FPN.
        channels: As in FPN.
        finest: As in FPN.
        coarsest: As in FPN.
        top: As in FPN; "on_output" continues from the last lateral, as no output exists yet.
        repeats: Number of layers, at least 1 (EfficientDet-D0 has 3, D7 8).
        norm: "bn", or "gn" for small batches (groups of 8 channels: 32 groups at 256).
        separable: Depthwise 3x3, then 1x1 convolutions, as in the paper; false: full 3x3 convolutions.

    Raises:
        InputError: As in FPN; `repeats` is below 1; "gn" does not fit `channels`.
    """

    def __init__(
        self,
        levels: Levels,
        channels: int = 256,
        finest: int = 3,
        coarsest: int = 7,
        top: Top = "on_input",
        repeats: int = 3,
        norm: Norm = "bn",
        separable: bool = True,
    ) -> None:
        super().__init__()
        require_choice("norm", norm, Norm)
        self.start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        if repeats < 1:
            raise InputError(f"repeats={repeats} must be at least 1")
        if norm == "gn" and channels % 8:
            raise InputError(
                f"norm=gn needs channels in multiples of 8, got {channels}: set norm=bn, or other channels"
            )
        inputs, count = levels.channels[self.start :], len(self.levels)
        self.lateral = nn.ModuleList(
            nn.Sequential(conv(c, channels, 1, bias=False), _norm(norm, channels)) for c in inputs
        )
        self.top = TopLevels(inputs[-1], channels, count - len(inputs), top)
        self.layers = nn.Sequential(*(BiFPNLayer(count, channels, norm, separable) for _ in range(repeats)))
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute the P levels of the backbone's C maps, finest first."""
        inputs = features[self.start :]
        laterals = [lateral(c) for lateral, c in zip(self.lateral, inputs)]
        return self.layers(laterals + self.top(inputs[-1], laterals[-1]))


class BiFPNLayer(nn.Module):
    """One top-down and one bottom-up pass over `count` levels (figure 2d).

    P_i' = node(P_i, up(P_{i+1}')), then O_i = node(P_i, P_i', down(O_{i-1})). The coarsest level has no P'; the output
    of the finest is its P'.

    Args:
        count: Number of levels.
        channels: Of every level.
        norm: After every convolution.
        separable: Depthwise 3x3 and 1x1 convolutions in place of dense 3x3 ones.
    """

    def __init__(self, count: int, channels: int, norm: Norm = "bn", separable: bool = True) -> None:
        super().__init__()
        # to levels 0 .. count - 2, and to levels 1 .. count - 1
        self.down = nn.ModuleList(Node(2, channels, norm, separable) for _ in range(count - 1))
        self.up = nn.ModuleList(Node(3 if i < count - 1 else 2, channels, norm, separable) for i in range(1, count))

    def forward(self, p: Features) -> Features:
        """Fuse levels (N, C, H_l, W_l), finest first, to levels of the same shapes."""
        middle = p[-1:]
        for level, node in zip(p[-2::-1], reversed(self.down)):
            middle.insert(0, node([level, F.interpolate(middle[0], size=level.shape[-2:], mode="nearest")]))
        outputs = middle[:1]
        for i, node in enumerate(self.up, start=1):
            own = [p[i], middle[i]] if i < len(p) - 1 else [p[i]]
            outputs.append(node([*own, downsample(outputs[-1], p[i])]))
        return outputs


class Node(nn.Module):
    """Weighted sum of maps of one size, SiLU, 3x3 convolution, norm.

    Args:
        inputs: Number of maps.
        channels: Of every map.
        norm: After the convolution.
        separable: A depthwise 3x3 and a 1x1 convolution in place of a dense 3x3 one.
    """

    eps = 1e-4

    def __init__(self, inputs: int, channels: int, norm: Norm, separable: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(inputs))
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        convs = (
            [depthwise, conv(channels, channels, 1, bias=False)]
            if separable
            else [conv(channels, channels, 3, bias=False)]
        )
        self.conv = nn.Sequential(*convs, _norm(norm, channels))

    def forward(self, maps: Features) -> Tensor:
        """Fuse maps (N, C, H, W) to one."""
        return self.conv(F.silu(self.fuse(maps)))

    def fuse(self, maps: Features) -> Tensor:
        """Compute the fast normalized fusion of section 3.3.

        It is the sum of w_i / (eps + sum of w_j) * map_i with w = relu(weight).
        """
        w = self.weight.relu()
        w = w / (w.sum() + self.eps)
        return sum(wi * m for wi, m in zip(w.unbind(), maps))  # type: ignore[return-value]


def downsample(x: Tensor, like: Tensor) -> Tensor:
    """Max-pool 3x3 with stride 2, cropped to the size of `like`.

    Halving rounds up here; some backbones round down.
    """
    return F.max_pool2d(x, 3, stride=2, padding=1)[..., : like.shape[-2], : like.shape[-1]]


def _norm(norm: Norm, channels: int) -> nn.Module:
    return BatchNorm(channels, eps=1e-3, momentum=0.01) if norm == "bn" else GroupNorm(channels // 8, channels)
