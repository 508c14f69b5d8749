"""All numbers of a page, computed from a split and its detections."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation import bootstrap
from fusedet.evaluation.calibration import Calibration, compute_calibration
from fusedet.evaluation.coco_matching import AREAS, is_outside
from fusedet.evaluation.coco_metrics import compute_precision_recall
from fusedet.evaluation.confidence_intervals import compute_percentile_interval
from fusedet.evaluation.error_analysis import analyze_errors
from fusedet.evaluation.formatting import format_interval
from fusedet.evaluation.image_matching import IGNORED, match_images
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table
from fusedet.evaluation.score_thresholds import BestThreshold, find_best_thresholds
from fusedet.report.counts import DEFAULT, Counts, classify, count_by_threshold
from fusedet.report.gallery import Thumbnail, choose_items, make_thumbnails

RESAMPLES = 200
"""How often the images are drawn for the intervals."""

FEWEST = 10
"""Sizes and classes of fewer objects are not named as the worst: chance decides their AP."""


class SizeRow(NamedTuple):
    """AP of the instances of one range of sizes, with its interval."""

    name: str
    ap: float
    low: float
    high: float
    objects: int


@dataclass(frozen=True)
class Analysis:
    """What a page shows.

    Attributes:
        names: K class names.
        images: Number of images.
        objects: Number of instances that count.
        metrics: Metrics by name, as `evaluate_coco` and `val` make them, with `classes` and `stamp`.
        intervals: Ends of the interval over images of AP, AP50, ..., by name.
        class_intervals: Ends of the interval of each class's AP.
        sizes: AP by object size.
        errors: Count and dAP of each type, as of `analyze_errors`.
        precision_recall: As `compute_precision_recall` returns it.
        counts: What follows the threshold.
        best: The best threshold of each class, and last that of all.
        calibration: Of all detections; None where scores lie outside 0..1.
        calibration_shown: Of the detections of at least the threshold that the page starts with.
        thumbnails: The gallery.
        unread: Images of the gallery that cannot be read.
    """

    names: tuple[str, ...]
    images: int
    objects: int
    metrics: Mapping[str, Any]
    intervals: dict[str, tuple[float, float]]
    class_intervals: list[tuple[float, float]]
    sizes: list[SizeRow]
    errors: dict[str, dict[str, float]]
    precision_recall: Mapping[str, Any]
    counts: Counts
    best: list[BestThreshold]
    calibration: Calibration | None
    calibration_shown: Calibration | None
    thumbnails: list[Thumbnail]
    unread: int


def analyze_run(
    dataset: DetectionDataset,
    results: Sequence[Result] | DetectionTable,
    metrics: Mapping[str, Any],
    size_bins: Sequence[float] = (),
) -> Analysis:
    """Compute what a page shows.

    Args:
        dataset: The split, with instances.
        results: The detections, in COCO's result format.
        metrics: Their metrics.
        size_bins: Edges of size bins in pixels, as in `evaluate_coco`; without them COCO's small, medium and large.

    Raises:
        InputError: The results do not fit the dataset, as in `evaluate_coco`.
    """
    table = build_detection_table(dataset, results)
    weights = bootstrap.draw_image_weights(len(dataset), RESAMPLES, seed=0)
    resampled = bootstrap.resample_metrics(dataset, table, weights, size_bins=size_bins)
    intervals = dict(zip(resampled.names, _find_intervals(resampled.metrics, len(dataset)), strict=True))
    pairs = match_images(dataset, table)
    kinds = classify(pairs)
    thumbnails, unread = make_thumbnails(dataset, pairs, choose_items(dataset, pairs, kinds))
    counted = pairs.matches != IGNORED
    calibrations: list[Calibration | None] = [None, None]
    if not len(table) or 0 <= table.scores.min() <= table.scores.max() <= 1:
        parts = (counted, counted & (pairs.scores >= DEFAULT / 100))
        calibrations = [compute_calibration(pairs.scores[part], pairs.is_true_positive[part]) for part in parts]
    values = dict(zip(resampled.names, resampled.metrics[:, 0].tolist()))
    return Analysis(
        dataset.names,
        len(dataset),
        int(pairs.counted.sum()),
        metrics,
        intervals,
        _find_intervals(resampled.classes, len(dataset)),
        _rank_sizes(dataset, values, intervals, size_bins),
        analyze_errors(dataset, table)["types"],
        compute_precision_recall(dataset, table),
        count_by_threshold(pairs, kinds, dataset.names),
        find_best_thresholds(dataset, pairs, weights),
        calibrations[0],
        calibrations[1],
        thumbnails,
        unread,
    )


def _find_intervals(values: np.ndarray, images: int) -> list[tuple[float, float]]:
    """Return the interval of each metric (M, 1 + B), whose first column is that of the dataset itself.

    A resample repeats images, which by itself raises AP a little. That shift is taken out: it is no uncertainty.
    """
    own, resampled = values[:, :1], values[:, 1:]
    known = ~np.isnan(resampled)
    sums, count = np.where(known, resampled, 0).sum(axis=1, keepdims=True), known.sum(axis=1, keepdims=True)
    shift = np.divide(sums, count, out=np.full_like(sums, np.nan), where=count > 0) - own
    low, high = compute_percentile_interval(resampled - shift, images)
    return list(zip(low.clip(0, 1).tolist(), high.clip(0, 1).tolist(), strict=True))


def _rank_sizes(
    dataset: DetectionDataset,
    values: Mapping[str, float],
    intervals: Mapping[str, tuple[float, float]],
    size_bins: Sequence[float],
) -> list[SizeRow]:
    """Return AP by size bin, or by COCO's sizes."""
    if size_bins:
        edges = list(pairwise(size_bins))
        metrics, areas = bootstrap.name_bins(size_bins), np.array(edges, dtype=float) ** 2
        names = [f"{low:g} to {high:g} px" for low, high in edges]
    else:
        metrics, areas = ("APs", "APm", "APl"), AREAS[1:]
        names = ["up to 32 px", "32 to 96 px", "96 px or more"]
    counted = ~is_outside(dataset.area.numpy(), areas) & ~dataset.eval_ignore.numpy()
    return [
        SizeRow(name, values[metric], *intervals[metric], int(own.sum()))
        for name, metric, own in zip(names, metrics, counted, strict=True)
    ]


