"""Soft RoI selection: AugFPN's pooling from all levels.

References:
    "AugFPN: Improving Multi-Scale Feature Learning for Object Detection", Guo et al., 2020, section 3.4.
"""

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.layers import conv, init_xavier
from fusedet.models.roi.pooling import align_level
from fusedet.types import Features, Levels


class SoftPooling(nn.Module):
    """RoIAlign of each RoI on every level, summed with learned weights per cell (adaptive spatial fusion).

    The convolutions are those of the authors' code: 1x1 to C channels, then 3x3 to a weight per level, with a sigmoid.

    Args:
        levels: Levels of the pyramid.
        size: Output size, in cells per side.
        count: Number of levels to pool from, the finest ones.
        samples: Sampling points per side of an output cell, 2 in the authors' code; 0 for as many as the cell has
            feature cells, which is slow on the finest level, where large RoIs are pooled too.

    Raises:
        InputError: An option is out of its range.
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
        init_xavier(self)

    def forward(self, features: Features, rois: Tensor, sized_by: Tensor | None = None) -> Tensor:
        """Pool the features of every RoI.

        Args:
            features: Levels (N, C, H, W).
            rois: (M, 5), index of the image in the batch, then a box in pixels.
            sized_by: Unused, all levels are pooled.

        Returns:
            (M, C, size, size).
        """
        # L times (M, C, s, s)
        pooled = [align_level(f, rois, self.size, stride, self.samples) for f, stride in zip(features, self.strides)]
        weights = self.weights(torch.cat(pooled, dim=1)).sigmoid()  # (M, L, s, s)
        return (torch.stack(pooled, dim=1) * weights[:, :, None]).sum(dim=1)
