"""RoIAlign on the pyramid level that fits the size of an RoI.

References:
    "Feature Pyramid Networks for Object Detection", Lin et al., 2017, eq. 1.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align

from fusedet.errors import InputError
from fusedet.models.ops.autocast import without_autocast
from fusedet.models.ops.exporting import is_exporting
from fusedet.models.ops.roi_align_cpu import roi_align_cpu
from fusedet.models.protocols import RoIPooling
from fusedet.types import Features, Levels

PoolingFactory = Callable[[int], RoIPooling]
"""Function from an output size, in cells per side, to a pooling."""


class LevelPooling(nn.Module):
    """RoIAlign of each RoI on one level: level k for sides of about finest_side * 2^k pixels.

    Args:
        levels: Levels of the pyramid.
        size: Output size, in cells per side.
        count: Number of levels to pool from, the finest ones; the others, such as P6, serve the proposals only.
        finest_side: The finest level pools RoIs of less than twice this side, in pixels (FPN: 56).
        samples: Sampling points per side of an output cell; 0 for as many as the cell has feature cells.
        aligned: Feature cells stand for their centers; otherwise for their upper left corners (torchvision's
            detectors, with samples=2).

    Raises:
        InputError: An option is out of its range.
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
                f"size={size}, count={count}, finest_side={finest_side} must be above 0, and samples={samples} 0 or "
                "more"
            )
        self.size, self.strides, self.finest_side = size, levels.strides[:count], finest_side
        self.samples, self.aligned = samples, aligned
        self.channels = levels.channels[0]

    def forward(self, features: Features, rois: Tensor, sized_by: Tensor | None = None) -> Tensor:
        """Pool the features of every RoI.

        Args:
            features: Levels (N, C, H, W).
            rois: (M, 5), index of the image in the batch, then a box in pixels.
            sized_by: (M, 5), RoIs whose sizes choose the levels; by default `rois`.

        Returns:
            (M, C, size, size).
        """
        sides_of = rois if sized_by is None else sized_by
        sides = ((sides_of[:, 3] - sides_of[:, 1]) * (sides_of[:, 4] - sides_of[:, 2])).clamp(min=0).sqrt()
        level = (sides / self.finest_side + 1e-6).log2().floor().clamp(0, len(self.strides) - 1)
        if rois.is_meta:  # only shapes are computed
            return features[0].new_zeros(rois.shape[0], features[0].shape[1], self.size, self.size)
        if is_exporting() or torch.compiler.is_compiling():
            return self._pool_exported(features, rois, level)
        order = level.argsort(stable=True)
        counts = (level == torch.arange(len(self.strides), device=level.device)[:, None]).sum(dim=1)
        own_rois = rois[order].split(counts.tolist())  # the only synchronization with a GPU
        by_level = [
            align_level(feature, own, self.size, stride, self.samples, self.aligned)
            for feature, own, stride in zip(features, own_rois, self.strides)
        ]
        pooled = torch.cat(by_level)
        return torch.empty_like(pooled).index_copy(0, order, pooled)

    def _pool_exported(self, features: Features, rois: Tensor, level: Tensor) -> Tensor:
        """Pool with two more RoIs on every level: a traced program refuses levels with fewer."""
        count = rois.shape[0]
        rois = F.pad(rois, (0, 0, 0, 2))
        more = count + torch.arange(2, device=rois.device)
        rows = [torch.cat([(level == i).nonzero().squeeze(1), more]) for i in range(len(self.strides))]
        by_level = [
            align_level(feature, rois[own], self.size, stride, self.samples, self.aligned)
            for feature, own, stride in zip(features, rows, self.strides)
        ]
        order = torch.cat(rows)
        # gathering copies each RoI's features once, and writing them into place once per level
        place = order.new_zeros(count + 2).index_copy(0, order, torch.arange(order.shape[0], device=order.device))
        return torch.cat(by_level).index_select(0, place[:count])


class AllLevelPooling(nn.Module):
    """RoIAlign of each RoI on every level, for heads that score the levels one by one.

    Args:
        levels: Levels to pool from, L of them.
        size: Output size, in cells per side.
        samples: Sampling points per side of an output cell, 2 in AugFPN's code.

    References:
        "AugFPN: Improving Multi-Scale Feature Learning for Object Detection", Guo et al., 2020, section 3.2.
    """

    def __init__(self, levels: Levels, size: int = 7, samples: int = 2) -> None:
        super().__init__()
        self.size, self.samples, self.strides = size, samples, levels.strides

    def forward(self, features: Features, rois: Tensor, sized_by: Tensor | None = None) -> Tensor:
        """Pool the features of every RoI from every level.

        Args:
            features: L or more levels (N, C, H, W).
            rois: (M, 5), index of the image in the batch, then a box in pixels.
            sized_by: Unused, all levels are pooled.

        Returns:
            (L * M, C, size, size), all RoIs of the finest level first.
        """
        return torch.cat([align_level(f, rois, self.size, s, self.samples) for f, s in zip(features, self.strides)])


def align_level(
    feature: Tensor, rois: Tensor, size: int, stride: int, samples: int = 0, aligned: bool = True
) -> Tensor:
    """Apply RoIAlign on one level, in float32, because half precision shifts boxes.

    Args:
        feature: (N, C, H, W).
        rois: (M, 5), index of the image in the batch, then a box in pixels.
        size: Output size, in cells per side.
        stride: Stride of the level.
        samples: Sampling points per side of an output cell; 0 for as many as the cell has feature cells.
        aligned: Feature cells stand for their centers.

    Returns:
        (M, C, size, size) in the type of `feature`.
    """
    with without_autocast(feature):
        # an exported model has torchvision's operator, which runtimes know
        if feature.is_cpu and not torch.compiler.is_compiling():
            return roi_align_cpu(feature.float(), rois.float(), size, stride, samples, aligned).to(feature.dtype)
        return roi_align(feature.float(), rois.float(), size, 1 / stride, sampling_ratio=samples, aligned=aligned).to(
            feature.dtype
        )


def boxes_to_rois(boxes: Tensor) -> Tensor:
    """Put the index of the image before each box: boxes (N, R, 4) to rois (N * R, 5)."""
    n, r = boxes.shape[:2]
    index = torch.arange(n, device=boxes.device, dtype=boxes.dtype)[:, None, None].expand(n, r, 1)
    return torch.cat([index, boxes], dim=2).flatten(0, 1)
