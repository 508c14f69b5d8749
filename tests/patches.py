"""A backbone of one convolution, with which an export has few operators besides those of the detector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedet.types import Features, Levels


class Patches(nn.Module):
    """One map of stride 32: a convolution of patches of 32 pixels.

    Args:
        name: Ignored, as are the others: a config of another backbone sets them.
        pretrained: Ignored.
        weights: Ignored.
        frozen_stages: Ignored.
        norm_eval: Ignored.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str = "",
        pretrained: bool = False,
        weights: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
    ) -> None:
        super().__init__()
        self.levels = Levels((32,), (32,))
        self.convolution = nn.Conv2d(3, 32, 32, stride=32)
        self.register_buffer("scale", torch.full((3, 1, 1), 1 / 64), persistent=False)
        self.register_buffer("shift", torch.full((3, 1, 1), -2.0), persistent=False)

    def forward(self, images: Tensor) -> Features:
        """Compute one map (N, 32, H / 32, W / 32)."""
        return [self.convolution(images).relu()]
