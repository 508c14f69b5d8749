"""Render a summary as tables of text: for the terminal, Markdown, CSV and the HTML page."""

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table as Terminal

from fusedet.ablation.spec import METRICS
from fusedet.ablation.summary import compared_metrics
from fusedet.ablation.summary_text import (
    Summary,
    collect_notes,
    count_finished,
    describe_cost,
    describe_coverage,
    list_sizes,
)
from fusedet.evaluation.formatting import format_difference, format_interval, format_number

NOT_MEASURED = "not measured"
LABEL_WIDTH = 24  # characters of a row's label that the terminal does not break
CITED = "cited"
COST = "Cost"
SEED_COLUMNS = {"mean": "mean", "low": "seeds_low", "high": "seeds_high"}


class Sheet(NamedTuple):
    """A table of text: title, column names and rows; the first column has the rows' labels."""

    title: str
    head: list[str]
    rows: list[list[str]]


def make_sheets(summary: Summary) -> list[Sheet]:
    """Make the tables of a summary: the metric with its differences, object sizes, all metrics, noise, cost."""
    has_differences = any(row.get("difference") for row in summary["rows"])
    sizes = [make_size_sheet(summary)] if summary["size_bins"] or has_differences else []
    noise = [make_noise_sheet(summary)] if any(row.get("noise") for row in summary["rows"]) else []
    sheets = [make_difference_sheet(summary), *sizes, make_metric_sheet(summary), *noise, make_cost_sheet(summary)]
    return [drop_empty_paper_columns(sheet) for sheet in sheets]


def drop_empty_paper_columns(sheet: Sheet) -> Sheet:
    """Leave out the columns of what a paper prints if no row of the table has a value there."""
    kept = [
        i
        for i, name in enumerate(sheet.head)
        if not re.search("published|paper", name) or any(row[i] not in ("", "-") for row in sheet.rows)
    ]
    head, *rows = ([cells[i] for i in kept] for cells in [sheet.head, *sheet.rows])
    return Sheet(sheet.title, head, rows)


def make_difference_sheet(summary: Summary) -> Sheet:
    """Make the table of the published and measured metric, with both intervals of the difference to the reference."""
    level, name = f"{100 * summary['level']:g} %", summary["metric"]
    own = [row for row in summary["rows"] if not row["cited"]]
    references = {row["reference"] for row in own if row["reference"] != row["label"]}
    incomplete = any(count_finished(row) < summary["seeds"] for row in own)
    head = [
        "row",
        f"{name} published",
        f"{name} measured",
        f"{name}, {level} over seeds",
        f"{name} per seed",
        *(["seeds"] * incomplete),
    ]
    if compared := any(references) or any(row["published_difference"] for row in summary["rows"]):
        head += ["compared with"] if len(references) > 1 else []
        reference = f"'{next(iter(references))}'" if len(references) == 1 and any(references) else "reference"
        head += [
            "published difference",
            f"{name} - {reference}",
            f"difference, {level} over images",
            f"difference, {level} over seeds",
        ]
    rows = []
    for row in summary["rows"]:
        measured = (row.get("measured") or {}).get(name)
        cells = [row["label"], format_number(row["published"].get(name), 1)]
        if row["cited"] or measured is None:
            cells += [CITED if row["cited"] else NOT_MEASURED, "", ""]
        else:
            cells += [
                format_number(measured["mean"], 2),
                format_interval((measured["low"], measured["high"]), 2) or "none",
                " ".join(format_number(value, 2) for value in measured["values"]),
            ]
        if incomplete:
            cells.append("" if row["cited"] else f"{count_finished(row)}/{summary['seeds']}")
        if compared:
            change, reference = (row.get("difference") or {}).get(name), row.get("reference")
            cells += [("" if reference in (None, row["label"]) else reference)] * (len(references) > 1)
            cells.append(format_published_difference(row["published_difference"].get(name)))
            cells += ["", "", ""] if change is None else _format_difference(change)
        rows.append(cells)
    seeds = "means over the seeds that finished" if summary["seeds"] > 1 else "one seed"
    return Sheet(f"{name} in percent, {seeds}", head, rows)


