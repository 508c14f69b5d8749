"""Confidence intervals over images: COCO metrics of thousands of bootstrap resamples, from one matching.

Detections are matched image by image. A resample that holds image i w times therefore holds each of its detections and
instances w times, and a metric is a function of the image weights: nothing has to be matched again. Along the
detections of a class in descending score, one cumulative sum of weights serves all IoU thresholds. Precision has its
maxima and recall its steps at true positives, so only their positions are evaluated.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching
from fusedet.evaluation.confidence_intervals import LEVEL, compute_percentile_interval
from fusedet.evaluation.dataset_matching import match_detections, rank_by_image_id
from fusedet.evaluation.mask_iou import validate_masks
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
BLOCK = 1 << 19  # weights processed at a time, which bounds memory


@dataclass(frozen=True)
class ResampledMetrics:
    """AP of B resamples of the images, in 0..1; NaN where a resample has no instance.

    Attributes:
        names: The M metrics: `METRICS`, then one per size bin.
        metrics: (M, B).
        classes: (K, B), AP of each class.
        images: Images in each resample.
    """

    names: tuple[str, ...]
    metrics: np.ndarray
    classes: np.ndarray
    images: int


def name_bins(size_bins: Sequence[float]) -> tuple[str, ...]:
    """Name the metrics of the size bins between edges in pixels.

    >>> name_bins([0, 32, 90.5])
    ('AP 0-32 px', 'AP 32-90.5 px')
    """
    return tuple(f"AP {low:g}-{high:g} px" for low, high in pairwise(size_bins))


def draw_image_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """Draw how often each image occurs in each resample: (1 + resamples, images) int16.

    The first row is the dataset itself, all ones. Every other row holds as many images, drawn with replacement.

    Raises:
        InputError: No image, no resample or a negative seed.
    """
    if images < 1 or resamples < 1 or seed < 0:
        raise InputError(
            f"a bootstrap needs images and resamples from 1 and a seed from 0, got {images}, {resamples} and {seed}"
        )
    rng = np.random.default_rng(seed)
    weights = np.ones((1 + resamples, images), dtype=np.int16)
    for row in weights[1:]:
        row[:] = np.bincount(rng.integers(images, size=images), minlength=images)
    return weights


def resample_metrics(
    dataset: DetectionDataset,
    results: Sequence[Result] | DetectionTable,
    weights: np.ndarray,
    iou_type: Literal["bbox", "segm"] = "bbox",
    size_bins: Sequence[float] = (),
) -> ResampledMetrics:
    """Compute COCO's average precisions on each resample.

    They equal `evaluate_coco` on a dataset in which each image is repeated as often as its weight says. Detections of
    equal score keep their order in the dataset itself: by ascending image id, then in the order of the results; copies
    of one detection stand together. A class without instances in a resample is left out of the mean, as in COCO.

    Args:
        dataset: The ground truth of N images.
        results: The detections; for "segm" the results themselves, each with an RLE.
        weights: (B, N), as `draw_image_weights` returns them.
        iou_type: "bbox" or "segm".
        size_bins: Edges of size bins in pixels, as in `evaluate_coco`.

    Raises:
        InputError: The weights do not fit the dataset, or the results do not, as in `evaluate_coco`.
    """
    n, classes = len(dataset), len(dataset.names)
    if weights.ndim != 2 or weights.shape[1] != n:
        raise InputError(f"weights must be (resamples, {n}), one per image, they are {weights.shape}")
    table = build_detection_table(dataset, results, boxes=iou_type == "bbox")
    masks: Sequence[Result] | None = None
    if iou_type == "segm":
        assert not isinstance(results, DetectionTable), "a detection table holds no masks"
        validate_masks(dataset, results)
        masks = results
    areas, names = coco_matching.extend_areas(size_bins), METRICS + name_bins(size_bins)
    pairs = match_detections(dataset, table, masks, coco_matching.THRESHOLDS, areas)
    by_place = np.empty_like(weights)
    by_place[:, rank_by_image_id(dataset)] = weights
    counts = ~(pairs.ground_truths.crowd | coco_matching.is_outside(pairs.ground_truths.area, areas))
    inside = ~coco_matching.is_outside(pairs.detections.area, areas)
    rows = np.empty((len(names), classes, len(weights)))
    for k, (own, of_class) in enumerate(
        coco_matching.iterate_classes(pairs.detections, pairs.ground_truths, n, classes)
    ):
        detection_images, gt_images = pairs.detections.group[own] - k * n, pairs.ground_truths.group[of_class] - k * n
        matched, ignored = pairs.matched[:, :, own], pairs.ignored[:, :, own]
        ap = np.stack(
            [
                _average_precision(
                    by_place,
                    detection_images,
                    inside[a, own],
                    matched[:, a],
                    ignored[:, a],
                    gt_images[counts[a, of_class]],
                )
                for a in range(len(areas))
            ]
        )  # (A, T, B)
        rows[:, k] = ap[0].mean(axis=0), ap[0, 0], ap[0, 5], *ap[1:].mean(axis=1)
    return ResampledMetrics(names, _mean(rows), rows[0], n)


def average_runs(runs: Sequence[ResampledMetrics]) -> ResampledMetrics:
    """Average runs, such as the seeds of one model, on the same resamples."""
    metrics, classes = (np.mean([getattr(run, name) for run in runs], axis=0) for name in ("metrics", "classes"))
    return replace(runs[0], metrics=metrics, classes=classes)


def compute_difference(
    a: ResampledMetrics, b: ResampledMetrics, names: Sequence[str], level: float = LEVEL
) -> dict[str, Any]:
    """Subtract a from b on the same resamples.

    Args:
        a: Metrics of one run.
        b: Metrics of the other run, on the same resamples.
        names: (K,) class names.
        level: Probability of the interval, in 0..1.

    Returns:
        {metric: {a, b, difference, low, high}} and classes, a list of such rows with the name of the class. a, b and
        difference are those of the dataset itself (resample 0); low and high are the `compute_percentile_interval` of
        the differences on the other resamples.
    """

    def rows(x: np.ndarray, y: np.ndarray) -> list[dict[str, float]]:
        change = y - x
        low, high = compute_percentile_interval(change[:, 1:], a.images, level)
        columns = {"a": x[:, 0], "b": y[:, 0], "difference": change[:, 0], "low": low, "high": high}
        return [dict(zip(columns, map(float, row))) for row in zip(*columns.values())]

    metrics: dict[str, Any] = dict(zip(a.names, rows(a.metrics, b.metrics)))
    return metrics | {"classes": [{"name": name} | row for name, row in zip(names, rows(a.classes, b.classes))]}


def paired_bootstrap(
    dataset: DetectionDataset,
    a: Sequence[Result] | DetectionTable,
    b: Sequence[Result] | DetectionTable,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    iou_type: Literal["bbox", "segm"] = "bbox",
    size_bins: Sequence[float] = (),
) -> Mapping[str, Any]:
    """Compare two runs by a paired bootstrap over images: metrics of b minus a, with confidence intervals.

    Both runs are evaluated on the same resamples. The interval covers the choice of the images: of all datasets with as
    many images drawn in the same way, `level` of the intervals hold the difference of these two sets of weights on the
    population of images. It does not cover the training seed; `compute_seed_difference` does. A metric of instances
    that few images hold gets its interval from the resamples that hold one.

    Args:
        dataset: The ground truth.
        a: The detections of the reference run.
        b: The detections of the other run.
        resamples: Number of resamples.
        seed: Seed of the resampling.
        level: Confidence level.
        iou_type: "bbox" or "segm", as in `evaluate_coco`.
        size_bins: Edges of size bins in pixels, as in `evaluate_coco`.

    Returns:
        The rows of `compute_difference`.

    Raises:
        InputError: The results do not fit the dataset, as in `evaluate_coco`.

    References:
        Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    weights = draw_image_weights(len(dataset), resamples, seed)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(
            lambda results: resample_metrics(dataset, results, weights, iou_type, size_bins), (a, b)
        )
    return compute_difference(first, second, dataset.names, level)


