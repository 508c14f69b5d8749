"""Several necks as one."""

from __future__ import annotations

from typing import Any

from torch import nn

from fusedet.errors import InputError
from fusedet.types import Features


class NeckChain(nn.Module):
    """Necks one after the other; each takes what the one before promises. The first may have an auxiliary pyramid (AugFPN's).

    Raises InputError where another one has it: its losses would be left out.
    """

    def __init__(self, necks: list[Any]) -> None:
        super().__init__()
        if any(getattr(neck, "auxiliary_weight", 0.0) for neck in necks[1:]):
            raise InputError(
                "model.neck: a neck with auxiliary losses must be the first in the chain, or have auxiliary_weight=0"
            )
        self.necks: Any = nn.ModuleList(necks)
        self.levels = necks[-1].levels
        self.auxiliary_weight = getattr(necks[0], "auxiliary_weight", 0.0)

    def forward(self, features: Features) -> Features:
        """Through all of them."""
        for neck in self.necks:
            features = neck(features)
        return features

    def with_auxiliary(self, features: Features) -> tuple[Features, Features]:
        """The pyramid, and the first neck's auxiliary one."""
        features, auxiliary = self.necks[0].with_auxiliary(features)
        for neck in self.necks[1:]:
            features = neck(features)
        return features, auxiliary
