"""The backbone's own map as a pyramid of one level, for C4 detectors."""

from torch import nn

from fusedet.errors import InputError
from fusedet.types import Features, Levels


class Identity(nn.Module):
    """Pass on the backbone's map of one level, such as C4: model.pyramid={finest: 4, coarsest: 4}.

    Args:
        levels: The backbone's levels.
        finest: Number of the level.
        coarsest: The same number.

    Raises:
        InputError: The backbone has no such level, or there is more than one.

    References:
        "Deep Residual Learning for Image Recognition", He et al., 2016, appendix A: detectors before feature pyramids.
    """

    def __init__(self, levels: Levels, finest: int = 4, coarsest: int = 4) -> None:
        super().__init__()
        if finest != coarsest:
            raise InputError(
                f"it passes on one level: set model.pyramid.finest={finest} and model.pyramid.coarsest={coarsest} to "
                "the same number"
            )
        if 2**finest not in levels.strides:
            raise InputError(f"finest={finest} (stride {2**finest}) must be one of the strides {levels.strides}")
        self.index = levels.strides.index(2**finest)
        self.levels = Levels((levels.channels[self.index],), (2**finest,))

    def forward(self, features: Features) -> Features:
        """Return the level's map (N, C, H, W) by itself."""
        return [features[self.index]]