def make_size_sheet(summary: Summary) -> Sheet:
    """Make the table of AP by object size: the mean, and the difference to the reference with both intervals."""
    names, rows = list_sizes(summary["metric"], summary["size_bins"]), []
    for row in summary["rows"]:
        if row["cited"]:
            continue
        cells = [row["label"]]
        for name in names:
            measured, change = ((row.get(key) or {}).get(name) for key in ("measured", "difference"))
            cell = "-" if measured is None else format_number(measured["mean"], 1)
            if measured and change:
                difference, images, seeds = _format_difference(change)
                cell += f": {difference} (images {images}, seeds {seeds})"
            cells.append(cell)
        rows.append(cells)
    by = "by the square root of the area" if summary["size_bins"] else "by object size"
    title = f"AP {by}: mean, and difference to the reference ({100 * summary['level']:g} %)"
    return Sheet(title, ["row", *(name.removeprefix("AP ") for name in names)], rows)


def make_noise_sheet(summary: Summary) -> Sheet:
    """Make the table of the noise between seeds and over images, and of the difference that it lets one see."""
    columns = {
        "seeds": ("runs", 0),
        "between seeds": ("between_seeds", 2),
        "over images": ("over_images", 2),
        "over images, of two seeds' difference": ("of_pairs", 2),
        "visible difference": ("visible_difference", 1),
        "with seeds": ("seeds", 0),
    }
    rows = [
        [row["label"], *(format_number(row["noise"][key], digits) for key, digits in columns.values())]
        for row in summary["rows"]
        if row.get("noise")
    ]
    title = f"Noise of {summary['metric']}: standard deviations of one run in percent"
    return Sheet(title, ["row", *columns], rows)


def make_metric_sheet(summary: Summary) -> Sheet:
    """Make the table of all published or compared metrics, published / measured, or measured if none is published."""
    names = list_shown_metrics(summary)
    is_published = any(row["published"] for row in summary["rows"])
    rows = []
    for row in summary["rows"]:
        measured = row.get("measured") or {}
        pairs = [(row["published"].get(name), (measured.get(name) or {}).get("mean")) for name in names]
        cells = [f"{format_number(a, 1)} / " * is_published + format_number(b, 2) for a, b in pairs]
        rows.append([row["label"], *cells, row["split"] or "-"])
    title = "All metrics in percent" + ", published / measured" * is_published
    return Sheet(title, ["row", *names, "published on"], rows)


def make_cost_sheet(summary: Summary) -> Sheet:
    """Make the table of costs, as published, counted and measured."""
    head = ["row", "#Param paper (M)", "#Param (M)", "multiply-adds (G)", "time paper (ms)"]
    head += ["p50 (ms)", "p95 (ms)", "peak memory (MiB)", "training (images/s)"]
    rows = []
    for row in summary["rows"]:
        cost = row.get("cost") or {}
        speed, training = cost.get("prediction") or {}, cost.get("training") or {}
        none = CITED if row["cited"] else NOT_MEASURED
        counts = [f"{cost['trainable'] / 1e6:.2f}", f"{cost['multiply_adds'] / 1e9:.2f}"] if cost else [none, none]
        values = [speed.get("p50_ms"), speed.get("p95_ms"), speed.get("peak_MiB"), training.get("images_per_second")]
        rows.append(
            [
                row["label"],
                format_number(row["params_M"], 2),
                *counts,
                format_number(row["time_ms"], 1),
                *(none if v is None else f"{v:,.1f}" for v in values),
            ]
        )
    return Sheet(COST, head, rows)


def list_shown_metrics(summary: Summary) -> list[str]:
    """List AP to APl, the metrics compared in the table, and all that its rows publish."""
    also = (
        {name for row in summary["rows"] for name in row["published"]}
        | set(compared_metrics("AP"))
        | set(compared_metrics(summary["metric"]))
    )
    return [name for name in METRICS if name in also]


