"""RoIAlign on a CPU as weighted sums of cells: "Mask R-CNN", He et al., 2017, section 3.

The mean of bilinear samples on a regular grid is a product of two weightings, one along each axis, and neighboring
samples share cells. So a bin is one weighted sum of the few cells that it covers. Each cell is a row of C contiguous
numbers in channels_last. torchvision's kernel samples channel by channel on one core; benchmarks/operators.py compares
the two.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def roi_align_cpu(
    feature: Tensor, rois: Tensor, size: int, stride: int, samples: int = 0, aligned: bool = True
) -> Tensor:
    """Compute `torchvision.ops.roi_align(feature, rois, size, 1 / stride, samples, aligned)`, up to rounding.

    Shape:
        feature (N, C, H, W); rois (M, 5), index of the image and a box in pixels, without gradient; result
        (M, C, size, size).
    """
    if samples > 1 and len(rois) and float((rois[:, 3:] - rois[:, 1:3]).max()) > size * stride * samples:
        # samples more than a cell apart share no cells: each becomes a bin of its own
        return F.avg_pool2d(roi_align_cpu(feature, rois, size * samples, stride, 1, aligned), samples)
    channels, height, width = feature.shape[1:]
    with torch.no_grad():
        boxes = rois[:, 1:] / stride - (0.5 if aligned else 0)
        sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0 if aligned else 1)
        rows, tall, row_weights = _axis(boxes[:, 1], sides[:, 1], height, size, samples)
        columns, wide, column_weights = _axis(boxes[:, 0], sides[:, 0], width, size, samples)
        # bins (M, size, size): the index of their first cell in the table, and how many cells they cover
        images = rois[:, 0].long()[:, None, None] * (height * width)
        first = (images + rows[:, :, None] * width + columns[:, None, :]).flatten()
        counts = (tall[:, :, None] * wide[:, None, :]).flatten()
        ends = counts.cumsum(0)
        bins = torch.repeat_interleave(counts)  # (T,), one entry per covered cell
        position = torch.arange(len(bins)) - (ends - counts)[bins]
        roi, column = bins // (size * size), bins % size
        column += roi * size
        across = wide.flatten()[column]
        down = position // across
        along = position - down * across
        cells = first[bins] + down * width + along
        weights = row_weights.flatten()[bins // size * row_weights.shape[2] + down]
        weights *= column_weights.flatten()[column * column_weights.shape[2] + along]
    table = feature.permute(0, 2, 3, 1).reshape(-1, channels)  # (N * H * W, C), no copy of a channels_last map
    pooled = F.embedding_bag(
        cells,
        table,
        F.pad(ends, (1, 0)),
        mode="sum",
        per_sample_weights=weights.to(table.dtype),
        include_last_offset=True,
    )
    return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2)


def _axis(start: Tensor, length: Tensor, cells: int, size: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute along one axis of `cells` each bin's first cell, cell count and weights.

    start, length (M,): of the RoIs, in cells. samples: per bin; 0 for one per cell of its length, none without length.
    Result: (M, size), (M, size) and (M, size, most).
    """
    taken = (torch.full_like(length, samples) if samples else (length / size).ceil())[:, None, None]
    number = taken.clamp(min=1)
    most = int(number.max()) if len(number) else 1
    sample = torch.arange(most)
    offset = (torch.arange(size)[:, None] + (sample + 0.5) / number) * (length / size)[:, None, None]
    at = offset + start[:, None, None]  # (M, size, most)
    weight = ((sample < taken) & (at >= -1) & (at <= cells)) / number  # samples farther outside are 0
    at = at.clamp(0, cells - 1)
    low = at.floor()
    fraction = at - low
    first = low[..., :1].long()
    index = (low.long() - first).clamp(max=most)
    weights = at.new_zeros(*at.shape[:2], most + 2)
    weights.scatter_add_(2, index, (1 - fraction) * weight).scatter_add_(2, index + 1, fraction * weight)
    covered = ((weights > 0) * torch.arange(1, most + 3)).amax(dim=2)
    return first.squeeze(2), covered, weights
