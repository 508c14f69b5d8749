"""Cleaning of annotations, the last step of every reader: malformed boxes are counted, and dropped where unusable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fusedet.data.dataset import DetectionDataset

NOT_FINITE = "boxes with NaN or infinite coordinates: dropped"
NEGATIVE = "boxes of negative width or height: dropped"
NO_AREA = "boxes without area: not trained on"
OUTSIDE = "boxes wholly outside their image: not trained on"
CLIPPED = "boxes partly outside their image: clipped in training"
REPEATED = "boxes that duplicate another of the same class in the same image: kept"
NO_IMAGE = "annotations of images that are not listed: dropped"
BAD_AREA = "annotated areas that are negative or not finite: width x height taken"
BAD_SEGMENTATION = (
    "segmentations that are neither valid polygons nor an RLE of their image's size: dropped, their boxes kept"
)
SAME_ID = "annotations with a duplicate id: kept"
AS_TEXT = "boxes with quoted numbers: read as numbers"
LISTED_TWICE = "images listed more than once: read once"
NO_LABELS = "images without a label file: background"
NO_ANNOTATION_FILE = "images in the data folder without an annotation file: left out"
NO_IMAGE_FILE = "annotation files without an image: left out"
NO_REGION = "shapes without an area (points, lines): left out"

MARGIN = 0.1  # pixels: a box this far beyond the border is a rounding error
ROUNDING = 1e-6  # pixels: a width or height this close to zero counts as zero


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
    eval_ignore: np.ndarray,
    segmentations: Sequence[bytes],
    source: str | Path,
    dataset_format: str,
    area: np.ndarray | None = None,
    problems: Mapping[str, int] | None = None,
    image_id_texts: Sequence[str] = (),
    category_id_texts: Sequence[str] = (),
) -> DetectionDataset:
    """Build a dataset without the unusable boxes and count all faults.

    The parameters are those of `DetectionDataset.from_arrays`, with two differences: `area` may hold NaN, or be None,
    for width x height, and `problems` holds the faults that the reader has counted itself.
    """
    keep, faults = filter_boxes(image_indices, boxes, labels, sizes)
    kept = boxes[keep]
    kept[:, 2:] = np.maximum(kept[:, 2:], kept[:, :2])
    extent = np.prod(kept[:, 2:] - kept[:, :2], axis=1)
    area = extent if area is None else np.where(np.isnan(area[keep]), extent, area[keep])
    counts = Counter(dict(problems or {})) + faults
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
        eval_ignore=eval_ignore[keep],
        area=area,
        segmentations=segmentations if keep.all() else [segmentations[i] for i in np.flatnonzero(keep).tolist()],
        source=source,
        dataset_format=dataset_format,
        problems={text: int(n) for text, n in counts.items() if n},
        image_id_texts=image_id_texts,
        category_id_texts=category_id_texts,
    )


def filter_boxes(
    image_indices: np.ndarray, boxes: np.ndarray, labels: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, Counter[str]]:
    """Find usable boxes and count the faults of all.

    Args:
        image_indices: (M,) index of each box's image.
        boxes: (M, 4) xyxy in pixels.
        labels: (M,) in 0..K-1.
        sizes: (N, 2) heights and widths of the images.

    Returns:
        (M,) bool, true for usable boxes, and the number of boxes by fault.
    """
    counts: Counter[str] = Counter()
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        extent = boxes[:, 2:] - boxes[:, :2]
        negative = finite & (extent < -ROUNDING).any(axis=1)
        keep = finite & ~negative & np.isfinite(extent.prod(axis=1))
    empty = keep & (extent <= ROUNDING).any(axis=1)
    limits = sizes[image_indices][:, ::-1].astype(np.float64) if len(image_indices) else np.zeros((0, 2))
    away = keep & ~empty & ((boxes[:, :2] >= limits) | (boxes[:, 2:] <= 0)).any(axis=1)
    beyond = ((boxes[:, :2] < -MARGIN) | (boxes[:, 2:] > limits + MARGIN)).any(axis=1)
    counts[NOT_FINITE] = int((~keep & ~negative).sum())
    counts[NEGATIVE] = int(negative.sum())
    counts[NO_AREA] = int(empty.sum())
    counts[OUTSIDE] = int(away.sum())
    counts[CLIPPED] = int((keep & ~empty & ~away & beyond).sum())
    counts[REPEATED] = _count_duplicates(image_indices[keep], labels[keep], boxes[keep])
    return keep, counts


def _count_duplicates(image_indices: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> int:
    """Number of boxes that equal an earlier one in image, class and coordinates."""
    rows = np.column_stack([image_indices, labels, boxes])
    rows = rows[np.lexsort(rows.T)]
    return int((rows[1:] == rows[:-1]).all(axis=1).sum())
