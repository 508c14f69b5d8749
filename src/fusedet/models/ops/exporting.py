"""Forms of operations that export with dynamic sizes to ONNX and OpenVINO, and the switch that selects them.

Eager computation never takes these forms: its numbers, its order of equal scores and its speed do not depend on them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

_EXPORTING: ContextVar[bool] = ContextVar("fusedet_exporting", default=False)


def is_exporting() -> bool:
    """Return whether the code runs inside `exporting`.

    `torch.compiler.is_exporting` would also hold where somebody exports a part for torch, which needs no other form.
    """
    return _EXPORTING.get()


@contextmanager
def exporting() -> Iterator[None]:
    """Select the forms that export, for the calls inside the block."""
    token = _EXPORTING.set(True)
    try:
        yield
    finally:
        _EXPORTING.reset(token)


def is_symbolic(*sides: Any) -> bool:
    """Return whether one of the sizes is dynamic in an export."""
    return any(isinstance(side, torch.SymInt) for side in sides)


def average_pool_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute adaptive average pooling of x (N, C, H, W) to a size as a product with a matrix along each axis."""
    return _average_matrix(x.shape[2], size[0], x) @ x @ _average_matrix(x.shape[3], size[1], x).mT


def average_pool_and_resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool x (N, C, H, W) to a size and resize it back bilinearly with aligned corners, as two products.

    No tensor has a side of `size`: tracing would take it for a constant where it is 1.
    """
    return _pool_and_resize_matrix(x.shape[2], size[0], x) @ x @ _pool_and_resize_matrix(x.shape[3], size[1], x).mT


def _average_matrix(length: int, cells: int, like: Tensor) -> Tensor:
    """Compute the weights (cells, length) of every cell's window."""
    return _average_rows(torch.arange(cells, device=like.device)[:, None], length, cells, like)


def _pool_and_resize_matrix(length: int, cells: int, like: Tensor) -> Tensor:
    """Compute weights (length, length): each row is the interpolation between the windows of two neighboring cells."""
    steps: int = torch.sym_max(length - 1, 1)  # type: ignore[assignment]
    place = torch.arange(length, device=like.device)[:, None] * (cells - 1)  # in cells, times `steps`
    cell = place // steps
    part = (place - cell * steps).to(like.dtype) / steps  # ONNX has no remainder of a dynamic size
    # beyond the last cell the part is 0
    before, after = (_average_rows(cell + i, length, cells, like) for i in (0, 1))
    return before * (1 - part) + after * part


def _average_rows(cell: Tensor, length: int, cells: int, like: Tensor) -> Tensor:
    """Compute the weights (R, length) of the windows of the cells (R, 1)."""
    start, end = _windows(cell, length, cells)
    position = torch.arange(length, device=like.device)
    return ((position >= start) & (position < end)).to(like.dtype) / (end - start)


def max_pool_windows(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Compute adaptive max pooling of x (N, C, H, W) to a size by gathering the windows of each axis."""
    return _max_along(_max_along(x, 2, size[0]), 3, size[1])


def _max_along(x: Tensor, dim: int, cells: int) -> Tensor:
    length = x.shape[dim]
    start, end = _windows(torch.arange(cells, device=x.device)[:, None], length, cells)
    widest = (length + cells - 1) // cells + 1
    index = torch.minimum(start + torch.arange(widest, device=x.device), end - 1)  # (cells, widest), the last repeated
    return x.index_select(dim, index.flatten()).unflatten(dim, (cells, widest)).amax(dim=dim + 1)


def _windows(cell: Tensor, length: int, cells: int) -> tuple[Tensor, Tensor]:
    """Compute the first and last position, exclusive, of adaptive pooling's windows of cells (R, 1)."""
    return cell * length // cells, ((cell + 1) * length + cells - 1) // cells


def nms_over_images(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Compute `fusedet::nms_keep_mask` by one call of torchvision's NMS, for any number of images.

    The images are moved apart in float64, so that boxes of different images never overlap and no coordinate loses
    digits. Boxes with a negative score have no area there and suppress nothing. Two more such boxes follow, because a
    traced NMS needs at least two results.
    """
    n, m = scores.shape
    real = scores >= 0
    corners = torch.where(real[..., None], boxes.double(), 0.0)
    span = corners.abs().amax(dim=(0, 1, 2)) * 2 + 1
    apart = corners + (torch.arange(n, device=boxes.device) * span)[:, None, None]
    kept = nms(F.pad(apart.flatten(0, 1), (0, 0, 0, 2)), F.pad(scores.flatten(), (0, 2), value=-2.0).double(), iou)
    mask = torch.zeros(n * m + 2, dtype=torch.bool, device=boxes.device).index_fill(0, kept, True)
    return mask[: n * m].unflatten(0, (n, m)) & real


@torch.library.custom_op(
    "fusedet::nms_keep_mask", mutates_args=(), schema="(Tensor boxes, Tensor scores, float iou) -> Tensor"
)
def nms_keep_mask_op(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Compute which boxes survive NMS; those with a negative score never do.

    One operator without a shape that depends on the data: it becomes one NonMaxSuppression in ONNX.

    Shape:
        boxes (N, M, 4) and scores (N, M), float32; result (N, M) bool.
    """
    alive = torch.zeros_like(scores, dtype=torch.bool)
    for i in range(boxes.shape[0]):
        real = (scores[i] >= 0).nonzero().squeeze(1)
        alive[i, real[nms(boxes[i, real], scores[i, real], iou)]] = True
    return alive


@nms_keep_mask_op.register_fake
def _(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)
