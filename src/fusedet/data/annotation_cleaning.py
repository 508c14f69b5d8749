"""Cleaning of annotations, the last step of every reader: malformed boxes are counted, and dropped where unusable."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

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
SAME_FILE = "image files that are listed under several ids: kept, each with the annotations of its id"
NO_LABELS = "images without a label file: background"
KEY_POINTS = "annotations with key points: the key points left out, the boxes kept"
LIKE_KEY_POINTS = "polygons that look like a box and key points: set kpt_shape in the yaml if they are"
NO_IMAGE_FILE = "annotation files without an image: left out"
NO_ANNOTATION_FILE = "images in the data folder without an annotation file: left out"
SHARED_LABELS = "label files that belong to several images, which differ in their extension only: used for each"
SAME_STEM = "images whose names differ in their extension only: one of them taken"
UNREAD = "images of a format that is not read ({extension}): left out"
UNREAD_HEIF = "images of a format that is read where pillow-heif is installed ({extension}): left out"
NO_REGION = "shapes without an area (points, lines): left out"

HARMLESS = frozenset({NO_LABELS, KEY_POINTS})
"""Problems that are usually as they should be."""

_ADVICE = {
    NOT_FINITE: "correct or remove them",
    NEGATIVE: "does the tool write x, y, width, height in another order?",
    NO_AREA: "correct or remove them",
    OUTSIDE: "do they belong to these images, at this size?",
    CLIPPED: "correct them where they are far outside",
    REPEATED: "remove the duplicates",
    NO_IMAGE: "add the images, or remove the annotations",
    BAD_AREA: "remove the areas",
    BAD_SEGMENTATION: "correct them for a detector with masks",
    SAME_ID: "give each annotation its own id",
    AS_TEXT: "write numbers without quotes",
    LISTED_TWICE: "list each image once",
    SAME_FILE: "give the annotations of a file one image id: objects of the others are background to it",
    NO_LABELS: "nothing, if they show no object",
    KEY_POINTS: "nothing: a detector learns the boxes",
    LIKE_KEY_POINTS: "set kpt_shape in the yaml if they are key points",
    NO_IMAGE_FILE: "add the images, or remove these files",
    NO_ANNOTATION_FILE: "annotate them, or remove them",
    SHARED_LABELS: "rename one of the images",
    SAME_STEM: "rename one of the images",
    UNREAD: "convert them to PNG or JPEG",
    UNREAD_HEIF: "pip install pillow-heif",
    NO_REGION: "draw rectangles or polygons where they are objects",
}

MARGIN = 0.1  # pixels: a box this far beyond the border is a rounding error
ROUNDING = 1e-6  # pixels: a width or height this close to zero counts as zero


def advise(problem: str) -> str:
    """Return what to do about a problem, a key of `DetectionDataset.problems`; "" where nothing is known.

    >>> advise("images listed more than once: read once")
    'list each image once'
    """
    return _ADVICE.get(re.sub(r"\(\.\w+\)", "({extension})", problem), "")


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
    examples: Mapping[str, str] | None = None,
    image_id_texts: Sequence[str] = (),
    category_id_texts: Sequence[str] = (),
) -> DetectionDataset:
    """Build a dataset without the unusable boxes and count all faults.

    The parameters are those of `DetectionDataset.from_arrays`, with two differences: `area` may hold NaN, or be None,
    for width x height, and `problems` and `examples` hold the faults that the reader has counted itself.
    """
    keep, faults = find_faults(image_indices, boxes, labels, sizes)
    kept = boxes[keep]
    kept[:, 2:] = np.maximum(kept[:, 2:], kept[:, :2])
    extent = np.prod(kept[:, 2:] - kept[:, :2], axis=1)
    area = extent if area is None else np.where(np.isnan(area[keep]), extent, area[keep])
    faulty = {
        text: torch.from_numpy(np.column_stack([image_indices[is_faulty], labels[is_faulty]]).astype(np.int64))
        for text, is_faulty in faults.items()
        if is_faulty.any()
    }
    counts = dict(problems or {}) | {text: len(rows) for text, rows in faulty.items()}
    firsts = {text: paths[int(rows[0, 0])] for text, rows in faulty.items()}
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
        examples=dict(examples or {}) | firsts,
        faulty=faulty,
        image_id_texts=image_id_texts,
        category_id_texts=category_id_texts,
    )


def find_faults(
    image_indices: np.ndarray, boxes: np.ndarray, labels: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Find the boxes that can be kept, and the faults of all.

    Args:
        image_indices: (M,) index of each box's image.
        boxes: (M, 4) xyxy in pixels.
        labels: (M,) in 0..K-1.
        sizes: (N, 2) heights and widths of the images.

    Returns:
        (M,) bool, true for boxes that are kept, and (M,) bool by fault.
    """
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        extent = boxes[:, 2:] - boxes[:, :2]
        negative = finite & (extent < -ROUNDING).any(axis=1)
        keep = finite & ~negative & np.isfinite(extent.prod(axis=1))
    empty = keep & (extent <= ROUNDING).any(axis=1)
    limits = sizes[image_indices][:, ::-1].astype(np.float64) if len(image_indices) else np.zeros((0, 2))
    away = keep & ~empty & ((boxes[:, :2] >= limits) | (boxes[:, 2:] <= 0)).any(axis=1)
    beyond = ((boxes[:, :2] < -MARGIN) | (boxes[:, 2:] > limits + MARGIN)).any(axis=1)
    return keep, {
        NOT_FINITE: ~keep & ~negative,
        NEGATIVE: negative,
        NO_AREA: empty,
        OUTSIDE: away,
        CLIPPED: keep & ~empty & ~away & beyond,
        REPEATED: keep & _find_duplicates(image_indices, labels, boxes),
    }


def _find_duplicates(image_indices: np.ndarray, labels: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(M,) bool, true for boxes that equal an earlier one in image, class and coordinates."""
    rows = np.column_stack([image_indices, labels, boxes])
    order = np.lexsort(rows.T)
    is_repeated = np.zeros(len(rows), dtype=bool)
    is_repeated[order[1:]] = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
    return is_repeated
