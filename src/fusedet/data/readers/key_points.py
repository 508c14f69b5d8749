"""Key points in YOLO label files: `class cx cy w h` and then the points, as `kpt_shape` of the data.yaml says."""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedet.errors import InputError

_MIN_LINES = 20  # fewer triangles can look like boxes with a key point by chance
_MARGIN = 0.01  # of the image: key points may be annotated just outside their box


def read_key_point_values(data: Mapping[str, Any], file: Path) -> int | None:
    """Return how many values of a line are key points, by `kpt_shape: [points, 2 or 3]`; None for data without them.

    Raises:
        InputError: `kpt_shape` is anything else.
    """
    shape = data.get("kpt_shape")
    if shape is None or shape in ("", "null", "~"):
        return None
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(str(n).isdecimal() and len(n) < 5 for n in shape)
    if not is_shape or int(shape[0]) < 1 or shape[1] not in ("2", "3"):
        raise InputError(f"{file}: 'kpt_shape' must be [number of key points, 2 or 3], not {reprlib.repr(shape)}")
    return int(shape[0]) * int(shape[1])


def require_key_points(count: int, key_points: int, where: str) -> None:
    """Raise InputError for a line that does not hold the class, a box and all key points."""
    if count != 5 + key_points:
        raise InputError(
            f"{where}: {count} values, but with kpt_shape a line is 'class cx cy w h' and {key_points} values of key "
            f"points, {5 + key_points} in all"
        )


def resemble_key_points(lines: Sequence[Sequence[float]]) -> bool:
    """Return whether lines of more than 4 values are rather boxes with key points than polygons.

    All lines then have the same number of values, and all points lie in the box that the first four values are.
    Polygons do not: their second point would be a width and a height around their first.

    Args:
        lines: The values after the class, of all lines with more than four.
    """
    if len(lines) < _MIN_LINES or len(set(map(len, lines))) != 1:
        return False
    values = np.array(lines)
    box, points = values[:, :4], values[:, 4:]
    for step in (2, 3):  # without and with visibility
        if points.shape[1] % step:
            continue
        shaped = points.reshape(len(points), -1, step)
        xy, is_labeled = shaped[:, :, :2], (shaped[:, :, :2] != 0).any(axis=2)
        if step == 3 and not np.isin(shaped[:, :, 2], (0, 1, 2)).all():
            continue
        is_inside = (np.abs(xy - box[:, None, :2]) <= box[:, None, 2:] / 2 + _MARGIN).all(axis=2)
        if is_labeled.any() and (is_inside | ~is_labeled).all():
            return True
    return False
