"""Bad boxes counted, dropped where nothing else is possible, and the rest made into DetectionDataset: the end of every reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fusedet.data.dataset import DetectionDataset

NOT_FINITE = "boxes with NaN or infinite coordinates: dropped"
NEGATIVE = "boxes of negative width or height: dropped"
NO_AREA = "boxes of no area: not trained on"
OUTSIDE = "boxes wholly outside their image: not trained on"
CLIPPED = "boxes partly outside their image: clipped in training"
REPEATED = "boxes that repeat another of the same class in the same image: kept"
NO_IMAGE = "annotations of images that are not listed: dropped"
BAD_AREA = "annotated areas that are negative or not finite: width x height taken"
BAD_SEGMENTATION = "segmentations that cannot be drawn (no polygons, no RLE of their image's size, not finite or far away): dropped, their boxes kept"
SAME_ID = "annotations whose id an earlier one has: kept"
AS_TEXT = "boxes with numbers in quotes: read as numbers"
LISTED_TWICE = "images listed more than once: read once"
NO_LABELS = "images without a label file: background"

MARGIN = 0.1  # pixels beyond the border that are rounding, not a fault
ROUNDING = 1e-6  # pixels of width or height, above or below zero, that are none


def build_clean_dataset(
    names: Iterable[str],
    category_ids: Iterable[int],
    *,
    image_ids: np.ndarray,
    sizes: np.ndarray,
    paths: Sequence[str],
    image_indices: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    ignore: np.ndarray,
    segmentations: Sequence[bytes],
    source: str | Path,
    dataset_format: str,
    area: np.ndarray | None = None,
    eval_ignore: np.ndarray | None = None,
    problems: Mapping[str, int] | None = None,
) -> DetectionDataset:
    """DetectionDataset without the boxes that cannot be used, all faults counted; columns as in `DetectionDataset.from_arrays`.

    area (M,) may hold NaN where the file gives none: width x height is taken.
    """
    keep, met = filter_boxes(image_indices, boxes, labels, sizes)
    kept = boxes[keep]
    kept[:, 2:] = np.maximum(kept[:, 2:], kept[:, :2])
    extent = np.prod(kept[:, 2:] - kept[:, :2], axis=1)
    area = extent if area is None else np.where(np.isnan(area[keep]), extent, area[keep])
    counts = Counter(dict(problems or {})) + met
    return DetectionDataset.from_arrays(
        names,
        category_ids,
        image_ids=image_ids,
        sizes=sizes,
        paths=paths,
        image_indices=image_indices[keep],
        boxes=kept,
        labels=labels[keep],
        ignore=ignore[keep],
        eval_ignore=None if eval_ignore is None else eval_ignore[keep],
        area=area,
        segmentations=segmentations if keep.all() else [segmentations[i] for i in np.flatnonzero(keep).tolist()],
        source=source,
        dataset_format=dataset_format,
        problems={text: int(n) for text, n in counts.items() if n},
    )


def filter_boxes(
    image_indices: np.ndarray, boxes: np.ndarray, labels: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, Counter[str]]:
    """Which boxes can be used at all, (M,) bool, and how often each fault was met.

    boxes (M, 4) xyxy pixels; image_indices (M,) index sizes (N, 2), heights and widths.
    """
    met: Counter[str] = Counter()
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        extent = boxes[:, 2:] - boxes[:, :2]
        negative = finite & (extent < -ROUNDING).any(axis=1)
        keep = finite & ~negative & np.isfinite(extent.prod(axis=1))
    empty = keep & (extent <= ROUNDING).any(axis=1)
    limits = sizes[image_indices][:, ::-1].astype(np.float64) if len(image_indices) else np.zeros((0, 2))
    away = keep & ~empty & ((boxes[:, :2] >= limits) | (boxes[:, 2:] <= 0)).any(axis=1)
    beyond = ((boxes[:, :2] < -MARGIN) | (boxes[:, 2:] > limits + MARGIN)).any(axis=1)
    met[NOT_FINITE] = int((~keep & ~negative).sum())
    met[NEGATIVE] = int(negative.sum())
    met[NO_AREA] = int(empty.sum())
    met[OUTSIDE] = int(away.sum())
    met[CLIPPED] = int((keep & ~empty & ~away & beyond).sum())
    met[REPEATED] = _repeats(image_indices[keep], labels[keep], boxes[keep])
    return keep, met


def _repeats(image_indices: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> int:
    """How many rows equal an earlier one in image, class and box."""
    rows = np.column_stack([image_indices, labels, boxes])
    rows = rows[np.lexsort(rows.T)]
    return int((rows[1:] == rows[:-1]).all(axis=1).sum())
