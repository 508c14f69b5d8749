"""The progress of a training: a bar on a terminal, lines elsewhere, and the remaining time."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from fusedet.config.interval import format_duration

LINE_SECONDS = 10.0
"""Without a terminal, at most one line of losses is printed in this time."""


@dataclass
class Pace:
    """The seconds that steps (with the wait for their data) and validations took in this run."""

    steps: int = 0
    step_seconds: float = 0.0
    validations: int = 0
    validation_seconds: float = 0.0
    _mark: float = 0.0
    _images: int = 0
    _seconds: float = 0.0

    def start(self) -> None:
        """Start the clock of the steps that follow."""
        self._mark = time.perf_counter()

    def step(self, images: int) -> None:
        """Count a step of so many images."""
        now = time.perf_counter()
        self.steps, self.step_seconds = self.steps + 1, self.step_seconds + now - self._mark
        self._images, self._seconds = self._images + images, self._seconds + now - self._mark
        self._mark = now

    def speed(self) -> float:
        """Return the images per second since the last call."""
        images, seconds = self._images, self._seconds
        self._images, self._seconds = 0, 0.0
        return images / max(seconds, 1e-9)

    @contextlib.contextmanager
    def validation(self) -> Iterator[None]:
        """Time a validation."""
        began = time.perf_counter()
        yield
        self.validations, self.validation_seconds = (
            self.validations + 1,
            self.validation_seconds + time.perf_counter() - began,
        )

    def remaining(self, steps: int, validations: int) -> str:
        """Format the time of so many more steps and validations.

        "over" says that no validation was measured yet.

        >>> Pace(steps=10, step_seconds=20, validations=1, validation_seconds=60).remaining(30, 2)
        '3 min left'
        >>> Pace(steps=10, step_seconds=20).remaining(30, 2)
        'over 60 s left'
        """
        if not self.steps:
            return ""
        seconds = steps * self.step_seconds / self.steps
        if self.validations:
            seconds += validations * self.validation_seconds / self.validations
        unknown = validations > 0 and not self.validations
        return f"{'over ' if unknown else ''}{format_duration(seconds)} left"


class Display:
    """A progress bar per epoch on a terminal, plain lines elsewhere, nothing when quiet."""

    def __init__(self, epochs: int, steps_per_epoch: int, quiet: bool = False, console: Console | None = None) -> None:
        self.epochs, self.steps_per_epoch, self.quiet = epochs, steps_per_epoch, quiet
        self.console = console or Console(quiet=quiet)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[metrics]}"),
        )
        self.bar = Progress(*columns, console=self.console, disable=quiet or not self.console.is_terminal)
        self.task = self.bar.add_task("", total=steps_per_epoch, metrics="")
        self._last_line = -LINE_SECONDS

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self, epoch: int, done: int) -> None:
        """Move the bar to `done` steps of this epoch (from 1)."""
        self.bar.update(self.task, description=f"epoch {epoch}/{self.epochs}", completed=done)

    def show(self, epoch: int, done: int, row: Mapping[str, float], remaining: str) -> None:
        """Show the metrics of a logging interval."""
        metrics = " · ".join([remaining, *(f"{name} {value:.4g}" for name, value in row.items())])
        self.bar.update(self.task, metrics=metrics)
        now = time.monotonic()
        if self.bar.disable and (now - self._last_line >= LINE_SECONDS or done == self.steps_per_epoch):
            self._last_line = now
            self.say(f"epoch {epoch}/{self.epochs}, step {done}/{self.steps_per_epoch}: {metrics}")

    def say(self, text: str) -> None:
        """Print one line, above the bar on a terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
