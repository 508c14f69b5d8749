"""Tables for the terminal: metrics, two runs side by side, a detector's cost, a dataset's report."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fusedet.data.validation import DatasetReport
from fusedet.errors import format_count
from fusedet.evaluation.formatting import format_difference, format_interval, format_number

MOST_ERRORS = 20
"""Errors of a split that are listed; the others are counted."""


def metrics_table(metrics: Mapping[str, Any], title: str) -> RenderableType:
    """Return AP and AR by object size (of masks too where there are any), then AP per class."""
    table = _table("", "all", "IoU 0.5", "IoU 0.75", "small", "medium", "large", title=title)
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    for kind in ("", "mask_") if "mask_AP" in metrics else ("",):
        name = kind.replace("_", " ")
        table.add_row(f"{name}AP", *(format_number(metrics[kind + k]) for k in names))
        recall = [format_number(metrics[kind + k]) for k in ("AR100", "ARs", "ARm", "ARl")]
        table.add_row(f"{name}AR", recall[0], "", "", *recall[1:])
        for limit in [key.partition("@")[2] for key in metrics if key.startswith(f"{kind}AP@")]:
            table.add_row(f"{name}AP@{limit}", *(format_number(metrics[f"{kind}{k}@{limit}"]) for k in names))
            recall = [format_number(metrics[f"{kind}{k}@{limit}"]) for k in ("AR", "ARs", "ARm", "ARl")]
            table.add_row(f"{name}AR@{limit}", recall[0], "", "", *recall[1:])
    bins = _table("size in pixels", "instances", "AP", "AR")
    for row in metrics.get("size_bins", ()):
        values = map(format_number, (row["AP"], row["AR"]))
        bins.add_row(f"{row['from']:g} to {row['to']:g}", f"{row['objects']:,}", *values)
    extra = [name for name in ("VOC_AP", "VOC_AP_11_point") if name in metrics]
    line = "  ".join(f"{name.replace('_', ' ')} {format_number(metrics[name])}" for name in extra)
    columns = [key for key in (metrics["classes"] or [{}])[0] if key not in ("name", "images", "objects")]
    classes = _table("class", "images", "instances", *(name.replace("_", " ") for name in columns))
    for row in metrics["classes"]:
        values = map(format_number, (row[name] for name in columns))
        classes.add_row(escape(row["name"]), str(row["images"]), str(row["objects"]), *values)
    return Group(table, *([bins] if bins.row_count else []), *([Text(line)] if line else []), classes)


def comparison_table(report: Mapping[str, Any]) -> RenderableType:
    """Return metrics of two runs with the difference's interval, then AP per class, then the error breakdown."""
    level = f"{100 * report['level']:g} % over images"
    rows_by_title = {
        "": [{"name": name} | row for name, row in report["metrics"].items()],
        "class": report["classes"],
    }
    tables = []
    for title, rows in rows_by_title.items():
        table = _table(title, "A", "B", "B - A", level)
        for row in rows:
            _add_difference(table, row["name"], row)
        tables.append(table)
    errors = _table("errors at IoU 0.5", "A", "B", "AP50 lost, A", "B")
    a, b = (report["errors"][side]["types"] for side in "ab")
    for name in a:
        counts = [f"{side[name]['count']:,}" for side in (a, b)]
        errors.add_row(name, *counts, *(format_number(side[name]["dAP"]) for side in (a, b)))
    return Group(Text(f"A: {report['a']}\nB: {report['b']}"), *tables, errors)


def tiles_table(report: Mapping[str, Any]) -> RenderableType:
    """Return metrics without and with tiles and the difference's interval, then the time of an image."""
    tiles, seconds = report["tiles"], report["seconds_per_image"]
    title = f"tiles of {tiles['size']} pixels, {tiles['per_image']:.1f} windows per image"
    table = _table("", "whole", "tiles", "difference", f"{100 * report['level']:g} % over images", title=title)
    for name, row in report["metrics"].items():
        _add_difference(table, name, row)
    times = [f"{1000 * seconds[side]:,.0f} ms" for side in "ab"]
    table.add_row("time per image", *times, f"x {seconds['b'] / seconds['a']:.1f}", "")
    return table


