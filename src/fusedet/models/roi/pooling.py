"""From regions of interest to features of one size: RoIAlign on the level that fits a region (FPN, 2017, eq. 1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from fusedet.errors import InputError
from fusedet.models.ops.precision import without_autocast
from fusedet.models.ops.roi_align_cpu import region_align
from fusedet.types import Features, Levels

PoolingFactory = Callable[[int], nn.Module]
"""What makes the pooling of a size, in cells a side."""


class LevelPooling(nn.Module):
    """RoIAlign of each region on one level: level k for sides of about finest_side * 2^k pixels.

    levels: of the pyramid; the first `count` of them are pooled from (the others, like P6, serve the proposals alone).
    size: of the result, in cells a side. samples: along each side of such a cell; 0, as many as it is wide in the level's cells.
    aligned: a level's cell speaks of its centre; without, of its upper left corner (torchvision's detectors, with samples=2).
    """

    def __init__(
        self,
        levels: Levels,
        size: int = 7,
        count: int = 4,
        finest_side: float = 56.0,
        samples: int = 0,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        if size < 1 or count < 1 or samples < 0 or not finest_side > 0:
            raise InputError(
                f"size={size}, count={count}, finest_side={finest_side} must be above 0 and samples={samples} at least 0"
            )
        self.size, self.strides, self.finest_side = size, levels.strides[:count], finest_side
        self.samples, self.aligned = samples, aligned
        self.channels = levels.channels[0]

    def forward(self, features: Features, rois: Tensor) -> Tensor:
        """Levels (N, C, H, W) and rois (M, 5), each the image's number and a box in pixels, to (M, C, size, size)."""
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
        places = (sides / self.finest_side + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        pooled = features[0].new_zeros(len(rois), features[0].shape[1], self.size, self.size)
        if rois.is_meta:  # only shapes are asked for
            return pooled
        for i, (feature, stride) in enumerate(zip(features, self.strides)):
            here = (places == i).nonzero().squeeze(1)
            pooled = pooled.index_copy(
                0, here, align_level(feature, rois[here], self.size, stride, self.samples, self.aligned)
            )
        return pooled


def align_level(
    feature: Tensor, rois: Tensor, size: int, stride: int, samples: int = 0, aligned: bool = True
) -> Tensor:
    """RoIAlign of rois (M, 5) in pixels on a level (N, C, H, W): (M, C, size, size) of the level's type.

    samples: along each side of a cell; 0, as many as there are of the level's cells. Computed in float32: half precision moves boxes.
    """
    with without_autocast(feature):
        if (
            feature.is_cpu and not torch.compiler.is_compiling()
        ):  # what is exported has torchvision's operator, which runtimes know
            return region_align(feature.float(), rois.float(), size, stride, samples, aligned).to(feature.dtype)
        return roi_align(feature.float(), rois.float(), size, 1 / stride, sampling_ratio=samples, aligned=aligned).to(
            feature.dtype
        )


def boxes_to_rois(boxes: Tensor) -> Tensor:
    """Boxes (N, R, 4) as rois (N * R, 5): the image's number before each."""
    n, r = boxes.shape[:2]
    numbers = torch.arange(n, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(n, r, 1)
    return torch.cat([numbers, boxes], dim=2).flatten(0, 1)
