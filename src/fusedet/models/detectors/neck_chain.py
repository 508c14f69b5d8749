"""A chain of necks that acts as one neck."""

from collections.abc import Sequence
from typing import cast

from torch import nn

from fusedet.errors import InputError
from fusedet.models.protocols import AuxiliaryNeck, Neck
from fusedet.types import Features


class NeckChain(nn.Module):
    """Apply several necks in sequence.

    Only the first neck may have an auxiliary pyramid (AugFPN).

    Args:
        necks: The necks in order. Each was built on the levels of the one before.

    Raises:
        InputError: A later neck has auxiliary losses, which would be left out.
    """

    necks: Sequence[Neck]

    def __init__(self, necks: Sequence[Neck]) -> None:
        super().__init__()
        if any(auxiliary_weight(neck) for neck in necks[1:]):
            raise InputError(
                "model.neck: a neck with auxiliary losses must be the first in the chain, or have auxiliary_weight=0"
            )
        self.necks = cast("Sequence[Neck]", nn.ModuleList(cast("Sequence[nn.Module]", necks)))
        self.levels = necks[-1].levels
        first = necks[0]
        self.auxiliary_weight = auxiliary_weight(first)
        self.lateral_levels = first.lateral_levels if isinstance(first, AuxiliaryNeck) else first.levels

    def forward(self, features: Features) -> Features:
        """Compute the pyramid of the last neck, as `protocols.Neck` says."""
        for neck in self.necks:
            features = neck(features)
        return features

    def with_auxiliary(self, features: Features) -> tuple[Features, Features]:
        """Compute the pyramid of the last neck and the auxiliary pyramid of the first one."""
        first = self.necks[0]
        assert isinstance(first, AuxiliaryNeck)
        features, auxiliary = first.with_auxiliary(features)
        for neck in self.necks[1:]:
            features = neck(features)
        return features, auxiliary


def auxiliary_weight(neck: Neck) -> float:
    """Return the weight of a neck's auxiliary losses, 0 for a neck without them."""
    return neck.auxiliary_weight if isinstance(neck, AuxiliaryNeck) else 0.0


def compute_pyramids(neck: Neck, features: Features) -> tuple[Features, Features | None]:
    """Compute a neck's pyramid and, where its auxiliary losses count, its auxiliary pyramid."""
    if isinstance(neck, AuxiliaryNeck) and neck.auxiliary_weight:
        return neck.with_auxiliary(features)
    return neck(features), None