def centers_table(classes: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return per class which share of its objects lies in each quarter of the image."""
    quarters = [name for name in classes[0] if name not in ("name", "objects")]
    table = _table("class", "instances", *quarters)
    for row in classes:
        shares = [f"{100 * row[name] / row['objects']:.1f} %" if row["objects"] else "-" for name in quarters]
        table.add_row(escape(row["name"]), f"{row['objects']:,}", *shares)
    return table


def cost_table(cost: Mapping[str, Any], title: str) -> RenderableType:
    """Return parameters and multiply-adds per part of a detector."""
    height, width = cost["image"]
    title = f"{title}, one image of {height} x {width}"
    table = _table("part", "parameters", "trainable", "multiply-adds (G)", title=title)
    for name, row in [*cost["parts"].items(), ("all", cost)]:
        table.add_row(name, f"{row['parameters']:,}", f"{row['trainable']:,}", f"{row['multiply_adds'] / 1e9:.2f}")
    note = "Multiply-adds of branches (masks, grids) are those of test.max_det detections, the most of an image."
    return Group(table, *([Text(note)] if cost["parts"].get("branches", {}).get("parameters") else []))


def published_weights_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Return a row per name of published weights, and a line that says what the columns are."""
    table = Table()
    for name in ("name", "family", "backbone", "dataset"):
        table.add_column(name, overflow="fold")
    for name in ("box AP", "mask AP", "MB"):
        table.add_column(name, justify="right")
    for name in ("license", "cached"):
        table.add_column(name)
    for row in rows:
        texts = [escape(row[key]) for key in ("name", "family", "backbone", "dataset")]
        precision = ["-" if row[key] is None else f"{row[key]:.1f}" for key in ("box_ap", "mask_ap")]
        cached = "yes" if row["is_cached"] else ""
        table.add_row(*texts, *precision, f"{row['megabytes']:.0f}", row["license"], cached)
    note = "AP in percent, as the weights' source publishes it for the dataset; license of the project that publishes."
    return Group(table, Text(f"{format_count(len(rows), 'name')}. {note}"))


def latency_table(rows: Sequence[Mapping[str, Any]], title: str) -> RenderableType:
    """Return latency, throughput, memory and size of each engine that ran, by number of images at once."""
    several = len({row["model"] for row in rows}) > 1
    times = [f"{part}, ms" for part in ("network", "p95", "processor", "file to boxes", "p95", "processor")]
    names = ["engine", *["model"] * several, "precision", "images", *times, "images/s", "peak MiB", "start s", "MB"]
    table = _table(*names, title=title)
    for row in rows:
        for part in row["batches"]:
            keys = ("p50_ms", "p95_ms", "processor_ms")
            cells = [f"{part[name][key]:,.1f}" for name in ("network", "file") for key in keys]
            peak = "-" if part["peak_MiB"] is None else f"{part['peak_MiB']:,.0f}"
            about = [row["engine"], *[row["model"]] * several, row["precision"], str(part["batch"])]
            size = [f"{row['start_seconds']:.1f}", f"{row['megabytes']:.1f}"]
            table.add_row(*map(escape, about), *cells, f"{part['file']['images_per_second']:.2f}", peak, *size)
    return table


def dataset_table(split: str, report: DatasetReport) -> RenderableType:
    """Return what a split holds, its warnings and its errors."""
    text = [_content(split, report.statistics)] if report.statistics else [f"[bold]{escape(split)}[/]: cannot be read"]
    table = [_table("class", "annotations")] if report.statistics else []
    for name, count in report.statistics.get("classes", {}).items():
        table[0].add_row(escape(name), str(count))
    messages = [f"  [yellow]warning[/] {escape(warning)}" for warning in report.warnings]
    messages += [f"  [red]error[/] {escape(error)}" for error in report.errors[:MOST_ERRORS]]
    if len(report.errors) > MOST_ERRORS:
        messages.append(f"  [red]error[/] and {len(report.errors) - MOST_ERRORS} more")
    return Group(*map(Text.from_markup, text), *table, *map(Text.from_markup, messages))


def _content(split: str, statistics: Mapping[str, Any]) -> str:
    sizes, smallest = statistics["sizes"], statistics.get("smallest")
    images = format_count(statistics["images"], "image")
    annotations = format_count(statistics["annotations"], "annotation")
    text = (
        f"[bold]{escape(split)}[/]: {images} ({statistics['empty_images']} without annotations), {annotations}\n"
        f"  {sizes['small']} small (under 32x32), {sizes['medium']} medium, {sizes['large']} large (96x96 and more); "
        f"{statistics['ignored_annotations']} ignored; at most {statistics['max_annotations_per_image']} in one image"
    )
    if not smallest:
        return text
    w, h = smallest["original"]
    side, image = smallest["network_side"], escape(smallest["image"])
    return f"{text}\n  smallest after the resize: {w:.0f}x{h:.0f} becomes {side:.1f} pixels, in {image}"


def _add_difference(table: Table, name: str, row: Mapping[str, Any]) -> None:
    """Add a row of a metric on both sides, their difference and its interval."""
    interval = format_interval((row["low"], row["high"]), signed=True) or "-"
    change = format_difference(row["difference"])
    table.add_row(escape(name), format_number(row["a"]), format_number(row["b"]), change, interval)


def _table(*columns: str, title: str = "") -> Table:
    """Return an empty table whose first column is text and whose others are numbers."""
    table = Table(title=escape(title) or None, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table
