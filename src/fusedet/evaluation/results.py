"""COCO results: loading, validation and conversion to flat arrays."""

import hashlib
import json
import math
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_files import read_bytes
from fusedet.data.segmentation import count_rle_pixels, is_rle
from fusedet.errors import InputError, make_unknown_error

Result = dict[str, Any]
"""{image_id, category_id, score, bbox [x, y, width, height] in original pixels and / or segmentation (RLE)}."""

EVALUATORS = ("fusedet", "faster-coco-eval", "pycocotools")
"""The evaluators of COCO metrics; all agree to rounding, and the first needs no further package."""

MAX_DETS = (1, 10, 100)
"""Detections per image and class that COCO metrics use."""


def extend_max_dets(max_det: int) -> tuple[int, ...]:
    """Return COCO's limits, with a larger one where detectors may have more detections per image.

    >>> extend_max_dets(100), extend_max_dets(300)
    ((1, 10, 100), (1, 10, 100, 300))
    """
    return (*MAX_DETS, max_det) if max_det > MAX_DETS[-1] else MAX_DETS


LARGEST = 1e18
"""The bound of all coordinates of a result, in pixels."""


@dataclass(frozen=True)
class DetectionTable:
    """Detections as arrays.

    Attributes:
        images: (D,), indices in the dataset.
        labels: (D,), 0..K-1.
        scores: (D,).
        boxes: (D, 4), x, y, width, height.
    """

    images: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, own: np.ndarray) -> "DetectionTable":
        """Return the detections of a mask (D,)."""
        return DetectionTable(self.images[own], self.labels[own], self.scores[own], self.boxes[own])


def build_detection_table(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable, *, boxes: bool = True
) -> DetectionTable:
    """Convert results to arrays, unless they are arrays already; `boxes=False` leaves zeros for boxes.

    Raises:
        InputError: A result lacks a key, holds a number that is not finite, or names an unknown image or category.
    """
    if isinstance(results, DetectionTable):
        return results
    if (columns := _read_plain(results, boxes)) is None:
        validate_results(results, "results", boxes=boxes)
        columns = _read_plain([_to_plain(r, boxes) for r in results], boxes)
        assert columns is not None, "validated results hold numbers"
    image_ids, category_ids, scores, sizes = columns
    return DetectionTable(
        images=_position(image_ids, "image_id", dataset.image_ids.numpy(), dataset.source),
        labels=_position(category_ids, "category_id", np.array(dataset.category_ids, dtype=np.int64), dataset.source),
        scores=scores,
        boxes=sizes,
    )


def load_results(path: str | Path, dataset: DetectionDataset | None = None) -> list[Result]:
    """Load and validate the results in a JSON file.

    Args:
        path: The file.
        dataset: The dataset whose ids they carry, where these may be texts; they become its integers. Digits in quotes
            count as integers.

    Raises:
        InputError: The file is absent, is not JSON or not a list, or a result lacks a key or holds NaN, an infinite
            number, a negative size or an invalid RLE.
    """
    content = read_bytes(path)
    try:
        results = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"results file {path} is not json: {error}") from error
    if not isinstance(results, list):
        raise InputError(f"results file {path} must hold a list of results, it holds a {type(results).__name__}")
    results = _to_integer_ids(results, dataset)
    validate_results(results, str(path), boxes=any(not isinstance(r, dict) or "segmentation" not in r for r in results))
    for i, result in enumerate(results):
        if isinstance(mask := result.get("segmentation"), dict) and not _drawable(mask):
            raise InputError(f"{path}: the mask of result {i} is no run-length code of its own size")
    return results


def to_dataset_ids(results: Sequence[Result], dataset: DetectionDataset) -> Sequence[Result]:
    """Return results with the ids that the dataset's files have, where these are texts."""
    if dataset.image_id_texts is None and not dataset.category_id_texts:
        return results
    images = dict(zip(dataset.image_ids.tolist(), dataset.list_image_ids(), strict=True))
    categories = dict(zip(dataset.category_ids, dataset.category_id_texts or dataset.category_ids, strict=True))
    return [r | {"image_id": images[r["image_id"]], "category_id": categories[r["category_id"]]} for r in results]


def _to_integer_ids(results: list[Result], dataset: DetectionDataset | None) -> list[Result]:
    """Replace the ids that are texts by the dataset's integers; unknown ones stay and are refused by validation."""
    known: dict[str, dict[str, int]] = {"image_id": {}, "category_id": {}}
    if dataset is not None and dataset.image_id_texts is not None:
        known["image_id"] = dict(zip(map(str, dataset.list_image_ids()), dataset.image_ids.tolist(), strict=True))
    if dataset is not None and dataset.category_id_texts:
        known["category_id"] = dict(zip(dataset.category_id_texts, dataset.category_ids, strict=True))

    ids = (r.get(key) for r in results if isinstance(r, dict) for key in known)
    if not any(known.values()) and str not in set(map(type, ids)):
        return results  # by far the most frequent

    def convert(key: str, value: Any) -> Any:
        if known[key]:
            return known[key].get(str(value), value)
        return int(value) if isinstance(value, str) and value.isdecimal() and len(value) < 20 else value

    return [r | {key: convert(key, r[key]) for key in known if key in r} if isinstance(r, dict) else r for r in results]