ERROR_TEXTS = {
    "classification": "Classification errors (boxes of a wrong class)",
    "localization": "Localization errors (badly placed boxes)",
    "both": "Errors of localization and class",
    "duplicate": "Duplicates (second boxes on one instance)",
    "background": "Background errors (boxes where no instance is)",
    "missed": "Missed instances",
}


def summarize_failures(analysis: Analysis) -> list[str]:
    """Say where the detector fails: the error type that costs most, the worst size and the worst class."""
    text = []
    name, row = max(analysis.errors.items(), key=lambda item: item[1]["dAP"])
    if row["dAP"] > 0:
        text.append(
            f"{ERROR_TEXTS[name]} cost the most: without these {row['count']:,} errors AP50 would rise from "
            f"{analysis.metrics['AP50']:.3f} by {row['dAP']:.3f}."
        )
    else:
        text.append("No error type costs AP50.")
    sizes = [size for size in analysis.sizes if size.objects >= FEWEST and math.isfinite(size.ap)]
    if len(sizes) > 1:
        worst, best = min(sizes, key=lambda size: size.ap), max(sizes, key=lambda size: size.ap)
        text.append(
            f"By object size, AP is lowest for {worst.name}: {worst.ap:.3f}{_interval(worst.low, worst.high)} on "
            f"{worst.objects:,} instances, and highest for {best.name}: {best.ap:.3f}."
        )
    own = enumerate(analysis.metrics["classes"])
    classes = [(row["AP"], k) for k, row in own if row["objects"] >= FEWEST and math.isfinite(row["AP"])]
    if len(classes) > 1:
        ap, k = min(classes)
        row = analysis.metrics["classes"][k]
        ends = _interval(*analysis.class_intervals[k])
        text.append(f"By class, AP is lowest for {row['name']}: {ap:.3f}{ends} on {row['objects']:,} instances.")
    return text


def _interval(low: float, high: float) -> str:
    ends = format_interval((low, high))
    return f" ({ends})" if ends else ""
