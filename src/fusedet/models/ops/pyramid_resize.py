"""Resizing of all levels to one size and back (Libra R-CNN, 2019, section 3.2), and the non-local block between."""

import math
from collections.abc import Callable
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.models.ops.exporting import is_exporting, is_symbolic, max_pool_windows
from fusedet.models.ops.layers import conv
from fusedet.types import Features

Size = tuple[int, int]
Resizing = Literal["pool", "nearest", "bilinear"]
"""How maps are resized: "pool" shrinks by max pooling and enlarges by nearest neighbors, Libra R-CNN's way; "nearest"
and "bilinear" do both by interpolation."""


def max_pool_to(x: Tensor, size: Size) -> Tensor:
    """Max-pool x (N, C, H, W) to a size; where the sizes divide, plain pooling is the same and much faster."""
    (height, width), (h, w) = x.shape[-2:], size
    if is_symbolic(height, width) or (is_exporting() and (height % h or width % w)):
        return max_pool_windows(x, size)
    if height % h == 0 and width % w == 0:
        return F.max_pool2d(x, (height // h, width // w))
    return F.adaptive_max_pool2d(x, size)


def resize_nearest(x: Tensor, size: Size) -> Tensor:
    """Resize x (N, C, H, W) to a size by nearest neighbors."""
    return F.interpolate(x, size=size, mode="nearest")


def resize_bilinear(x: Tensor, size: Size) -> Tensor:
    """Resize x (N, C, H, W) to a size by bilinear interpolation, without aligned corners."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


_RESIZERS: dict[Resizing, tuple[Callable[[Tensor, Size], Tensor], Callable[[Tensor, Size], Tensor]]] = {
    "pool": (max_pool_to, resize_nearest),
    "nearest": (resize_nearest, resize_nearest),
    "bilinear": (resize_bilinear, resize_bilinear),
}  # to shrink, to enlarge


def gather_levels(features: Features, level: int, resizing: Resizing = "pool") -> Features:
    """Resize all levels to the size of one.

    Shape:
        features (N, C, H_l, W_l); result (N, C, H, W) each, of the size of level number `level`.
    """
    size = (features[level].shape[-2], features[level].shape[-1])
    shrink, enlarge = _RESIZERS[resizing]
    return [shrink(f, size) if i < level else f if i == level else enlarge(f, size) for i, f in enumerate(features)]


def scatter_level(x: Tensor, like: Tensor, index: int, level: int, resizing: Resizing = "pool") -> Tensor:
    """Resize a map of level number `level` to the size of `like`, level `index`: the inverse of `gather_levels`.

    Args:
        x: The map.
        like: A map of the wanted size.
        index: Number of the level of `like`, from 0 for the finest.
        level: Number of the level of x.
        resizing: How x is resized.

    Shape:
        x (N, C, H, W); like (N, any, H_l, W_l); result (N, C, H_l, W_l).
    """
    size = (like.shape[-2], like.shape[-1])
    shrink, enlarge = _RESIZERS[resizing]
    return enlarge(x, size) if index < level else x if index == level else shrink(x, size)


class NonLocal(nn.Module):
    """Embedded Gaussian non-local block: x + out(softmax(theta(x)^T phi(x)) g(x)).

    Args:
        channels: C of x and of the embeddings.
        scale: Divide the products by sqrt(C).
        zero_init: Initialize the last convolution with 0: the module starts as the identity.

    References:
        "Non-local Neural Networks", Wang et al., 2018, eq. 6.
    """

    def __init__(self, channels: int, scale: bool = True, zero_init: bool = True) -> None:
        super().__init__()
        self.theta, self.phi, self.g, self.out = (conv(channels, channels, 1) for _ in range(4))
        self.scale = 1 / math.sqrt(channels) if scale else 1.0
        for m in (self.theta, self.phi, self.g):
            nn.init.normal_(m.weight, std=0.01)
            nn.init.zeros_(m.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.out.weight, std=0.0 if zero_init else 0.01)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x (N, C, H, W)."""
        query, key, value = (m(x).flatten(2).transpose(1, 2) for m in (self.theta, self.phi, self.g))  # (N, H * W, C)
        if is_exporting():  # ONNX's attention has a dimension of heads
            query, key, value = query[:, None], key[:, None], value[:, None]
        mixed = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
        return x + self.out(mixed.transpose(-1, -2).reshape(x.shape))
