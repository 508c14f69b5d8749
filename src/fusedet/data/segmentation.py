"""Objects' segmentations, checked where they come in: polygons and run-length codes that can be drawn into their image."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusedet.data.dataset import pack_segmentation

INVALID = b"?"  # marks a segmentation that cannot be drawn
MAX_COORDINATE = 1e6  # pixels: a line to a point beyond would be walked step by step


def pack_coco_segmentation(segmentation: Any) -> bytes:
    """What a COCO file gives as `segmentation`, as `pack_segmentation` packs it; nothing for no segmentation, BROKEN for one that cannot be drawn."""
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
    """Whether a mapping has the form of a run-length code, plain or in COCO's compressed form; `covered` tells whether it is one."""
    counts, size = segmentation.get("counts"), segmentation.get("size")
    runs = counts if isinstance(counts, list) else []
    return (
        isinstance(counts, str | list)
        and isinstance(size, list)
        and len(size) == 2
        and set(map(type, [*runs, *size])) == {int}
    )


def is_drawable(polygon: Sequence[float]) -> bool:
    """Whether all numbers are finite and none is far away. Raises TypeError where one is no number."""
    return max(polygon) < MAX_COORDINATE and min(polygon) > -MAX_COORDINATE and math.isfinite(sum(polygon))


def fits_image(segmentation: bytes, size: tuple[int, int]) -> bool:
    """Whether a packed segmentation can be drawn into an image of size (height, width): a run-length code must cover it exactly."""
    if segmentation == INVALID:
        return False
    if segmentation[:1] != b"{":
        return True
    rle = json.loads(segmentation)
    return tuple(rle["size"]) == size and count_rle_pixels(rle["counts"]) == size[0] * size[1]


def count_rle_pixels(counts: list[int] | str) -> int | None:
    """How many pixels a run-length code describes, plain or in COCO's compressed form; None where it is no such code."""
    if isinstance(counts, list):
        return sum(counts) if counts and min(counts) >= 0 and max(counts) < 2**31 else None
    try:
        codes = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return None
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    ends = np.flatnonzero(codes & 32 == 0)  # a number's last character
    begins = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - begins + 1
    if lengths.max() > 7:
        return None
    place = np.arange(len(codes)) - np.repeat(begins, lengths)
    runs = np.add.reduceat((codes & 31) << 5 * place, begins)
    runs -= np.where(codes[ends] & 16, 1 << 5 * lengths, 0)
    for first in (1, 2):  # from the fourth on, a run is told by its difference to the one before the last
        runs[first::2] = np.cumsum(runs[first::2])
    return int(runs.sum()) if runs.min() >= 0 and runs.max() < 2**31 else None
