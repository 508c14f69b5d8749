"""BorderAlign.

References:
    "BorderDet: Border Feature for Dense Object Detection", Qiu et al., 2020, section 3.2.
"""

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.models.ops.autocast import without_autocast
from fusedet.models.ops.cells import sample_cells
from fusedet.models.ops.exporting import is_exporting

BORDERS = 4  # left, upper, right and lower
MOST_POINTS = 255  # intervals: the index of the largest point is a byte


def border_align(features: Tensor, boxes: Tensor, points: int = 10, both_ends: bool = False) -> Tensor:
    """Take the maximum of each border's own channels along the border of every box.

    A border has the points at k / `points` of its length from its left or upper end, k = 0 to `points` - 1, and with
    `both_ends` also k = `points`, as in the authors' code and MMCV. Values between cells are bilinear. The gradient
    goes to the cells of the first largest point; boxes have none.

    Args:
        features: Channels of the left, upper, right and lower border, C each.
        boxes: B boxes of every image, in cells: 0 is the first cell's center. They are clipped to the cells' centers.
        points: Intervals of a border, N of the paper; at most `MOST_POINTS`.
        both_ends: Also take the point at the right or lower end.

    Shape:
        features (N, 4 * C, H, W); boxes (N, B, 4); result (N, 4 * C, B).
    """
    n, channels, height, width = features.shape
    with without_autocast(features):
        table = features.float().unflatten(1, (BORDERS, -1))  # (N, 4, C, H, W)
        places = _border_points(boxes.detach().to(table.dtype), height, width, points, points + both_ends)
        if is_exporting():
            best = _sample_by_grid(table, places)  # (N, 4, C, B)
        else:
            rows = table.permute(0, 1, 3, 4, 2).reshape(-1, channels // BORDERS)  # (N * 4 * H * W, C)
            best = _MaxOverPoints.apply(rows, *_corner_cells(places, height, width))  # (N * 4 * B, C)
            best = best.view(n, BORDERS, -1, channels // BORDERS).mT
    return best.flatten(1, 2).to(features.dtype)


def _border_points(boxes: Tensor, height: int, width: int, points: int, count: int) -> Tensor:
    """Return the first `count` points of every border, (count, N, 4, B, 2), x and y, in cells."""
    x = boxes[..., 0::2].clamp(0, width - 1)  # (N, B, 2)
    y = boxes[..., 1::2].clamp(0, height - 1)
    (x1, x2), (y1, y2) = x.unbind(dim=2), y.unbind(dim=2)
    wide, tall, zero = (x2 - x1) / points, (y2 - y1) / points, torch.zeros_like(x1)
    start = torch.stack([torch.stack(p, dim=2) for p in ((x1, y1), (x1, y1), (x2, y1), (x1, y2))], dim=1)
    step = torch.stack([torch.stack(p, dim=2) for p in ((zero, tall), (wide, zero), (zero, tall), (wide, zero))], dim=1)
    return start + torch.arange(count, device=boxes.device).view(-1, 1, 1, 1, 1) * step


def _sample_by_grid(table: Tensor, places: Tensor) -> Tensor:
    """Sample by `sample_cells`, which all exported formats have: maxima (N, 4, C, B)."""
    maps = table.flatten(0, 1)  # (N * 4, C, H, W)
    x, y = places.flatten(1, 2)[:, :, None].unbind(dim=4)  # (points, N * 4, 1, B)
    samples = (sample_cells(maps, *place, padding="border") for place in zip(x, y))
    return reduce(torch.maximum, samples).squeeze(2).unflatten(0, (-1, BORDERS))  # of (N * 4, C, 1, B)


class _MaxOverPoints(torch.autograd.Function):
    """Maxima (R, C) over R borders' points of rows (N * 4 * H * W, C), with cells and weights (points, R, 4).

    A sample is a weighted sum of four rows, an embedding bag. Only the index of the largest point is saved: the samples
    of all points would need many times the memory of the result.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, cells: Tensor, weights: Tensor) -> Tensor:
        best = chosen = rows.new_empty(0)
        for k in range(len(cells)):
            values = F.embedding_bag(cells[k], rows, mode="sum", per_sample_weights=weights[k])
            if k == 0:
                best, chosen = values, torch.zeros_like(values, dtype=torch.uint8)
                continue
            if ctx.needs_input_grad[0]:
                # the largest k so far; on a CPU faster than a selection by mask
                chosen = torch.maximum(chosen, (values > best).view(torch.uint8) * k, out=chosen)
            best = torch.maximum(best, values, out=best)
        ctx.save_for_backward(cells, weights, chosen)
        ctx.length = len(rows)
        return best

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cells, weights, chosen = ctx.saved_tensors
        total = gradient.new_zeros(ctx.length, gradient.shape[1])
        for k in range(len(cells)):
            own = gradient * (chosen == k)
            for corner in range(4):
                total.index_add_(0, cells[k, :, corner], own * weights[k, :, corner, None])
        return total, None, None


def _corner_cells(places: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the indices of the four rows around every point (points, N, 4, B, 2), and their weights.

    Shape:
        both results (points, N * 4 * B, 4).
    """
    x, y = places.unbind(dim=4)  # (points, N, 4, B)
    left, top = x.floor(), y.floor()
    map_index = torch.arange(places.shape[1] * BORDERS, device=places.device).view(-1, BORDERS, 1)
    first = map_index * height * width
    cells, weights = [], []
    for row, weight_y in ((top, top + 1 - y), (top + 1, y - top)):
        for column, weight_x in ((left, left + 1 - x), (left + 1, x - left)):
            # beyond the last cell the weight is 0; a NaN's weight is NaN too, and any cell serves
            row_index = row.nan_to_num().clamp(0, height - 1).long()
            column_index = column.nan_to_num().clamp(0, width - 1).long()
            cells.append(first + row_index * width + column_index)
            weights.append(weight_y * weight_x)
    return torch.stack(cells, dim=-1).flatten(1, 3), torch.stack(weights, dim=-1).flatten(1, 3)
