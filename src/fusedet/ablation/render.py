"""A summary as tables of text: for the terminal, for Markdown, for a spreadsheet, and for the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Terminal

from fusedet.ablation.estimate import format_duration
from fusedet.ablation.summary import MEASURED, compared_metrics
from fusedet.ablation.summary_text import collect_notes, count_finished, describe_cost, describe_coverage
from fusedet.evaluation.confidence_intervals import choose_decimals

Found = Mapping[str, Any]
NOTHING = "not measured"
UNBOUND = 1000  # characters of a line where no terminal breaks it
LABEL = 24  # characters of a row's label that are not broken in the terminal
CITED = "cited"
COST = "Cost"


class Sheet(NamedTuple):
    """A table of text: what it shows, its head and its rows; the first column holds the rows' labels."""

    title: str
    head: list[str]
    rows: list[list[str]]


def make_sheets(found: Found) -> list[Sheet]:
    """The tables of a summary: its figure with its differences, all figures, cost."""
    return [make_difference_sheet(found), make_metric_sheet(found), make_cost_sheet(found)]


def make_difference_sheet(found: Found) -> Sheet:
    """The table's figure as published and as measured, with both intervals of the difference to each row's reference."""
    level, name = f"{100 * found['level']:g} %", found["figure"]
    own = [row for row in found["rows"] if not row["cited"]]
    references = {row["reference"] for row in own}
    partial = any(count_finished(row) < found["seeds"] for row in own)
    head = [
        "row",
        f"{name} published",
        f"{name} measured",
        f"{name}, {level} over seeds",
        f"{name} per seed",
        *(["seeds"] * partial),
    ]
    if compared := any(references) or any(row["published_difference"] for row in found["rows"]):
        head += ["compared with"] if len(references) > 1 else []
        less = f"{name} less '{next(iter(references))}'" if len(references) == 1 else f"{name} less that"
        head += ["published difference", less, f"difference, {level} over images", f"difference, {level} over seeds"]
    rows = []
    for row in found["rows"]:
        one = (row.get("measured") or {}).get(name)
        cells = [row["label"], format_number(row["published"].get(name))]
        if row["cited"] or one is None:
            cells += [CITED if row["cited"] else NOTHING, "", ""]
        else:
            cells += [
                format_number(one["mean"], 2),
                format_interval((one["low"], one["high"])),
                " ".join(format_number(value, 2) for value in one["values"]),
            ]
        if partial:
            cells.append("" if row["cited"] else f"{count_finished(row)}/{found['seeds']}")
        if compared:
            change, reference = (row.get("difference") or {}).get(name), row.get("reference")
            cells += [("" if reference in (None, row["label"]) else reference)] * (len(references) > 1)
            cells.append(format_published_difference(row["published_difference"].get(name)))
            cells += (
                ["", "", ""]
                if change is None
                else [
                    format_difference(change["value"]),
                    *(format_interval(change[f"over_{what}"], signed=True) for what in ("images", "seeds")),
                ]
            )
        rows.append(cells)
    seeds = "means over the seeds that finished" if found["seeds"] > 1 else "one seed"
    return Sheet(f"{name} in percent, {seeds}", head, rows)


def make_metric_sheet(found: Found) -> Sheet:
    """Every figure that is printed or shown, published / measured."""
    names = list_shown_metrics(found)
    rows = []
    for row in found["rows"]:
        measured = row.get("measured") or {}
        pairs = [(row["published"].get(name), (measured.get(name) or {}).get("mean")) for name in names]
        rows.append(
            [row["label"], *(f"{format_number(a)} / {format_number(b, 2)}" for a, b in pairs), row["split"] or "-"]
        )
    return Sheet("All figures in percent, published / measured", ["row", *names, "published on"], rows)


