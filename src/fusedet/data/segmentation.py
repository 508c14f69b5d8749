"""Validation of COCO segmentations: polygons and run-length encodings (RLE)."""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedet.data.dataset import pack_segmentation, unpack_segmentation

INVALID = b"?"  # the packed form of a malformed segmentation
MAX_COORDINATE = 1e6  # pixels: the rasterizer walks every line pixel by pixel, so a distant point would hang it


def pack_coco_segmentation(segmentation: Any) -> bytes:
    """Pack the `segmentation` of a COCO annotation: no bytes for an empty one, INVALID for a malformed one."""
    if isinstance(segmentation, dict):
        return (
            pack_segmentation({"size": segmentation["size"], "counts": segmentation["counts"]})
            if is_rle(segmentation)
            else INVALID
        )
    if not isinstance(segmentation, list):
        return INVALID
    try:
        good = all(
            type(polygon) is list and len(polygon) >= 6 and len(polygon) % 2 == 0 and is_drawable(polygon)
            for polygon in segmentation
        )
        return (pack_segmentation(segmentation) if segmentation else b"") if good else INVALID
    except (TypeError, OverflowError):
        return INVALID


def is_rle(segmentation: dict[str, Any]) -> bool:
    """Return whether a mapping has the keys and types of an RLE; `count_rle_pixels` checks its values."""
    counts, size = segmentation.get("counts"), segmentation.get("size")
    runs = counts if isinstance(counts, list) else []
    return (
        isinstance(counts, str | list)
        and isinstance(size, list)
        and len(size) == 2
        and set(map(type, [*runs, *size])) == {int}
    )


def is_drawable(polygon: Sequence[float]) -> bool:
    """Return whether all coordinates are finite and below MAX_COORDINATE.

    Raises:
        TypeError: A coordinate is not a number.
    """
    return max(polygon) < MAX_COORDINATE and min(polygon) > -MAX_COORDINATE and math.isfinite(sum(polygon))


def bound_segmentation(segmentation: bytes) -> list[float] | None:
    """Return the bounding box [x, y, width, height] of a packed segmentation; None for a malformed or empty one."""
    if not segmentation or segmentation == INVALID:
        return None
    value = unpack_segmentation(segmentation)
    if isinstance(value, dict):
        if count_rle_pixels(value["counts"]) != value["size"][0] * value["size"][1]:
            return None
        from faster_coco_eval.core import mask as coco_mask

        rle = value if isinstance(value["counts"], str) else coco_mask.frPyObjects(value, *value["size"])
        x, y, width, height = np.asarray(coco_mask.toBbox(rle)).ravel().tolist()
        return [x, y, width, height]
    points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in value])
    (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def fits_image(segmentation: bytes, size: tuple[int, int]) -> bool:
    """Return whether a packed segmentation fits an image of size (height, width): an RLE must cover it exactly."""
    if segmentation == INVALID:
        return False
    if segmentation[:1] != b"{":
        return True
    rle = json.loads(segmentation)
    return tuple(rle["size"]) == size and count_rle_pixels(rle["counts"]) == size[0] * size[1]


def count_rle_pixels(counts: list[int] | str) -> int | None:
    """Count the pixels that the `counts` of an RLE cover, plain or compressed; None where they are malformed."""
    if isinstance(counts, list):
        return sum(counts) if counts and min(counts) >= 0 and max(counts) < 2**31 else None
    try:
        codes = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)  # the last character of each number
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > 7:
        return None
    position = np.arange(len(codes)) - np.repeat(begins, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * position, begins)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):  # from the fourth on, a run is stored as its difference to the last but one
        runs[first::2] = np.cumsum(runs[first::2])
    return int(runs.sum()) if runs.min() >= 0 and runs.max() < 2**31 else None
