"""Boxes: anchors, box encoding and decoding, IoU, and the project's only non-maximum suppression."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from fusedet.models.ops.exporting import is_exporting
from fusedet.models.protocols import ScoreDecay
from fusedet.types import BatchDetections, Candidates, Features, Levels, Priors

MAX_RATIO = abs(math.log(16 / 1000))
"""Bound on |dw| and |dh| in decoding: a box grows or shrinks by a factor of at most 62.5 (Fast R-CNN's convention)."""


def make_base_anchors(
    stride: int, base_scale: float, scales_per_octave: int, ratios: Sequence[float], whole_sizes: bool = False
) -> Tensor:
    """Make the anchors of one cell, centered on the origin and not rounded.

    Args:
        stride: Stride of the level, in pixels.
        base_scale: Side of the smallest square anchor, in strides.
        scales_per_octave: Number of sizes, base_scale * 2^(i / scales_per_octave) strides.
        ratios: height / width of the anchors.
        whole_sizes: Truncate the sizes to whole pixels before the ratios apply (torchvision's RetinaNet).

    Returns:
        (A, 4), A = len(ratios) * scales_per_octave: ratios outer, scales inner.
    """
    octaves = base_scale * 2.0 ** (torch.arange(scales_per_octave, dtype=torch.float64) / scales_per_octave)
    return make_cell_anchors((stride * octaves).floor() if whole_sizes else stride * octaves, ratios)


def make_cell_anchors(sizes: Tensor, ratios: Sequence[float]) -> Tensor:
    """Make the anchors of one cell, centered on the origin and not rounded.

    Args:
        sizes: Roots of the anchors' areas, in pixels, float64.
        ratios: height / width of the anchors.

    Shape:
        sizes (S,); result (A, 4), A = len(ratios) * S: ratios outer, sizes inner.
    """
    root = torch.tensor(ratios, dtype=torch.float64).sqrt()
    half_w = (sizes[None] / root[:, None]).flatten() / 2
    half_h = (sizes[None] * root[:, None]).flatten() / 2
    return torch.stack([-half_w, -half_h, half_w, half_h], dim=1).float()


def grid_priors(features: Features, levels: Levels, shapes: Sequence[Tensor] | Tensor, offset: float = 0.0) -> Priors:
    """Place each level's base anchors on every cell of its feature map.

    Args:
        features: Feature maps, of which only the sizes matter.
        levels: Their strides.
        shapes: Base anchors of every level around the origin.
        offset: Position of the center in its cell, in strides: x = (column + offset) * stride, y likewise.

    Shape:
        features: (N, C, H_l, W_l) per level; shapes: (A, 4) per level; result: P = sum of H_l * W_l * A priors.
    """
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
    """Encode boxes (P, 4) as deltas (P, 4) relative to priors (P, 4).

    A delta is the shift of the center in prior sizes, and the log of the ratio of sizes.

    References:
        "Rich feature hierarchies for accurate object detection and semantic segmentation" (R-CNN), Girshick et al.,
        2014, appendix C, eq. 1 to 4.
    """
    wh, target_wh = priors[:, 2:] - priors[:, :2], boxes[:, 2:] - boxes[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - priors[:, :2] - priors[:, 2:]) / 2 / wh
    return torch.cat([shift, (target_wh / wh).log()], dim=1)


def decode_boxes(priors: Tensor, deltas: Tensor, most_shift: float | None = None) -> Tensor:
    """Decode deltas (..., P, 4) on priors (P, 4) or (..., P, 4) to boxes (..., P, 4), the inverse of `encode_boxes`.

    `MAX_RATIO` bounds the change of size. With `most_shift` in pixels, it bounds growth only, and the center moves by
    at most `most_shift` along x and y (YOLOF).
    """
    wh = priors[..., 2:] - priors[..., :2]
    shift, ratio = deltas[..., :2] * wh, deltas[..., 2:].clamp(max=MAX_RATIO)
    if most_shift is None:
        ratio = ratio.clamp(min=-MAX_RATIO)
    else:
        shift = shift.clamp(-most_shift, most_shift)
    center = (priors[..., :2] + priors[..., 2:]) / 2 + shift
    half = wh * ratio.exp() / 2
    return torch.cat([center - half, center + half], dim=-1)


def make_base_points(stride: int, scale: float = 1.0) -> Tensor:
    """Make the only prior of a point head's cell, (1, 4): a square of scale * stride pixels centered on the origin."""
    half = scale * stride / 2
    return torch.tensor([[-half, -half, half, half]])


def make_level_points(levels: Levels, scale: float = 1.0) -> Tensor:
    """Make the only prior of a point head's cell on every level, (L, 1, 4)."""
    return torch.stack([make_base_points(stride, scale) for stride in levels.strides])


def box_centers(priors: Tensor) -> Tensor:
    """Compute the centers (..., 2) of boxes (..., 4)."""
    return (priors[..., :2] + priors[..., 2:]) / 2


def boxes_to_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Compute the distances (..., 4) of points (..., 2) to the left, top, right and bottom side of boxes (..., 4).

    A distance is negative for a point outside that side (FCOS, 2019, eq. 1).
    """
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Compute boxes (..., 4) of points (..., 2) and distances (..., 4), the inverse of `boxes_to_distances`."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)


def aligned_iou(a: Tensor, b: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute the IoU (...) of every box in a (..., 4) with the box at the same index in b (..., 4).

    A union counts as at least eps square pixels.
    """
    width, height = (
        (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).unbind(dim=-1)
    )
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a.unbind(dim=-1), b.unbind(dim=-1))]
    intersection = width * height
    return intersection / (areas[0] + areas[1] - intersection).clamp(min=eps)


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes (N, P, 4) to images of sizes (N, 2), height and width."""
    limit = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)  # (N, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limit)


def select_detections(
    candidates: Candidates,
    sizes: Tensor,
    level_counts: Sequence[int],
    *,
    score: float | Sequence[float] = 0.05,
    iou: float = 0.5,
    pre_nms: int = 1000,
    max_det: int = 100,
    soft: ScoreDecay | None = None,
    clip: bool = True,
    keep_empty: bool = False,
) -> BatchDetections:
    """Select the final detections by score and class-wise non-maximum suppression.

    The steps are MMDetection 3.x's. No branch depends on the data, so that the function exports.

    1. Keep the `pre_nms` pairs of prior and class with the highest scores of every level.
    2. Keep those above `score` whose clipped box has an area.
    3. Suppress, class by class, in the order of score times quality.
    4. Keep the `max_det` best.

    Args:
        candidates: Boxes, scores and quality of P priors.
        sizes: Height and width of every image inside the padding.
        level_counts: Number of priors per level.
        score: Minimum score, or K of them, one per class.
        iou: IoU above which the box with the lower score is suppressed.
        pre_nms: Pairs per level that enter the suppression.
        max_det: Detections per image, D.
        soft: Decay scores instead of suppressing boxes.
        clip: Clip the boxes to the images first.
        keep_empty: Keep boxes without an area.

    Shape:
        sizes (N, 2); result: boxes (N, D, 4), scores (N, D), labels (N, D), counts (N,).
    """
    boxes, scores, quality = candidates
    if boxes.is_meta:  # only shapes matter on the meta device
        n = len(boxes)
        labels = torch.zeros(n, max_det, dtype=torch.int64, device="meta")
        return BatchDetections(
            boxes.new_zeros(n, max_det, 4), scores.new_zeros(n, max_det), labels, labels.new_zeros(n)
        )
    top = [_best_pairs(level, pre_nms) for level in scores.split(list(level_counts), dim=1)]
    starts = [sum(level_counts[:i]) for i in range(len(top))]
    confidence = torch.cat([values for values, _, _ in top], dim=1)  # (N, M)
    rows = torch.cat([rows + start for (_, rows, _), start in zip(top, starts)], dim=1)
    labels = torch.cat([classes for _, _, classes in top], dim=1)
    if boxes.ndim == 4:  # class-specific boxes
        indices, boxes = rows * scores.shape[2] + labels, boxes.flatten(1, 2)
    else:
        indices = rows
    chosen = boxes.gather(1, indices[..., None].expand(-1, -1, 4))  # (N, M, 4)
    chosen = clip_boxes(chosen, sizes) if clip else chosen
    final = confidence if quality is None else confidence * quality.gather(1, rows)
    limits = score if isinstance(score, (int, float)) else confidence.new_tensor(score)[labels]
    real = confidence > limits  # (N, M)
    if not keep_empty:
        real &= (chosen[..., 2:] > chosen[..., :2]).all(dim=2)
    if soft is not None:
        best, index = soft.select(chosen, torch.where(real, final, -1.0), labels, iou, max_det)
        return _gather_selected(chosen, labels, best, index)
    if is_exporting():
        return _select_exported(chosen, real, final, labels, iou, max_det)
    least = chosen.detach().amin().clamp(max=0)  # below 0 only without clipping; NMS has its place for no box there
    span = chosen.detach().amax() - least + 1  # shifts by a multiple of it keep classes from suppressing each other
    per_image = []
    for b, s, k, r in zip(chosen.unbind(), final.unbind(), labels.unbind(), real.unbind()):
        index = r.nonzero().squeeze(1)  # once, because it synchronizes with a GPU
        b, s, k = b[index], s[index], k[index]
        keep = _nms(b - least + (k * span)[:, None], s, iou)
        count = (torch.ones_like(keep).sum() - 2).clamp(max=max_det)
        # unused entries read one of the two rows of zeros
        index = keep[torch.minimum(torch.arange(max_det, device=keep.device), count)]
        per_image.append((*(torch.cat([x, x.new_zeros(2, *x.shape[1:])])[index] for x in (b, s, k)), count))
    return BatchDetections(*(torch.stack(column) for column in zip(*per_image)))


def _select_exported(
    boxes: Tensor, real: Tensor, scores: Tensor, labels: Tensor, iou: float, max_det: int
) -> BatchDetections:
    """Select as `select_detections` does, without a shape that depends on the data: boxes (N, M, 4), others (N, M)."""
    scores = torch.where(real, scores, -1.0)
    span = boxes.amax(dim=(0, 1, 2)) - boxes.amin(dim=(0, 1, 2)).clamp(max=0) + 1
    keep = nms_keep_mask(boxes + (labels * span)[..., None], scores, iou)
    best, index = F.pad(torch.where(keep, scores, -1.0), (0, max_det), value=-1.0).topk(max_det, dim=1)
    return _gather_selected(F.pad(boxes, (0, 0, 0, max_det)), F.pad(labels, (0, max_det)), best, index)


def _gather_selected(boxes: Tensor, labels: Tensor, scores: Tensor, index: Tensor) -> BatchDetections:
    """Gather detections by index (N, D) from boxes (N, M, 4) and labels (N, M); a negative score (N, D) is padding."""
    real = scores >= 0
    chosen = boxes.gather(1, index[..., None].expand(-1, -1, 4))
    return BatchDetections(chosen * real[..., None], scores * real, labels.gather(1, index) * real, real.sum(dim=1))


@torch.no_grad()
def nms_keep_mask(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Compute which boxes survive non-maximum suppression, image by image.

    Shape:
        boxes (N, M, 4); scores (N, M); result (N, M) bool.
    """
    if boxes.is_meta:  # only shapes matter on the meta device
        return torch.ones_like(scores, dtype=torch.bool)
    if is_exporting():
        return torch.ops.fusedet.nms_keep_mask(boxes.float(), scores.float(), iou)
    none = torch.zeros(boxes.shape[1] + 2, dtype=torch.bool, device=boxes.device)
    alive = [none.scatter(0, _nms(b, s, iou), True)[:-2] for b, s in zip(boxes.unbind(), scores.unbind())]
    return torch.stack(alive)