def make_cost_sheet(found: Found) -> Sheet:
    """What each row costs, as printed and as counted and measured."""
    head = ["row", "#Param paper (M)", "#Param (M)", "multiply-adds (G)", "time paper (ms)"]
    head += ["p50 (ms)", "p95 (ms)", "peak memory (MiB)", "training (images/s)"]
    rows = []
    for row in found["rows"]:
        cost = row.get("cost") or {}
        speed, training = cost.get("prediction") or {}, cost.get("training") or {}
        none = CITED if row["cited"] else NOTHING
        counts = [f"{cost['trainable'] / 1e6:.2f}", f"{cost['multiply_adds'] / 1e9:.2f}"] if cost else [none, none]
        values = [speed.get("p50_ms"), speed.get("p95_ms"), speed.get("peak_MiB"), training.get("images_per_second")]
        rows.append(
            [
                row["label"],
                format_number(row["params_M"], 2),
                *counts,
                format_number(row["time_ms"]),
                *(none if v is None else f"{v:,.1f}" for v in values),
            ]
        )
    return Sheet(COST, head, rows)


def make_plan_sheet(rows: Sequence[Found], classes: int, seeds: int) -> Sheet:
    """The rows of a dry run: label, published, params_M, time_ms, trainable, multiply_adds, left (runs) and seconds (of them, or None)."""
    names = [
        name
        for name in (*MEASURED, *(f"delta_{name}" for name in MEASURED))
        if any(name in row["published"] for row in rows)
    ]
    timed = any(row["seconds"] is not None for row in rows)
    printed_time = any(row["time_ms"] is not None for row in rows)
    head = [
        "row",
        *(name.replace("delta_", "Δ") for name in names),
        "#Param paper (M)",
        "#Param (M)",
        "multiply-adds (G)",
    ]
    head += [*(["time paper (ms)"] * printed_time), "runs to do", *(["estimate"] * timed)]
    lines = []
    for row in rows:
        cells = [
            row["label"],
            *(format_number(row["published"].get(name)) for name in names),
            format_number(row["params_M"], 2),
        ]
        if row["trainable"] is None:
            cells += [CITED, CITED]
        else:
            cells += [f"{row['trainable'] / 1e6:.2f}", f"{row['multiply_adds'] / 1e9:.2f}"]
        cells += [format_number(row["time_ms"])] * printed_time
        cells += ["-" if row["left"] is None else str(row["left"])]
        cells += [("-" if row["seconds"] is None else format_duration(row["seconds"]))] * timed
        lines.append(cells)
    return Sheet(
        f"Published figures in percent; counted with {classes} classes; {seeds} seed{'s' * (seeds > 1)} per row",
        head,
        lines,
    )


def list_shown_metrics(found: Found) -> list[str]:
    """AP to APl, the table's own figure with those of its kind, and what else the table's rows print."""
    also = (
        {name for row in found["rows"] for name in row["published"]}
        | set(compared_metrics("AP"))
        | set(compared_metrics(found["figure"]))
    )
    return [name for name in MEASURED if name in also]


def format_markdown(found: Found) -> str:
    """The tables and the conclusions as Markdown."""
    text = [f"# {found['title']}", "", *([found["paper"], ""] if found["paper"] else [])]
    for sheet in make_sheets(found):
        text += [
            f"## {sheet.title}",
            "",
            _line(sheet.head),
            "|" + "---|" * len(sheet.head),
            *map(_line, sheet.rows),
            "",
        ]
        text += [describe_cost(found), ""] if sheet.title == COST else []
    text += [
        "## What can be concluded",
        "",
        *(f"- **{_safe(row['label'])}**: {row['conclusion']}" for row in found["rows"] if not row["cited"]),
    ]
    text += [
        "",
        "## What the figures cover",
        "",
        *(f"- {line}" for line in [*describe_coverage(found), *map(_safe, collect_notes(found))]),
        "",
    ]
    return "\n".join(text)


