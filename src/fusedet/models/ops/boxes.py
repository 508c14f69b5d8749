"""Boxes: anchors, the code between boxes and regression targets, and the project's one selection of final detections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import nms

from fusedet.types import BatchDetections, Candidates, Features, Levels, Priors

MAX_RATIO = abs(math.log(16 / 1000))
"""The largest |dw|, |dh| that decoding takes: a box grows or shrinks by at most 62.5 (Fast R-CNN's convention)."""


def make_base_anchors(
    stride: int, base_scale: float, scales_per_octave: int, ratios: Sequence[float], whole_sizes: bool = False
) -> Tensor:
    """Anchors of one cell around the origin, (A, 4): ratios (height / width) outer, scales inner, not rounded.

    whole_sizes: the sizes of which the ratios make width and height are cut to whole pixels (torchvision's RetinaNet).
    """
    octaves = base_scale * 2.0 ** (torch.arange(scales_per_octave, dtype=torch.float64) / scales_per_octave)
    sizes = (stride * octaves).floor() if whole_sizes else stride * octaves
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()
    half_w = (sizes[None] / root[:, None]).flatten() / 2
    half_h = (sizes[None] * root[:, None]).flatten() / 2
    return torch.stack([-half_w, -half_h, half_w, half_h], dim=1).float()


def grid_priors(features: Features, levels: Levels, shapes: Sequence[Tensor] | Tensor, offset: float = 0.0) -> Priors:
    """Put each level's shapes (A, 4) on every cell of its map: x = (column + offset) * stride, y likewise."""
    boxes, counts = [], []
    for feature, stride, shape in zip(features, levels.strides, shapes):
        h, w = feature.shape[-2:]
        x = (torch.arange(w, device=feature.device) + offset) * stride
        y = (torch.arange(h, device=feature.device) + offset) * stride
        y, x = torch.meshgrid(y, x, indexing="ij")
        corners = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)  # (H*W, 1, 4)
        boxes.append((corners + shape.to(feature.device)).reshape(-1, 4))
        counts.append(h * w * len(shape))
    strides = torch.cat([boxes[i].new_full((n,), levels.strides[i]) for i, n in enumerate(counts)])
    return Priors(torch.cat(boxes), strides, tuple(counts))


def encode_boxes(priors: Tensor, boxes: Tensor) -> Tensor:
    """Boxes (P, 4) relative to priors (P, 4): centre shift in prior sizes, log of the size ratio (R-CNN, 2014, eq. 1-4 of its C)."""
    wh, target_wh = priors[:, 2:] - priors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - priors[:, :2] - priors[:, 2:]) / 2 / wh
    return torch.cat([shift, (target_wh / wh).log()], dim=1)


def decode_boxes(priors: Tensor, deltas: Tensor) -> Tensor:
    """The inverse of `encode_boxes`: deltas (..., P, 4) on priors (P, 4), or (..., P, 4), to boxes (..., P, 4); sizes bounded by `MAX_RATIO`."""
    wh = priors[..., 2:] - priors[..., :2]
    centre = (priors[..., :2] + priors[..., 2:]) / 2 + deltas[..., :2] * wh
    half = wh * deltas[..., 2:].clamp(-MAX_RATIO, MAX_RATIO).exp() / 2
    return torch.cat([centre - half, centre + half], dim=-1)


def make_base_points(stride: int, scale: float = 1.0) -> Tensor:
    """The one prior of a cell of a point head, (1, 4): a square of scale * stride around the point."""
    half = scale * stride / 2
    return torch.tensor([[-half, -half, half, half]])


def box_centres(priors: Tensor) -> Tensor:
    """The centres (..., 2) of boxes (..., 4)."""
    return (priors[..., :2] + priors[..., 2:]) / 2


def boxes_to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """How far the left, upper, right and lower side of boxes (..., 4) are from points (..., 2), negative outside (FCOS, 2019, eq. 1)."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """The inverse of `boxes_to_distances`: boxes (..., 4) from points (..., 2) and distances (..., 4)."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def aligned_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """The overlap (...) of boxes a (..., 4), each with its partner in b (..., 4); a union counts as at least eps square pixels."""
    width, height = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).unbind(dim=-1)
    )
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a.unbind(dim=-1), b.unbind(dim=-1))]
    shared = width * height
    return shared / (areas[0] + areas[1] - shared).clamp(min=eps)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, P, 4) moved inside images of sizes (N, 2), height and width."""
    limit = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # (N, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limit)


