"""Progress of a command, as functions of `fusedet.api` report it: by default nothing is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]
"""Takes the number of further items that are done."""
ShowProgress = Callable[[int, str], AbstractContextManager[Advance]]
"""Takes the number of items and a label; gives a context in which progress is shown."""


@contextmanager
def no_progress(total: int, label: str) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda done: None


def say_nothing(text: str) -> None:
    """Print nothing."""


def progress_bar(console: Console | None = None) -> ShowProgress:
    """Return what shows a bar with the time left, on a terminal only.

    >>> fusedet.validate("runs/a", progress=progress_bar())  # doctest: +SKIP
    """
    target = console or Console()

    @contextmanager
    def show(total: int, label: str) -> Iterator[Advance]:
        columns = (TextColumn(escape(label)), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=target, transient=True, disable=not target.is_terminal) as bar:
            task = bar.add_task(label, total=total)
            yield lambda done: bar.advance(task, done)

    return show


def track(progress: ShowProgress, items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """Yield the items and report each one as done when the next one is asked for."""
    with progress(total, label) as advance:
        for item in items:
            yield item
            advance(1)