def format_csv(found: Found) -> str:
    """One line per row with every figure in a column of its own; empty where nothing was printed or measured."""
    text = io.StringIO(newline="")
    names = list_shown_metrics(found)
    changes = compared_metrics(found["figure"])
    columns = [
        "row",
        "cited",
        "seeds_finished",
        *(f"published_{name}" for name in names),
        "published_params_M",
        "published_time_ms",
    ]
    for name in names:
        columns += [f"{name}_mean", f"{name}_seeds_low", f"{name}_seeds_high", f"{name}_per_seed"]
    columns += ["reference", *(f"published_{name}_difference" for name in changes)]
    for name in changes:
        columns += [
            f"{name}_difference",
            *(f"{name}_difference_{what}_{end}" for what in ("images", "seeds") for end in ("low", "high")),
        ]
    columns += ["trainable", "multiply_adds", "p50_ms", "p95_ms", "peak_MiB", "train_images_per_second", "conclusion"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in found["rows"]:
        line = {
            "row": row["label"],
            "cited": row["cited"],
            "published_params_M": row["params_M"],
            "published_time_ms": row["time_ms"],
        }
        line |= {f"published_{name}": row["published"].get(name) for name in names}
        line |= {"seeds_finished": None if row["cited"] else count_finished(row), "reference": row.get("reference")}
        line |= {f"published_{name}_difference": row["published_difference"].get(name) for name in changes}
        for name in names:
            if one := (row.get("measured") or {}).get(name):
                line |= {
                    f"{name}_mean": one["mean"],
                    f"{name}_seeds_low": one["low"],
                    f"{name}_seeds_high": one["high"],
                }
                line[f"{name}_per_seed"] = " ".join(map(repr, one["values"]))
        for name in changes:
            if one := (row.get("difference") or {}).get(name):
                line[f"{name}_difference"] = one["value"]
                for what in ("images", "seeds"):
                    low, high = one[f"over_{what}"] or (None, None)
                    line |= {f"{name}_difference_{what}_low": low, f"{name}_difference_{what}_high": high}
        cost = row.get("cost") or {}
        speed, training = cost.get("prediction") or {}, cost.get("training") or {}
        line |= {
            "trainable": cost.get("trainable"),
            "multiply_adds": cost.get("multiply_adds"),
            "conclusion": row.get("conclusion"),
        }
        line |= {name: speed.get(name) for name in ("p50_ms", "p95_ms", "peak_MiB")}
        writer.writerow(line | {"train_images_per_second": training.get("images_per_second")})
    return text.getvalue()


def sheet_table(sheet: Sheet) -> Terminal:
    """Return a table for the terminal."""
    table = Terminal(title=escape(sheet.title), title_justify="left")
    for i, name in enumerate(sheet.head):
        widest = max(len(row[0]) for row in sheet.rows)
        least = max(map(len, name.split())) if i else min(widest, LABEL)
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold", min_width=least)
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    return table


def print_sheet(console: Console, sheet: Sheet) -> None:
    """Print a table."""
    wide = console if console.is_terminal else Console(file=console.file, width=UNBOUND, highlight=False, emoji=False)
    wide.print(sheet_table(sheet))


def format_number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def format_difference(value: float | None) -> str:
    """A difference with its sign."""
    return "-" if value is None else f"{value:+.{choose_decimals(value, least=2)}f}"


def format_published_difference(value: float | None) -> str:
    """A published difference with its sign and the decimals that it has, at least one."""
    return "-" if value is None else f"{value:+.1f}" if abs(value - round(value, 1)) < 1e-6 else f"{value:+.2f}"


def format_interval(pair: Sequence[float | None] | None, *, signed: bool = False) -> str:
    """An interval; "none" where it needs more seeds or objects."""
    known = [end for end in pair or () if end is not None]
    digits = choose_decimals(*known, least=2)
    return " to ".join(f"{end:{'+' * signed}.{digits}f}" for end in known) if len(known) == 2 else "none"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_safe, cells)) + " |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