def _average_precision(
    weights: np.ndarray,
    detection_images: np.ndarray,
    inside: np.ndarray,
    matched: np.ndarray,
    ignored: np.ndarray,
    gt_images: np.ndarray,
) -> np.ndarray:
    """Compute the AP (T, B) of a class in one area range, NaN where a resample has no instance.

    detection_images (D,), best score first; inside (D,), whether the area lies in the range; matched and ignored (T,
    D); gt_images (G,), the images of the instances that count.
    """
    ap = np.zeros((len(matched), len(weights)))
    total = weights[:, gt_images].sum(axis=1, dtype=np.int32)
    is_true_positive = matched & ~ignored
    deviates = ~ignored ^ inside  # most detections count exactly if they are inside
    upto = np.cumsum(inside)
    step = max(1, BLOCK // (1 + max(len(detection_images), int(total.max(initial=0)))))
    for part in (slice(i, i + step) for i in range(0, len(weights) if is_true_positive.any() else 0, step)):
        part_weights = weights[part]
        base = _running(part_weights.take(detection_images[inside], axis=1))
        levels = np.searchsorted(
            coco_matching.RECALLS, np.arange(total[part].max() + 1) / np.maximum(total[part], 1)[:, None], side="right"
        )
        levels[:, 0] = 0  # no true positive reaches recall 0
        first = np.arange(len(part_weights))[:, None] * levels.shape[1]
        for t in range(len(matched)):
            at = np.flatnonzero(is_true_positive[t])
            if not len(at):
                continue
            hits = _running(part_weights.take(detection_images[at], axis=1))[:, 1:]
            counted = base.take(upto[at], axis=1)
            if deviates[t].any():
                where = np.flatnonzero(deviates[t])
                more = _running(
                    part_weights.take(detection_images[where], axis=1) * np.where(inside[where], -1, 1).astype(np.int16)
                )
                counted += more[:, np.searchsorted(where, at, side="right")]
            curve = hits / (counted + np.spacing(1))
            curve = np.maximum.accumulate(curve[:, ::-1], axis=1)[:, ::-1]
            reached = levels.ravel().take(first + hits)  # how many of the 101 recalls
            ap[t, part] = np.einsum("bj,bj->b", curve, np.diff(reached, axis=1, prepend=0))
    return np.where(total > 0, ap / len(coco_matching.RECALLS), np.nan)


def _running(weights: np.ndarray) -> np.ndarray:
    """Return the sums of the first 0, 1 .. D of weights (B, D): (B, D + 1) int32."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1), dtype=np.int32)
    # torch's sum is several times as fast as numpy's
    torch.cumsum(torch.from_numpy(weights), 1, dtype=torch.int32, out=torch.from_numpy(sums)[:, 1:])
    return sums


def _mean(rows: np.ndarray) -> np.ndarray:
    """Return the mean (M, B) over the classes of (M, K, B) that have a value."""
    is_known = ~np.isnan(rows)
    sums, count = np.where(is_known, rows, 0).sum(axis=1), is_known.sum(axis=1)
    return np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)
