"""The two branches of stacked convolutions that every one-stage head begins with, and their interaction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.deformable import DeformPack
from fusedet.models.ops.layers import GroupNorm, conv

InteractionFactory = Callable[[int], Any] | None
"""What makes the interaction of two branches of so many channels, or None."""


def tower(
    inputs: int, channels: int, convs: int, norm: bool = False, bias: bool = True, deformable_last: bool = False
) -> nn.Sequential:
    """`convs` times 3x3 convolution, GroupNorm(32) where `norm`, ReLU; shared by all levels.

    bias: of the convolutions. deformable_last: the last one is deformable and modulated.
    Raises InputError for convs below 0, for channels below 1 and, with norm, for channels that 32 groups do not divide.
    """
    if convs < 0:
        raise InputError(f"convs={convs} must be 0 or more")
    if channels < 1:
        raise InputError(f"channels={channels} must be at least 1")
    if norm and channels % 32:
        raise InputError(
            f"norm=true needs channels in multiples of 32, got {channels}: set norm=false, or other channels"
        )
    layers: list[nn.Module] = []
    for i in range(convs):
        width = inputs if i == 0 else channels
        last = deformable_last and i == convs - 1
        layers.append(
            DeformPack(width, channels, bias=bias, modulated=True) if last else conv(width, channels, 3, bias=bias)
        )
        if norm:
            layers.append(GroupNorm(32, channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class TwinTowers(nn.Module):
    """A classification and a regression tower; `interact`, if any, makes of their channels what exchanges between the two.

    Raises InputError for what `tower` refuses.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        convs: int,
        norm: bool = False,
        interact: InteractionFactory = None,
        bias: bool = True,
        deformable_last: bool = False,
    ) -> None:
        super().__init__()
        self.cls = tower(inputs, channels, convs, norm, bias, deformable_last)
        self.reg = tower(inputs, channels, convs, norm, bias, deformable_last)
        self.interact = interact(channels) if interact else None

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """A level (N, C, H, W) to the features of its two branches."""
        cls, reg = self.cls(feature), self.reg(feature)
        return self.interact(cls, reg) if self.interact else (cls, reg)
