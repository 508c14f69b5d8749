"""What is read of which videos: names of files and streams, and the part between two times."""

import os
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from fusedet.errors import InputError, require_at_least

EXTENSIONS = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".m2ts", ".m2v", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf"}
    | {".ogv", ".ts", ".vob", ".webm", ".wmv"}
)
"""Extensions of video files, in lower case."""


def is_video_name(name: str) -> bool:
    """Return whether a file name has the extension of a video."""
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def is_stream(source: str) -> bool:
    """Return whether a source is the number of a camera or an address.

    >>> is_stream("0"), is_stream("rtsp://10.0.0.5/door"), is_stream("street.mp4")
    (True, True, False)
    """
    is_address = re.match(r"[a-z][a-z0-9+.-]+://", source, re.IGNORECASE) is not None
    return (source.isdecimal() or is_address) and not os.path.exists(source)


def parse_time(name: str, value: float | str) -> Fraction:
    """Return a time in seconds, given as a number, "12.5", "1:30" or "1:02:03.5".

    Args:
        name: What the time is, for the message.
        value: The time.

    >>> parse_time("--from", "1:30.5")
    Fraction(181, 2)

    Raises:
        InputError: It is negative or something else.
    """
    text = str(value)
    if not re.fullmatch(r"(\d+:){0,2}\d+(\.\d*)?", text):
        raise InputError(f"{name}={value} must be seconds, such as 12.5, or 1:30 or 1:02:03")
    total = Fraction(0)
    for part in text.split(":"):
        total = 60 * total + Fraction(part)
    return total


@dataclass(frozen=True)
class Part:
    """The frames of a video that are read.

    Attributes:
        every: Of each `every` frames, the first one is read.
        start: Seconds from which frames are read.
        end: Seconds before which reading ends, or None for the video's end.
    """

    every: int = 1
    start: Fraction = Fraction(0)
    end: Fraction | None = None

    @classmethod
    def parse(cls, every: int, start: float | str, end: float | str | None) -> Self:
        """Return the part of texts or numbers, which the command line names --every, --from and --to.

        Raises:
            InputError: A value is wrong, or the end is not behind the start.
        """
        require_at_least(1, every=every)
        first, last = parse_time("from", start), None if end is None else parse_time("to", end)
        if last is not None and last <= first:
            raise InputError(f"to={end} must be later than from={start}")
        return cls(every, first, last)

    def holds(self, time: Fraction | None) -> bool:
        """Return whether a time lies in the part; None does not. Sound may begin before time 0."""
        return time is not None and (self.start <= time or not self.start) and (self.end is None or time < self.end)