def select_detections(
    candidates: Candidates,
    sizes: Tensor,
    level_counts: Sequence[int],
    *,
    score: float = 0.05,
    iou: float = 0.5,
    pre_nms: int = 1000,
    max_det: int = 100,
) -> BatchDetections:
    """The one non-maximum suppression of the project.

    candidates of P priors, sizes (N, 2) of the images, level_counts the priors per level.
    Per level the `pre_nms` best pairs of prior and class stay, then those above `score` whose clipped box has an area,
    then class-wise suppression above `iou` in the order of score times quality, then the `max_det` best (MMDetection 3.x).
    No branch depends on the data, so that torch.export takes it.
    """
    boxes, scores, quality = candidates
    top = [_best_pairs(level, pre_nms) for level in scores.split(list(level_counts), dim=1)]
    starts = [sum(level_counts[:i]) for i in range(len(top))]
    confidence = torch.cat([values for values, _, _ in top], dim=1)  # (N, M)
    rows = torch.cat([rows + start for (_, rows, _), start in zip(top, starts)], dim=1)
    labels = torch.cat([classes for _, _, classes in top], dim=1)
    if boxes.ndim == 4:  # a box for each class
        places, boxes = rows * scores.shape[2] + labels, boxes.flatten(1, 2)
    else:
        places = rows
    chosen = clip_boxes(boxes.gather(1, places[..., None].expand(-1, -1, 4)), sizes)  # (N, M, 4)
    final = confidence if quality is None else confidence * quality.gather(1, rows)
    span = chosen.detach().amax() + 1  # classes are moved apart by more than any box is wide
    picked = []
    for b, c, s, k in zip(chosen.unbind(), confidence.unbind(), final.unbind(), labels.unbind()):
        real = (c > score) & (b[:, 2] > b[:, 0]) & (b[:, 3] > b[:, 1])
        b, s, k = b[real], s[real], k[real]
        keep = _best_apart(b + (k * span)[:, None], s, iou)
        count = (torch.ones_like(keep).sum() - 2).clamp(max=max_det)
        place = keep[
            torch.minimum(torch.arange(max_det, device=keep.device), count)
        ]  # an unused place reads one of the two rows of zeros
        picked.append((*(torch.cat([x, x.new_zeros(2, *x.shape[1:])])[place] for x in (b, s, k)), count))
    return BatchDetections(*(torch.stack(column) for column in zip(*picked)))


@torch.no_grad()
def nms_keep_mask(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """(N, M) bool: which boxes (N, M, 4) no better one of the same image overlaps by more than `iou`, in the order of scores (N, M)."""
    if boxes.is_meta:  # only shapes are asked for
        return torch.ones_like(scores, dtype=torch.bool)
    nobody = torch.zeros(boxes.shape[1] + 2, dtype=torch.bool, device=boxes.device)
    alive = [nobody.scatter(0, _best_apart(b, s, iou), True)[:-2] for b, s in zip(boxes.unbind(), scores.unbind())]
    return torch.stack(alive)


def _best_apart(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Best first, the indices of boxes (M, 4), none at negative places, that no better one overlaps by more than `iou`; then M and M + 1.

    These two stand for boxes outside of everything: what torch.export makes of nms takes no answer of fewer than two.
    """
    outside = boxes.new_tensor([[-9.0, -9, -8, -8], [-6, -6, -5, -5]])
    every = torch.cat([scores.float(), scores.new_full((2,), -2.0).float()])
    return nms(torch.cat([boxes, outside]).float(), every, iou)


def _best_pairs(scores: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best (prior, class) pairs of a level (N, P, K): their scores, priors and classes, each (N, min(limit, P * K)).

    A pair among the best `limit` has its prior among the best `limit` by its best class, so only those are sorted.
    """
    classes = scores.shape[2]
    rows = scores.amax(dim=2).topk(min(limit, scores.shape[1]), dim=1).indices  # (N, R)
    few = scores.gather(1, rows[..., None].expand(-1, -1, classes)).flatten(1)  # (N, R * K)
    values, pairs = few.topk(min(limit, few.shape[1]), dim=1)
    return values, rows.gather(1, pairs // classes), pairs % classes
