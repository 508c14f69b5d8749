"""Intervals over images: COCO's figures of thousands of resamples of the images, from one matching.

Matching is done image by image, so a resample that holds image i w times holds each of its detections and objects w
times, and nothing is matched anew: a figure is a function of the images' weights. Along a class's detections in falling
score, the weight of those that count is one cumulative sum for all thresholds of overlap; precision has its peaks and
recall its steps at the true positives, so only their places are looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching as rule
from fusedet.evaluation.confidence_intervals import LEVEL, compute_percentile_interval
from fusedet.evaluation.dataset_matching import match_detections, rank_by_image_id
from fusedet.evaluation.mask_iou import validate_masks
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
BLOCK = 1 << 19  # weights that are looked at together, a bound on memory


@dataclass(frozen=True)
class ResampledMetrics:
    """figures (6, B), `METRICS` of each of B resamples in 0..1, and classes (K, B), AP of each class; NaN without objects.

    images, how many each resample holds.
    """

    figures: np.ndarray
    classes: np.ndarray
    images: int


def draw_image_weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """How often each image occurs in each resample, (1 + resamples, images) int16; the first one is the data itself.

    Each of the others holds as many images as the data, drawn with replacement. Raises InputError for no image or no
    resample.
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
) -> ResampledMetrics:
    """COCO's average precisions of boxes, or with "segm" of masks, on each resample; weights (B, N) as `draw_image_weights` gives them.

    They equal `evaluate.coco` on data in which each image is repeated as often as its weight says. Detections of equal
    score stand as `evaluate_coco` has them on the data itself: by rising image id, then in the order of the results; the copies of
    one detection stand together. A class that has no object in a resample is left out of its means, as COCO does. Masks
    need the results themselves, each with an RLE. Raises InputError as `evaluate_coco` does.
    """
    n, classes = len(dataset), len(dataset.names)
    if weights.ndim != 2 or weights.shape[1] != n:
        raise InputError(f"weights must be (resamples, {n}), one per image, they are {weights.shape}")
    table = build_detection_table(dataset, results, boxes=iou_type == "bbox")
    masks: Sequence[Result] | None = None
    if iou_type == "segm":
        assert not isinstance(results, DetectionTable), "a table of finds holds no masks"
        validate_masks(dataset, results)
        masks = results
    pairs = match_detections(dataset, table, masks, rule.THRESHOLDS, rule.AREAS)
    by_place = np.empty_like(weights)
    by_place[:, rank_by_image_id(dataset)] = weights
    counts = ~(pairs.objects.crowd | rule.outside(pairs.objects.area, rule.AREAS))
    inside = ~rule.outside(pairs.guesses.area, rule.AREAS)
    rows = np.empty((len(METRICS), classes, len(weights)))
    for k, (own, of_class) in enumerate(rule.by_class(pairs.guesses, pairs.objects, n, classes)):
        seen, owner = pairs.guesses.group[own] - k * n, pairs.objects.group[of_class] - k * n
        hit, void = pairs.hit[:, :, own], pairs.void[:, :, own]
        ap = np.stack(
            [
                _average_precision(by_place, seen, inside[a, own], hit[:, a], void[:, a], owner[counts[a, of_class]])
                for a in range(len(rule.AREAS))
            ]
        )  # (A, T, B)
        rows[:, k] = ap[0].mean(axis=0), ap[0, 0], ap[0, 5], *ap[1:].mean(axis=1)
    return ResampledMetrics(_mean(rows), rows[0], n)


def average_runs(runs: Sequence[ResampledMetrics]) -> ResampledMetrics:
    """The mean over runs, such as one model's seeds, on the same resamples."""
    return ResampledMetrics(
        np.mean([run.figures for run in runs], axis=0), np.mean([run.classes for run in runs], axis=0), runs[0].images
    )


def compute_difference(
    a: ResampledMetrics, b: ResampledMetrics, names: Sequence[str], level: float = LEVEL
) -> dict[str, Any]:
    """b less a on the same resamples: {figure: {a, b, difference, low, high}} and classes, a list of the same with name.

    a, b and difference are of the data itself, resample 0; low and high are `compute_percentile_interval` of the others' differences.
    """

    def rows(x: np.ndarray, y: np.ndarray) -> list[dict[str, float]]:
        change = y - x
        low, high = compute_percentile_interval(change[:, 1:], a.images, level)
        columns = {"a": x[:, 0], "b": y[:, 0], "difference": change[:, 0], "low": low, "high": high}
        return [dict(zip(columns, map(float, row))) for row in zip(*columns.values())]

    figures: dict[str, Any] = dict(zip(METRICS, rows(a.figures, b.figures)))
    return figures | {"classes": [{"name": name} | row for name, row in zip(names, rows(a.classes, b.classes))]}


