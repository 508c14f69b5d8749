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
    """The training was stopped from outside and can be resumed. The command line exits with 130."""


class Interrupts:
    """Inside the block, Ctrl-C and SIGTERM raise KeyboardInterrupt, but not before a `held` section is over.

    With `agreed` (several processes) the signal only sets `requested`: the processes must agree on the step at which they stop.
    A second signal, more than two seconds later, always raises; a launcher may send the first one twice.
    Outside the main thread, where Python allows no handlers, nothing is changed.
    """

    def __init__(self, agreed: bool = False) -> None:
        self.agreed = agreed
        self.requested = False
        self._held = False
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
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.requested and not self.agreed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first = True, now
            if self._held or self.agreed:
                return
        elif now - self._first < 2:
            return
        raise KeyboardInterrupt
