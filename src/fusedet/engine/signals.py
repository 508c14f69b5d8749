"""Ctrl-C and SIGTERM that wait until the weights are in order."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self


class Interrupted(Exception):  # noqa: N818
    """The training was stopped from outside and can be resumed. `code` is what the command line exits with: 130 or 143."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        """number: the signal."""
        super().__init__(text)
        self.number = number

    @property
    def code(self) -> int:
        """As shells say it: 128 and the signal's number."""
        return 128 + self.number


class Interrupts:
    """Inside the block, Ctrl-C and SIGTERM raise KeyboardInterrupt: at once, but in a `held` section when it is over.

    With `agreed` (several processes) a held section's end raises nothing either: the processes must agree on the step at which they
    stop. `received` is the signal's number, 0 until one came. A second Ctrl-C, more than two seconds later, raises at once wherever the
    training is, and sets `forced`; a launcher may send the first one twice. Outside the main thread, where Python allows no handlers,
    nothing is changed.
    """

    def __init__(self, agreed: bool = False) -> None:
        self.agreed = agreed
        self.received = 0
        self.forced = False
        self._held = agreed
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """A section that ends before the interruption is raised."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        self.check()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """A part of a held section in which the interruption is raised at once, also where it should be agreed upon."""
        try:
            self._held = False
            if self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._held = True

    def check(self) -> None:
        """Raise the interruption that has come, unless it must be agreed upon."""
        if self.received and not self.agreed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = number, now
            if self._held:
                return
            self._held = True  # what cleans up on the way out is not disturbed
        elif number != signal.SIGINT or now - self._first < 2:
            return
        else:
            self.forced = True
        raise KeyboardInterrupt