def format_markdown(summary: Summary) -> str:
    """Format the tables and the conclusions as Markdown."""
    text = [f"# {summary['title']}", "", *([summary["paper"], ""] if summary["paper"] else [])]
    for sheet in make_sheets(summary):
        text += [
            f"## {sheet.title}",
            "",
            _format_line(sheet.head),
            "|" + "---|" * len(sheet.head),
            *map(_format_line, sheet.rows),
            "",
        ]
        text += [describe_cost(summary), ""] if sheet.title == COST else []
    text += [
        "## Conclusions",
        "",
        *(
            f"- **{_escape_markdown(row['label'])}**: {row['conclusion']}"
            for row in summary["rows"]
            if not row["cited"]
        ),
    ]
    text += [
        "",
        "## What the intervals cover",
        "",
        *(f"- {line}" for line in [*describe_coverage(summary), *map(_escape_markdown, collect_notes(summary))]),
        "",
    ]
    return "\n".join(text)


def format_csv(summary: Summary) -> str:
    """Format one line per row and one column per value; cells without a value are empty."""
    names = [*list_shown_metrics(summary), *summary["size_bins"]]
    changes = compared_metrics(summary["metric"], summary["size_bins"])
    lines = []
    for row in summary["rows"]:
        line = {"row": row["label"], "cited": row["cited"]}
        line["seeds_finished"] = None if row["cited"] else count_finished(row)
        line |= {f"published_{name}": row["published"].get(name) for name in list_shown_metrics(summary)}
        line |= {"published_params_M": row["params_M"], "published_time_ms": row["time_ms"]}
        for name in names:
            measured = (row.get("measured") or {}).get(name) or {}
            line |= {f"{name}_{end}": measured.get(key) for key, end in SEED_COLUMNS.items()}
            line[f"{name}_per_seed"] = " ".join(map(repr, measured.get("values", ())))
        line["reference"] = row.get("reference")
        line |= {f"published_{name}_difference": row["published_difference"].get(name) for name in changes}
        for name in changes:
            change = (row.get("difference") or {}).get(name) or {}
            line[f"{name}_difference"] = change.get("value")
            for what in ("images", "seeds"):
                ends = change.get(f"over_{what}") or (None, None)
                line |= {f"{name}_difference_{what}_{end}": value for end, value in zip(("low", "high"), ends)}
        cost = row.get("cost") or {}
        line |= {name: cost.get(name) for name in ("trainable", "multiply_adds")}
        line |= {name: (cost.get("prediction") or {}).get(name) for name in ("p50_ms", "p95_ms", "peak_MiB")}
        line["train_images_per_second"] = (cost.get("training") or {}).get("images_per_second")
        lines.append(line | {"conclusion": row.get("conclusion")})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def sheet_table(sheet: Sheet) -> Terminal:
    """Make a table for the terminal; in a narrow one, long labels are folded and words of the head stay whole."""
    table = Terminal(title=escape(sheet.title), title_justify="left")
    for i, name in enumerate(sheet.head):
        widest = max(len(row[0]) for row in sheet.rows)
        least = max(map(len, name.split())) if i else min(widest, LABEL_WIDTH)
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold", min_width=least)
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    return table


def format_published_difference(value: float | None) -> str:
    """Format a published difference with its sign and its own decimals, at least one."""
    return "-" if value is None else f"{value:+.1f}" if abs(value - round(value, 1)) < 1e-6 else f"{value:+.2f}"


def _format_difference(change: Summary) -> list[str]:
    """Format a measured difference and its intervals over images and over seeds."""
    intervals = (format_interval(change[f"over_{what}"], 2, signed=True) or "none" for what in ("images", "seeds"))
    return [format_difference(change["value"], 2), *intervals]


def _format_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape_markdown, cells)) + " |"


def _escape_markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
