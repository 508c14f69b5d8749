"""Times and numbers of steps, as text."""

import re
from dataclasses import dataclass

from fusedet.errors import InputError

SECONDS = {"d": 86400, "h": 3600, "min": 60, "m": 60, "s": 1}
_PART = r"(\d+(?:\.\d+)?) ?(d|h|min|m|s)"


@dataclass(frozen=True)
class Interval:
    """A number of seconds or a number of steps; without both it never ends."""

    seconds: float | None = None
    steps: int | None = None


def to_seconds(text: str) -> float | None:
    """Return the seconds of a time such as 90s, 30min, 2h or 1h30m; None for any other text.

    >>> to_seconds("1h30m")
    5400.0
    """
    if not re.fullmatch(f"({_PART})+", text):
        return None
    return float(sum(float(number) * SECONDS[unit] for number, unit in re.findall(_PART, text)))


def format_duration(seconds: float) -> str:
    """Format seconds for a reader.

    >>> [format_duration(s) for s in (8, 95, 4000, 200000)]
    ['8 s', '2 min', '1 h 7 min', '2 d 7 h']
    """
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours:
        return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min"


def parse_interval(text: object, key: str) -> Interval:
    """Parse an interval.

    Args:
        text: A time as `to_seconds` takes it, a number of steps, or None.
        key: The setting's name, for the message.

    Raises:
        InputError: For any other text.

    >>> parse_interval("30min", "train.checkpoint_every")
    Interval(seconds=1800.0, steps=None)
    >>> parse_interval("500steps", "train.checkpoint_every")
    Interval(seconds=None, steps=500)
    """
    if text is None:
        return Interval()
    if seconds := to_seconds(str(text)):
        return Interval(seconds=seconds)
    if steps := re.fullmatch(r"0*([1-9]\d{0,17})(?:\.0*)? ?steps?", str(text)):
        return Interval(steps=int(steps[1]))
    raise InputError(f"{key}={text} must be a time or a number of steps, such as 90s, 30min, 2h or 500steps")
