"""Soft RoI selection: "AugFPN: Improving Multi-Scale Feature Learning for Object Detection", Guo et al., 2020, section 3.4."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.layers import conv, xavier
from fusedet.models.roi.pooling import align_level
from fusedet.types import Features, Levels


class SoftPooling(nn.Module):
    """RoIAlign of each region on every level, and their sum by weights that are learnt per place (adaptive spatial fusion).

    levels: of the pyramid; the first `count` of them are pooled from. size: of the result, in cells a side.
    samples: of RoIAlign along each side of a cell, 2 in the authors' code; 0, as many as there are pixels, costs most on the finest
    level, which here sees large regions too.
    The convolutions, 1x1 to C channels and 3x3 to a weight per level with a sigmoid, are those of the authors' code.
    """

    def __init__(self, levels: Levels, size: int = 7, count: int = 4, samples: int = 2) -> None:
        super().__init__()
        if size < 1 or count < 1 or samples < 0:
            raise InputError(f"size={size}, count={count} must be at least 1 and samples={samples} at least 0")
        self.size, self.samples, self.strides = size, samples, levels.strides[:count]
        self.channels = levels.channels[0]
        self.weights = nn.Sequential(
            conv(self.channels * len(self.strides), self.channels, 1),
            nn.ReLU(inplace=True),
            conv(self.channels, len(self.strides), 3),
        )
        xavier(self)

    def forward(self, features: Features, rois: Tensor) -> Tensor:
        """Levels (N, C, H, W) and rois (M, 5), each the image's number and a box in pixels, to (M, C, size, size)."""
        pooled = [
            align_level(f, rois, self.size, stride, self.samples) for f, stride in zip(features, self.strides)
        ]  # L times (M, C, s, s)
        weights = self.weights(torch.cat(pooled, dim=1)).sigmoid()  # (M, L, s, s)
        return (torch.stack(pooled, dim=1) * weights[:, :, None]).sum(dim=1)
