"""Metrics, differences and intervals as text."""

import math
from collections.abc import Sequence

from fusedet.evaluation.confidence_intervals import LEVEL


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a value; a dash for None and for what is not finite."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def format_difference(value: float | None, least: int = 3) -> str:
    """Format a difference with its sign and at least `least` decimals; a dash for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:+.{_choose_decimals(least, value)}f}"


def format_interval(ends: Sequence[float | None] | None, least: int = 3, *, signed: bool = False) -> str:
    """Format the ends of an interval with at least `least` decimals; nothing without both ends."""
    known = [end for end in ends or () if end is not None and math.isfinite(end)]
    digits = _choose_decimals(least, *known)
    return " to ".join(f"{end:{'+' * signed}.{digits}f}" for end in known) if len(known) == 2 else ""


def describe_interval(ends: Sequence[float], images: int) -> str:
    """Describe the interval of a difference over images, as conclusions name it."""
    return f"{100 * LEVEL:g} % interval over the {images} images {format_interval(ends, signed=True)}"


def _choose_decimals(least: int, *values: float) -> int:
    """Choose how many decimals to print so that no value but 0 is printed as 0.

    >>> _choose_decimals(3, -0.0004, 0.041), _choose_decimals(2, 0.0, 1.0)
    (4, 2)
    """
    digits = least
    while digits < least + 4 and any(value and not round(value, digits) for value in values):
        digits += 1
    return digits
