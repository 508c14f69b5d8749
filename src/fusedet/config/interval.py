"""Intervals of time or of steps, as text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fusedet.errors import InputError

SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Interval:
    """A number of seconds or a number of steps."""

    seconds: float | None = None
    steps: int | None = None


def parse_interval(text: object, key: str) -> Interval:
    """Parse an interval.

    Args:
        text: A number with a unit: s, min, h or steps.
        key: The setting's name, for the message.

    Raises:
        InputError: For any other text.

    >>> parse_interval("30min", "train.checkpoint_every")
    Interval(seconds=1800.0, steps=None)
    >>> parse_interval("500steps", "train.checkpoint_every")
    Interval(seconds=None, steps=500)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|steps?)", str(text))
    number, unit = (float(match[1]), match[2]) if match else (0.0, "")
    if unit in SECONDS and number > 0:
        return Interval(seconds=number * SECONDS[unit])
    if unit.startswith("step") and number >= 1 and number.is_integer():
        return Interval(steps=int(number))
    raise InputError(f"{key}={text} must be a time or a number of steps, such as 90s, 30min, 2h or 500steps")
