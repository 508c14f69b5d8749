"""Ctrl-C and SIGTERM, delayed until the weights are consistent."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self


class Interrupted(Exception):  # noqa: N818
    """A signal has stopped the training, which can be resumed. `code` is the command line's exit code: 130 or 143."""

    def __init__(self, text: str, number: int = signal.SIGINT) -> None:
        super().__init__(text)
        self.number = number

    @property
    def code(self) -> int:
        """128 plus the signal's number, as shells report it."""
        return 128 + self.number


class Interrupts:
    """Turns Ctrl-C and SIGTERM inside the block into KeyboardInterrupt: at once, or after a `held` section.

    A second Ctrl-C, more than two seconds later, raises at once wherever the training is; a launcher may send the first
    one twice. Outside the main thread, where Python allows no handlers, nothing is changed.

    Attributes:
        agreed: With several processes the end of a held section raises nothing: they must stop at the same step.
        received: The signal's number, 0 until a signal came.
        forced: Whether a second Ctrl-C came.
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
        """Delay the interruption until the section ends."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        self.check()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Raise the interruption at once in a part of a held section, also where the processes should agree on it."""
        try:
            self._held = False
            if self.received:
                raise KeyboardInterrupt
            yield
        finally:
            self._held = True

    def check(self) -> None:
        """Raise the interruption that has come, unless the processes must agree on it."""
        if self.received and not self.agreed:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self._first = number, now
            if self._held:
                return
            self._held = True  # the cleanup on the way out is not disturbed
        elif number != signal.SIGINT or now - self._first < 2:
            return
        else:
            self.forced = True
        raise KeyboardInterrupt