def nms_keep_mask_by_level(boxes: Sequence[Tensor], scores: Sequence[Tensor], iou: float) -> Tensor:
    """Compute which boxes survive non-maximum suppression within their level.

    On a CPU small calls are faster. Every call synchronizes with a GPU, where an image has one call, with the levels
    moved apart.

    Shape:
        per level boxes (N, M, 4), coordinates not negative, and scores (N, M); result (N, sum of M) bool.
    """
    if boxes[0].device.type in ("cpu", "meta"):
        return torch.cat([nms_keep_mask(b, s, iou) for b, s in zip(boxes, scores)], dim=1)
    span = torch.cat(list(boxes), dim=1).amax() + 1
    apart = torch.cat([b + span * i for i, b in enumerate(boxes)], dim=1)
    return nms_keep_mask(apart, torch.cat(list(scores), dim=1), iou)


def _nms(boxes: Tensor, scores: Tensor, iou: float) -> Tensor:
    """Return the indices of the boxes (M, 4) that survive, highest score first, then M and M + 1.

    The last two are boxes outside of all images, whose coordinates are negative: an exported nms needs at least two
    results.
    """
    corners = 3 * torch.arange(2, device=boxes.device)[:, None] - 9  # made where the boxes are
    outside = (corners + torch.arange(4, device=boxes.device) // 2).to(boxes.dtype)  # (2, 4)
    every = torch.cat([scores.float(), scores.new_full((2,), -2.0).float()])
    return nms(torch.cat([boxes, outside]).float(), every, iou)


def _best_pairs(scores: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best (prior, class) pairs of a level's scores (N, P, K): scores, priors, classes, (N, limit) each.

    A pair among the best `limit` has its prior among the best `limit` by their best class, so only those are sorted.
    """
    classes = scores.shape[2]
    rows = scores.amax(dim=2).topk(torch.sym_min(limit, scores.shape[1]), dim=1).indices  # (N, R)
    few = scores.gather(1, rows[..., None].expand(-1, -1, classes)).flatten(1)  # (N, R * K)
    values, pairs = few.topk(torch.sym_min(limit, few.shape[1]), dim=1)
    return values, rows.gather(1, pairs // classes), pairs % classes