def validate_results(results: Sequence[Result], where: str, *, boxes: bool = True) -> None:
    """Raise InputError for the first result that lacks a key or holds a bad number; `where` names the results."""
    if _read_plain(results, boxes) is not None:
        return
    _validate_key(results, where, "image_id", "an integer", _whole)
    _validate_key(results, where, "category_id", "an integer", _whole)
    _validate_key(results, where, "score", "a finite number", _finite)
    if boxes:
        _validate_key(
            results,
            where,
            "bbox",
            f"four finite numbers [x, y, width, height] below {LARGEST:g}, width and height not negative",
            _box,
        )


def create_stamp(
    dataset: DetectionDataset,
    results: Sequence[Result],
    evaluator: str = "fusedet",
    *,
    iou_type: str = "bbox",
    max_dets: Sequence[int] = MAX_DETS,
) -> dict[str, Any]:
    """Describe what two evaluations must share to be comparable; stored beside all metrics.

    Args:
        dataset: The dataset.
        results: In COCO's result format, with image and category ids of the dataset.
        evaluator: One of `EVALUATORS`.
        iou_type: "bbox" or "segm".
        max_dets: Limits of the detections of an image and class.

    Returns:
        evaluator, its package and version; iou_type; max_dets; images, their number; image_ids, 16 hex digits of the
        sorted ids; data, the fingerprint of the dataset with its annotations; detections, their number.

    Raises:
        InputError: The evaluator is not one of EVALUATORS.
    """
    if evaluator not in EVALUATORS:
        raise make_unknown_error("evaluator", evaluator, EVALUATORS)
    ids = np.sort(dataset.image_ids.numpy())
    return {
        "evaluator": f"{evaluator} {version(evaluator)}",
        "iou_type": iou_type,
        "max_dets": list(max_dets),
        "images": len(dataset),
        "image_ids": hashlib.sha256(ids.tobytes()).hexdigest()[:16],
        "data": dataset.fingerprint(),
        "detections": len(results),
    }


def nan_mean(values: np.ndarray) -> float:
    """Return the mean of the values that are not NaN; NaN if there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def _read_plain(results: Sequence[Result], boxes: bool) -> tuple[np.ndarray, ...] | None:
    """Return image ids (D,), category ids (D,), scores (D,) and boxes (D, 4) if all are valid Python numbers.

    None stands for anything else, which `validate_results` then examines one by one.
    """
    count = len(results)
    try:
        images, categories, scores = ([r[key] for r in results] for key in ("image_id", "category_id", "score"))
        rows = np.array([r["bbox"] for r in results]) if boxes and count else np.zeros((count, 4))
        if not set(map(type, images)) | set(map(type, categories)) <= {int} or not set(map(type, scores)) <= {float}:
            return None
        ids = np.array(images, dtype=np.int64), np.array(categories, dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if rows.dtype.kind not in "fi" or rows.shape != (count, 4):
        return None
    rows, numbers = rows.astype(np.float64, copy=False), np.array(scores, dtype=np.float64)
    if not (np.isfinite(numbers).all() and (np.abs(rows) < LARGEST).all() and (rows[:, 2:] >= 0).all()):
        return None
    return *ids, numbers, rows


def _to_plain(result: Result, boxes: bool) -> Result:
    """Convert the numbers of a valid result, of which some may be numpy's, to Python's own."""
    plain = {"image_id": int(result["image_id"]), "category_id": int(result["category_id"])}
    return plain | {"score": float(result["score"])} | ({"bbox": list(map(float, result["bbox"]))} if boxes else {})


def _position(ids: np.ndarray, key: str, known: np.ndarray, source: str) -> np.ndarray:
    """Return the index of each id among the known ids."""
    order = np.argsort(known, kind="stable")
    place = np.searchsorted(known[order], ids)
    is_unknown = place == len(known)
    is_unknown[~is_unknown] = known[order[place[~is_unknown]]] != ids[~is_unknown]
    if is_unknown.any():
        some = ", ".join(map(str, np.unique(ids[is_unknown])[:5].tolist()))
        raise InputError(
            f"{int(is_unknown.sum())} results have an unknown {key}, not in {source}: {some}; "
            "they must be made on the same data"
        )
    return order[place]


def _validate_key(results: Sequence[Result], where: str, key: str, wanted: str, good: Callable[[Any], bool]) -> None:
    for i, result in enumerate(results):
        if not isinstance(result, dict) or key not in result:
            raise InputError(f"{where}: result {i} lacks '{key}', it must be {wanted}")
        if not good(result[key]):
            raise InputError(f"{where}: '{key}' of result {i} must be {wanted}, it is {reprlib.repr(result[key])}")


def _whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def _finite(value: Any) -> bool:
    # a larger int fits no array
    return math.isfinite(value) if isinstance(value, (float, np.floating)) else _whole(value)


def _box(value: Any) -> bool:
    try:
        x, y, w, h = value
        # False for NaN.
        return -LARGEST < x < LARGEST and -LARGEST < y < LARGEST and 0 <= w < LARGEST and 0 <= h < LARGEST
    except (TypeError, ValueError):
        return False


def _drawable(mask: dict[str, Any]) -> bool:
    return is_rle(mask) and count_rle_pixels(mask["counts"]) == math.prod(mask["size"])
