"""What dense heads ask of their numbers; each raises InputError."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fusedet.errors import InputError


def focal(alpha: float, gamma: float, prior: float) -> None:
    """The weight and the exponent of a focal loss, and the score that every place starts with."""
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha} must be 0 to 1")
    if not 0 <= gamma < math.inf:
        raise InputError(f"gamma={gamma} must be 0 or more")
    if not 0 < prior < 1:
        raise InputError(f"prior={prior} must be above 0 and below 1")


def overlaps(positive: float, negative: float) -> None:
    """The overlaps of an assignment."""
    if not 0 <= negative <= positive <= 1:
        raise InputError(f"negative={negative}, positive={positive} must be overlaps, 0 <= negative <= positive <= 1")


def anchors(scale_name: str, scale: float, ratios: Sequence[float]) -> None:
    """An anchor's side in strides, by the name of its option, and height / width of each."""
    above_zero(scale_name, scale)
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise InputError(f"ratios={list(ratios)} must be one or more numbers above 0")


def above_zero(key: str, strides: float) -> None:
    """A length in strides."""
    if not 0 < strides < math.inf:
        raise InputError(f"{key}={strides} must be above 0, in strides")
