"""Convolution towers: the classification and the regression branch of dense heads, and their interaction."""

from collections.abc import Callable
from typing import TypedDict

from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.deformable import DeformPack
from fusedet.models.ops.layers import GroupNorm, conv
from fusedet.models.protocols import BranchInteraction

InteractionFactory = Callable[[int], BranchInteraction]
"""Function from the branches' channels to their interaction."""


class TowerOptions(TypedDict, total=False):
    """Options of the towers that a head passes on to the head of which it is a variant, whose defaults hold.

    Attributes:
        convs: Number of convolutions in each tower.
        channels: Channels of the towers; those of the pyramid by default.
        norm: Use GroupNorm(32) in the towers.
        bias: Give the towers' convolutions a bias.
    """

    convs: int
    channels: int | None
    norm: bool
    bias: bool


def make_tower(
    inputs: int,
    channels: int,
    convs: int,
    norm: bool = False,
    bias: bool = True,
    deformable_last: bool = False,
    deformable_first: bool = False,
    offset_groups: int = 1,
) -> nn.Sequential:
    """Stack `convs` times a 3x3 convolution, GroupNorm(32) with `norm`, and ReLU, shared by all levels.

    Args:
        inputs: Input channels.
        channels: Output channels of each convolution.
        convs: Number of convolutions.
        norm: Use GroupNorm(32).
        bias: Give the convolutions a bias.
        deformable_last: Make the last convolution deformable and modulated.
        deformable_first: Make the first convolution deformable, without modulation.
        offset_groups: Groups of channels with offsets of their own in a deformable convolution.

    Raises:
        InputError: An option is out of its range.
    """
    if convs < 0:
        raise InputError(f"convs={convs} must be 0 or more")
    for place, is_set in (("first", deformable_first), ("last", deformable_last)):
        if is_set and convs == 0:
            raise InputError(f"deformable_{place}=true needs convs of 1 or more, got 0")
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
        if last or (deformable_first and i == 0):
            layers.append(DeformPack(width, channels, bias=bias, modulated=last, offset_groups=offset_groups))
        else:
            layers.append(conv(width, channels, 3, bias=bias))
        if norm:
            layers.append(GroupNorm(32, channels))
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class TwinTowers(nn.Module):
    """A classification and a regression tower, and the interaction between them.

    Args:
        inputs: As in `make_tower`.
        channels: As in `make_tower`.
        convs: As in `make_tower`.
        norm: As in `make_tower`.
        interact: Makes the interaction of the branches; None for no interaction.
        bias: As in `make_tower`.
        deformable_last: As in `make_tower`.
        deformable_first: As in `make_tower`.

    Raises:
        InputError: An option is out of its range.
    """

    def __init__(
        self,
        inputs: int,
        channels: int,
        convs: int,
        norm: bool = False,
        interact: InteractionFactory | None = None,
        bias: bool = True,
        deformable_last: bool = False,
        deformable_first: bool = False,
    ) -> None:
        super().__init__()
        options = (inputs, channels, convs, norm, bias, deformable_last, deformable_first)
        self.cls, self.reg = make_tower(*options), make_tower(*options)
        self.interact = interact(channels) if interact else None

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the features of both branches, (N, channels, H, W) each, for a level (N, C, H, W)."""
        cls, reg = self.cls(feature), self.reg(feature)
        return self.interact(cls, reg) if self.interact else (cls, reg)
