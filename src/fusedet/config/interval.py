"""How often: a time or a number of steps, as text."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fusedet.errors import InputError

SECONDS = {"s": 1, "min": 60, "h": 3600}


@dataclass(frozen=True)
class Interval:
    """Either so many seconds or so many steps."""

    seconds: float | None = None
    steps: int | None = None


def interval(text: object, key: str) -> Interval:
    """What `text` says. Raises InputError that names the key.

    >>> interval("30min", "train.checkpoint_every")
    Interval(seconds=1800.0, steps=None)
    >>> interval("500steps", "train.checkpoint_every")
    Interval(seconds=None, steps=500)
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|min|h|steps?)", str(text))
    number, unit = (float(found[1]), found[2]) if found else (0.0, "")
    if unit in SECONDS and number > 0:
        return Interval(seconds=number * SECONDS[unit])
    if unit.startswith("step") and number >= 1 and number.is_integer():
        return Interval(steps=int(number))
    raise InputError(f"{key}={text} must be a time or a number of steps, such as 90s, 30min, 2h or 500steps")
