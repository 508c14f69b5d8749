"""Tables for the terminal: figures of a split, two runs side by side, a detector's cost, a doctor's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusedet.data.validation import DatasetReport
from fusedet.errors import plural
from fusedet.evaluation.confidence_intervals import decimals


def score(console: Console, figures: dict[str, Any], title: str) -> None:
    """AP and AR by object size, of masks too where there are any, then AP per class."""
    table = Table(title=escape(title), title_justify="left")
    for name in ("", "all", "IoU 0.5", "IoU 0.75", "small", "medium", "large"):
        table.add_column(name, justify="left" if not name else "right")
    for kind in ("", "mask_") if "mask_AP" in figures else ("",):
        name = kind.replace("_", " ")
        table.add_row(f"{name}AP", *(number(figures[kind + k]) for k in ("AP", "AP50", "AP75", "APs", "APm", "APl")))
        table.add_row(
            f"{name}AR",
            number(figures[f"{kind}AR100"]),
            "",
            "",
            *(number(figures[kind + k]) for k in ("ARs", "ARm", "ARl")),
        )
    console.print(table)
    extra = [name for name in ("VOC_AP", "VOC_AP_11_point") if name in figures]
    if extra:
        console.print("  ".join(f"{name.replace('_', ' ')} {number(figures[name])}" for name in extra))
    columns = ["AP", "AP50", *(["mask_AP", "mask_AP50"] if "mask_AP" in figures else []), *extra]
    classes = Table()
    for name in ("class", "images", "objects", *columns):
        classes.add_column(name.replace("_", " "), justify="left" if name == "class" else "right")
    for row in figures["classes"]:
        classes.add_row(
            escape(row["name"]), str(row["images"]), str(row["objects"]), *(number(row[k]) for k in columns)
        )
    console.print(classes)


def comparison(console: Console, found: dict[str, Any]) -> None:
    """Figures of two runs side by side with the difference's interval, then per class, then the errors by kind."""
    level = f"{100 * found['level']:g} % over images"
    console.print(f"A: {escape(found['a'])}\nB: {escape(found['b'])}")
    for title, rows in (
        ("", [{"name": name} | found["figures"][name] for name in found["figures"]]),
        ("class", found["classes"]),
    ):
        table = Table()
        for name in (title, "A", "B", "B - A", level):
            table.add_column(name, justify="left" if name == title else "right")
        for row in rows:
            digits = decimals(row["difference"], row["low"], row["high"], least=3)
            ends = "-" if math.isnan(row["low"]) else f"{row['low']:+.{digits}f} to {row['high']:+.{digits}f}"
            change = "-" if math.isnan(row["difference"]) else f"{row['difference']:+.{digits}f}"
            table.add_row(escape(row["name"]), number(row["a"]), number(row["b"]), change, ends)
        console.print(table)
    table = Table()
    for name in ("errors at IoU 0.5", "A", "B", "AP50 lost, A", "B"):
        table.add_column(name, justify="left" if name.startswith("errors") else "right")
    one, other = (found["errors"][side]["kinds"] for side in "ab")
    for kind in one:
        values = [f"{side[kind]['count']:,}" for side in (one, other)] + [
            number(side[kind]["dAP"]) for side in (one, other)
        ]
        table.add_row(kind, *values)
    console.print(table)


def centres(console: Console, classes: list[dict[str, Any]]) -> None:
    """Per class, what share of its objects lies in each quarter of the image."""
    quarters = [name for name in classes[0] if name not in ("name", "annotations")]
    table = Table()
    for name in ("class", "annotations", *quarters):
        table.add_column(name, justify="left" if name == "class" else "right")
    for row in classes:
        shares = [f"{100 * row[name] / row['annotations']:.1f} %" if row["annotations"] else "-" for name in quarters]
        table.add_row(escape(row["name"]), f"{row['annotations']:,}", *shares)
    console.print(table)


def cost(console: Console, figures: dict[str, Any], title: str) -> None:
    """Parameters and multiply-adds per part."""
    height, width = figures["image"]
    table = Table(title=f"{escape(title)}, one image of {height} x {width}", title_justify="left")
    for name in ("part", "parameters", "trainable", "multiply-adds (G)"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, row in [*figures["parts"].items(), ("all", figures)]:
        table.add_row(name, f"{row['parameters']:,}", f"{row['trainable']:,}", f"{row['multiply_adds'] / 1e9:.2f}")
    console.print(table)
    if figures["parts"].get("branches", {}).get("parameters"):
        console.print("Multiply-adds of branches (masks, grids) depend on what is found, and are not counted.")


def report(console: Console, split: str, found: DatasetReport) -> None:
    """What a doctor found in a split."""
    if not found.statistics:
        console.print(f"[bold]{escape(split)}[/]: cannot be read")
    else:
        _content(console, split, found.statistics)
    for text in found.warnings:
        console.print(f"  [yellow]warning[/] {escape(text)}")
    for text in found.errors[:20]:
        console.print(f"  [red]error[/] {escape(text)}")
    if len(found.errors) > 20:
        console.print(f"  [red]error[/] and {len(found.errors) - 20} more")


def _content(console: Console, split: str, figures: dict[str, Any]) -> None:
    sizes, empty = figures["sizes"], figures["empty_images"]
    images, annotations = plural(figures["images"], "image"), plural(figures["annotations"], "annotation")
    console.print(f"[bold]{escape(split)}[/]: {images} ({empty} without annotations), {annotations}")
    console.print(
        f"  {sizes['small']} small (under 32x32), {sizes['medium']} medium, {sizes['large']} large (96x96 and more); "
        f"{figures['ignored_annotations']} ignored; at most {figures['max_annotations_per_image']} in one image"
    )
    if small := figures.get("smallest"):
        w, h = small["original"]
        console.print(
            f"  smallest after the resize: {w:.0f}x{h:.0f} becomes {small['network_side']:.1f} pixels, in {escape(small['image'])}"
        )
    table = Table("class", "annotations")
    for name, count in figures["classes"].items():
        table.add_row(escape(name), str(count))
    console.print(table)


def number(value: float | None) -> str:
    """Three digits, or a dash where there is no figure."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def track(console: Console, items: Iterable[Any], total: int, text: str) -> Iterator[Any]:
    """The same items with a progress bar where there is a terminal."""
    with progress(console, total, text) as advance:
        for item in items:
            yield item
            advance(1)


@contextmanager
def progress(console: Console, total: int, text: str, hidden: bool = False) -> Iterator[Callable[[int], None]]:
    """A progress bar that is told how many more are done; none where the output is no terminal, or `hidden`."""
    columns = (TextColumn(escape(text)), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task(text, total=total)
        yield lambda done: bar.advance(task, done)