def paired_bootstrap(
    dataset: DetectionDataset,
    a: Sequence[Result] | DetectionTable,
    b: Sequence[Result] | DetectionTable,
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = LEVEL,
    iou_type: Literal["bbox", "segm"] = "bbox",
) -> Mapping[str, Any]:
    """How much b's average precisions exceed a's, each with its interval over images; form as in `compute_difference`.

    Both runs are scored on the same resamples of the images. The interval covers which images were drawn into the
    data: among datasets of as many images drawn in the same way, `level` of the intervals hold the difference of these
    two sets of weights on all such images. It does not cover which seed the runs were trained with: that is
    `intervals.difference_over_seeds`. A figure of objects that few images hold has its interval from the resamples that
    hold one. `iou_type` as in `evaluate_coco`. Raises InputError as that does.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.
    """
    weights = draw_image_weights(len(dataset), resamples, seed)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda results: resample_metrics(dataset, results, weights, iou_type), (a, b))
    return compute_difference(first, second, dataset.names, level)


def _average_precision(
    weights: np.ndarray, seen: np.ndarray, inside: np.ndarray, hit: np.ndarray, void: np.ndarray, owner: np.ndarray
) -> np.ndarray:
    """A class's AP (T, B) in one range of area, NaN where a resample has no object.

    seen (D,) the images of the detections, best score first; inside (D,) whether their area is in the range; hit, void
    (T, D); owner (G,) the images of the objects that count.
    """
    ap = np.zeros((len(hit), len(weights)))
    total = weights[:, owner].sum(axis=1, dtype=np.int32)
    good, odd = hit & ~void, ~void ^ inside  # a detection counts where it is inside, but for a few
    upto = np.cumsum(inside)
    step = max(1, BLOCK // (1 + max(len(seen), int(total.max(initial=0)))))
    for part in (slice(i, i + step) for i in range(0, len(weights) if good.any() else 0, step)):
        some = weights[part]
        base = _running(some.take(seen[inside], axis=1))
        levels = np.searchsorted(
            rule.RECALLS, np.arange(total[part].max() + 1) / np.maximum(total[part], 1)[:, None], side="right"
        )
        levels[:, 0] = 0  # no true positive reaches recall 0
        first = np.arange(len(some))[:, None] * levels.shape[1]
        for t in range(len(hit)):
            at = np.flatnonzero(good[t])
            if not len(at):
                continue
            hits = _running(some.take(seen[at], axis=1))[:, 1:]
            counted = base.take(upto[at], axis=1)
            if odd[t].any():
                where = np.flatnonzero(odd[t])
                more = _running(some.take(seen[where], axis=1) * np.where(inside[where], -1, 1).astype(np.int16))
                counted += more[:, np.searchsorted(where, at, side="right")]
            curve = hits / (counted + np.spacing(1))
            curve = np.maximum.accumulate(curve[:, ::-1], axis=1)[:, ::-1]
            reached = levels.ravel().take(first + hits)  # how many of the 101 recalls
            ap[t, part] = np.einsum("bj,bj->b", curve, np.diff(reached, axis=1, prepend=0))
    return np.where(total > 0, ap / len(rule.RECALLS), np.nan)


def _running(weights: np.ndarray) -> np.ndarray:
    """Sums of the first 0, 1 .. D of weights (B, D): (B, D + 1) int32."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1), dtype=np.int32)
    # torch's sum is several times as fast as numpy's
    torch.cumsum(torch.from_numpy(weights), 1, dtype=torch.int32, out=torch.from_numpy(sums)[:, 1:])
    return sums


def _mean(rows: np.ndarray) -> np.ndarray:
    """The mean (F, B) over the classes of (F, K, B) that have a value."""
    known = ~np.isnan(rows)
    sums, count = np.where(known, rows, 0).sum(axis=1), known.sum(axis=1)
    return np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0)
