"""Positions in units of a feature map's cells: boxes around the cells, and bilinear samples between them.

The first cell lies at 0. A box of a cell has the channels left, upper, right and lower side.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Padding = Literal["zeros", "border"]
"""What lies outside a map: zeros, or the values of the nearest cells."""


def cell_positions(maps: Tensor) -> Tensor:
    """Return x and y, (2, H, W), of the cells of maps (..., H, W), in their dtype."""
    y, x = (torch.arange(n, device=maps.device, dtype=maps.dtype) for n in maps.shape[-2:])
    return torch.stack(torch.broadcast_tensors(x, y[:, None]))


def boxes_around_cells(distances: Tensor) -> Tensor:
    """Compute the boxes (N, 4, H, W) of distances (N, 4, H, W) from the cells to the sides."""
    cells = cell_positions(distances)
    return torch.cat([cells - distances[:, :2], cells + distances[:, 2:]], dim=1)


def sample_cells(maps: Tensor, x: Tensor, y: Tensor, padding: Padding = "zeros") -> Tensor:
    """Sample maps (M, C, H, W) bilinearly at x and y (M, H', W'): (M, C, H', W').

    `grid_sample` computes it, which all exported formats have.
    """
    height, width = maps.shape[2:]
    # without aligned corners cell i lies at (2 i + 1) / length - 1
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(maps, grid, padding_mode=padding, align_corners=False)


def sample_sides(boxes: Tensor, offsets: Tensor, padding: Padding = "zeros") -> Tensor:
    """Take each side of a cell's box from the map at the cell plus the side's own offset, bilinearly.

    Shape:
        boxes (N, 4, H, W); offsets (N, 8, H, W), a pair (dy, dx) for each side; result (N, 4, H, W).
    """
    dy, dx = offsets.unflatten(1, (-1, 2)).flatten(0, 1).unbind(dim=1)  # (N * 4, H, W)
    x, y = cell_positions(boxes)
    return sample_cells(boxes.flatten(0, 1)[:, None], dx + x, dy + y, padding).view_as(boxes)
