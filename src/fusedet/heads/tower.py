"""The two branches of stacked convolutions that every one-stage head begins with, and their interaction."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedet.ops.layers import conv


def tower(inputs: int, channels: int, convs: int, norm: bool = False) -> nn.Sequential:
    """`convs` times 3x3 convolution, GroupNorm(32) where `norm`, ReLU; shared by all levels."""
    layers: list[nn.Module] = []
    for i in range(convs):
        layers.append(conv(inputs if i == 0 else channels, channels, 3))
        if norm:
            layers.append(nn.GroupNorm(32, channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class TwinTowers(nn.Module):
    """A classification and a regression tower; `interact`, if any, is a class of (channels) that exchanges between the two."""

    def __init__(self, inputs: int, channels: int, convs: int, norm: bool = False, interact: Any = None) -> None:
        super().__init__()
        self.cls = tower(inputs, channels, convs, norm)
        self.reg = tower(inputs, channels, convs, norm)
        self.interact = interact(channels) if interact else None

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """A level (N, C, H, W) to the features of its two branches."""
        cls, reg = self.cls(feature), self.reg(feature)
        return self.interact(cls, reg) if self.interact else (cls, reg)
