"""Gates for MSE-FPN: its own gated channel guidance (GCG) and the alternatives of its Table 6.

Each scales a map (N, C, H, W) by weights in 0..1 that it computes from the same map, GCG also from another one;
`weights` returns them.

References:
    "Multi-scale semantic enhancement network for object detection", Guo et al., 2023.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.models.ops.attention import ChannelAttention
from fusedet.models.ops.exporting import is_exporting
from fusedet.models.ops.layers import conv

Gate = Literal["gcg", "cag", "ca", "cam", "none"]


def make_gate(
    kind: Gate, channels: int, reduction: int | None = None, cag_relu: bool = False, source: int | None = None
) -> nn.Module:
    """Make the gate of that name.

    Args:
        kind: Name of the gate; "none" is the identity.
        channels: C.
        reduction: Of "ca" and "cam"; None for their papers' 32 and 16.
        cag_relu: See `CAG`.
        source: Of "gcg", see `GCG`.
    """
    if kind == "gcg":
        return GCG(channels, source)
    if kind == "cag":
        return CAG(channels, cag_relu)
    if kind == "ca":
        return CoordinateAttention(channels, reduction or 32)
    return CAM(channels, reduction or 16) if kind == "cam" else nn.Identity()


def pool_rows_and_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """Average every row to (N, C, H, 1) and every column to (N, C, 1, W).

    Pooling, since `mean` is slow in channels_last (benchmarks/operators.py).
    """
    if is_exporting():
        return x.mean(dim=3, keepdim=True), x.mean(dim=2, keepdim=True)
    height, width = x.shape[-2:]
    return F.avg_pool2d(x, (1, width)), F.avg_pool2d(x, (height, 1))


class GCG(nn.Module):
    """Gated channel guidance, eq. 9 and 10: sigmoid(fc1(F_h) x fc2(F_w)) * F.

    x is the outer product of every channel's row and column means. fc1 and fc2 act on channels, because sizes vary
    (forced). One sigmoid acts on the product (eq. 10).

    Args:
        channels: C of F.
        source: Channels of the map that F_h and F_w are pooled from; None for F itself.
    """

    def __init__(self, channels: int, source: int | None = None) -> None:
        super().__init__()
        inputs = channels if source is None else source
        self.fc1, self.fc2 = conv(inputs, channels, 1), conv(inputs, channels, 1)

    def forward(self, source: Tensor, x: Tensor | None = None) -> Tensor:
        """Scale x (N, C, H, W), by default the source itself, by the weights of `source` (N, `source`, H, W)."""
        return self.weights(source) * (source if x is None else x)

    def weights(self, source: Tensor) -> Tensor:
        """Compute the weights (N, C, H, W), in 0..1, of a map (N, `source`, H, W)."""
        f_h, f_w = pool_rows_and_columns(source)
        return torch.sigmoid(self.fc1(f_h) * self.fc2(f_w))


class CAG(nn.Module):
    """Channel attention guided module: sigmoid(fc1(mean) + fc2(max)) * x.

    Args:
        channels: C.
        relu: Apply a ReLU to each term first, as one public implementation does (a choice).

    References:
        "CE-FPN: Enhancing Channel Information for Object Detection", Luo et al., 2021.
    """

    def __init__(self, channels: int, relu: bool = False) -> None:
        super().__init__()
        self.fc1, self.fc2, self.relu = conv(channels, channels, 1), conv(channels, channels, 1), relu

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (N, C, H, W) by its weights."""
        return self.weights(x) * x

    def weights(self, x: Tensor) -> Tensor:
        """Compute the weights (N, C, 1, 1), in 0..1, of x (N, C, H, W)."""
        mean = self.fc1(x.mean(dim=(2, 3), keepdim=True))  # (N, C, 1, 1)
        largest = self.fc2(x.amax(dim=(2, 3), keepdim=True))
        return torch.sigmoid(mean.relu() + largest.relu() if self.relu else mean + largest)


class CoordinateAttention(nn.Module):
    """Coordinate attention, with at least 8 hidden channels.

    References:
        "Coordinate Attention for Efficient Mobile Network Design", Hou et al., 2021.
    """

    def __init__(self, channels: int, reduction: int = 32) -> None:
        super().__init__()
        inner = max(8, channels // reduction)
        self.conv, self.norm = conv(channels, inner, 1), nn.BatchNorm2d(inner)
        self.conv_h, self.conv_w = conv(inner, channels, 1), conv(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (N, C, H, W) by its weights."""
        return self.weights(x) * x

    def weights(self, x: Tensor) -> Tensor:
        """Compute the weights (N, C, H, W), in 0..1, of x."""
        rows, columns = pool_rows_and_columns(x)
        both = self.conv(torch.cat([rows, columns.transpose(2, 3)], dim=2))  # (N, inner, H + W, 1)
        both = F.hardswish(self.norm(both))
        f_h, f_w = both.split([x.shape[2], x.shape[3]], dim=2)
        return self.conv_h(f_h).sigmoid() * self.conv_w(f_w.transpose(2, 3)).sigmoid()


class CAM(nn.Module):
    """CBAM's channel attention as a gate.

    References:
        "CBAM: Convolutional Block Attention Module", Woo et al., 2018.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        self.attention = ChannelAttention(channels, reduction)

    def forward(self, x: Tensor) -> Tensor:
        """Scale x (N, C, H, W) by its weights."""
        return self.weights(x) * x

    def weights(self, x: Tensor) -> Tensor:
        """Compute the weights (N, C, 1, 1), in 0..1, of x (N, C, H, W)."""
        weights: Tensor = self.attention(x)
        return weights
