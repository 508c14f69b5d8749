"""Progress of a command: bars on a terminal only, lines through a function."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def say_nothing(text: str) -> None:
    """Print nothing."""


@contextmanager
def progress_bar(
    console: Console | None, total: int | None, label: str, in_bytes: bool = False
) -> Iterator[Callable[[int], None]]:
    """Show a bar with the time left inside the block, if the console is a terminal.

    Args:
        console: The console.
        total: Number of items; None if it is unknown.
        label: What stands before the bar.
        in_bytes: Whether the items are bytes of a download, whose speed is shown too.

    Yields:
        A function that takes the number of further items that are done.
    """
    if console is None or not console.is_terminal:  # a disabled bar of rich 13 prints an empty line
        yield lambda count: None
        return
    done = (DownloadColumn(), TransferSpeedColumn()) if in_bytes else (MofNCompleteColumn(),)
    columns = (TextColumn(escape(label)), BarColumn(), *done, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield partial(bar.advance, bar.add_task(label, total=total))


def track(items: Iterable[Any], total: int, *, label: str, console: Console | None) -> Iterator[Any]:
    """Yield the items under a progress bar, each one done when the next one is asked for.

    Args:
        items: Any items.
        total: Number of items.
        label: What stands before the bar.
        console: Where the bar is drawn, if it is a terminal; None for nowhere.
    """
    with progress_bar(console, total, label) as advance:
        for item in items:
            yield item
            advance(1)
