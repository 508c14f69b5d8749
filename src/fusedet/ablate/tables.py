"""A summary as tables of text: for the terminal, for Markdown, for a spreadsheet, and for the page."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Terminal

from fusedet.ablate.estimate import told
from fusedet.ablate.summary import MEASURED, SHOWN

Found = Mapping[str, Any]
NOTHING = "not measured"
UNBOUND = 1000  # characters of a line where no terminal breaks it
LABEL = 24  # characters of a row's label that are not broken in the terminal
CITED = "cited"


class Sheet(NamedTuple):
    """A table of text: what it shows, its head and its rows; the first column holds the rows' labels."""

    title: str
    head: list[str]
    rows: list[list[str]]


def sheets(found: Found) -> list[Sheet]:
    """The tables of a summary: AP with its differences, all figures, cost."""
    return [difference_sheet(found), figure_sheet(found), cost_sheet(found)]


def difference_sheet(found: Found) -> Sheet:
    """AP as published and as measured, with both intervals of the difference to the baseline."""
    level, base = f"{100 * found['level']:g} %", found["baseline"]
    head = ["row", "AP published", "AP measured", f"AP, {level} over seeds", "AP per seed"]
    head += [f"AP less '{base}'", f"difference, {level} over pictures", f"difference, {level} over seeds"] if base else []
    rows = []
    for row in found["rows"]:
        ap = (row.get("measured") or {}).get("AP")
        cells = [row["label"], number(row["published"].get("AP"))]
        if row["cited"] or ap is None:
            cells += [CITED if row["cited"] else NOTHING, "", ""]
        else:
            cells += [number(ap["mean"], 2), ends((ap["low"], ap["high"])), " ".join(number(value, 2) for value in ap["values"])]
        if base:
            change = (row.get("difference") or {}).get("AP")
            cells += (
                ["", "", ""]
                if change is None
                else [signed(change["value"]), *(ends(change[f"over_{what}"], signed) for what in ("pictures", "seeds"))]
            )
        rows.append(cells)
    count = found["seeds"]
    return Sheet(f"AP in percent, means over {count} seed{'s' * (count > 1)}", head, rows)


def figure_sheet(found: Found) -> Sheet:
    """Every figure that is printed or shown, published / measured."""
    names = shown_figures(found)
    rows = []
    for row in found["rows"]:
        measured = row.get("measured") or {}
        pairs = [(row["published"].get(name), (measured.get(name) or {}).get("mean")) for name in names]
        rows.append([row["label"], *(f"{number(a)} / {number(b, 2)}" for a, b in pairs), row["split"] or "-"])
    return Sheet("All figures in percent, published / measured", ["row", *names, "published on"], rows)


def cost_sheet(found: Found) -> Sheet:
    """What each row costs, as printed and as counted and measured."""
    head = ["row", "#Param paper (M)", "#Param (M)", "multiply-adds (G)", "time paper (ms)"]
    head += ["p50 (ms)", "p95 (ms)", "peak memory (MiB)", "training (pictures/s)"]
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
                number(row["params_M"], 2),
                *counts,
                number(row["time_ms"]),
                *(none if v is None else f"{v:,.1f}" for v in values),
            ]
        )
    return Sheet("Cost", head, rows)


def plan_sheet(rows: Sequence[Found], classes: int, seeds: int) -> Sheet:
    """The rows of a dry run: label, published, params_M, time_ms, trainable, multiply_adds, left (runs) and seconds (of them, or None)."""
    names = [name for name in (*MEASURED, *(f"delta_{name}" for name in MEASURED)) if any(name in row["published"] for row in rows)]
    timed = any(row["seconds"] is not None for row in rows)
    printed_time = any(row["time_ms"] is not None for row in rows)
    head = ["row", *(name.replace("delta_", "Δ") for name in names), "#Param paper (M)", "#Param (M)", "multiply-adds (G)"]
    head += [*(["time paper (ms)"] * printed_time), "runs to do", *(["estimate"] * timed)]
    lines = []
    for row in rows:
        cells = [row["label"], *(number(row["published"].get(name)) for name in names), number(row["params_M"], 2)]
        if row["trainable"] is None:
            cells += [CITED, CITED]
        else:
            cells += [f"{row['trainable'] / 1e6:.2f}", f"{row['multiply_adds'] / 1e9:.2f}"]
        cells += [number(row["time_ms"])] * printed_time
        cells += ["-" if row["left"] is None else str(row["left"])]
        cells += [("-" if row["seconds"] is None else told(row["seconds"]))] * timed
        lines.append(cells)
    return Sheet(f"Published figures in percent; counted with {classes} classes; {seeds} seed{'s' * (seeds > 1)} per row", head, lines)


def shown_figures(found: Found) -> list[str]:
    """AP to APl, and what else the table's rows print."""
    printed = {name for row in found["rows"] for name in row["published"]}
    return [name for name in MEASURED if name in SHOWN or name in printed]


def markdown(found: Found) -> str:
    """The tables and the conclusions as Markdown."""
    text = [f"# {found['title']}", "", *([found["paper"], ""] if found["paper"] else [])]
    for sheet in sheets(found):
        text += [f"## {sheet.title}", "", _line(sheet.head), "|" + "---|" * len(sheet.head), *map(_line, sheet.rows), ""]
    text += [
        "## What can be concluded",
        "",
        *(f"- **{_safe(row['label'])}**: {row['conclusion']}" for row in found["rows"] if not row["cited"]),
    ]
    text += ["", "## What the intervals cover", "", *(f"- {line}" for line in covered(found)), ""]
    return "\n".join(text)


def comma_separated(found: Found) -> str:
    """One line per row with every figure in a column of its own; empty where nothing was printed or measured."""
    text = io.StringIO(newline="")
    names = shown_figures(found)
    columns = ["row", "cited", *(f"published_{name}" for name in names), "published_params_M", "published_time_ms"]
    for name in names:
        columns += [f"{name}_mean", f"{name}_seeds_low", f"{name}_seeds_high", f"{name}_per_seed"]
    for name in SHOWN:
        columns += [f"{name}_difference", *(f"{name}_difference_{what}_{end}" for what in ("pictures", "seeds") for end in ("low", "high"))]
    columns += ["trainable", "multiply_adds", "p50_ms", "p95_ms", "peak_MiB", "train_images_per_second", "conclusion"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in found["rows"]:
        line = {"row": row["label"], "cited": row["cited"], "published_params_M": row["params_M"], "published_time_ms": row["time_ms"]}
        line |= {f"published_{name}": row["published"].get(name) for name in names}
        for name in names:
            if one := (row.get("measured") or {}).get(name):
                line |= {f"{name}_mean": one["mean"], f"{name}_seeds_low": one["low"], f"{name}_seeds_high": one["high"]}
                line[f"{name}_per_seed"] = " ".join(map(repr, one["values"]))
        for name in SHOWN:
            if one := (row.get("difference") or {}).get(name):
                line[f"{name}_difference"] = one["value"]
                for what in ("pictures", "seeds"):
                    low, high = one[f"over_{what}"] or (None, None)
                    line |= {f"{name}_difference_{what}_low": low, f"{name}_difference_{what}_high": high}
        cost = row.get("cost") or {}
        speed, training = cost.get("prediction") or {}, cost.get("training") or {}
        line |= {"trainable": cost.get("trainable"), "multiply_adds": cost.get("multiply_adds"), "conclusion": row.get("conclusion")}
        line |= {name: speed.get(name) for name in ("p50_ms", "p95_ms", "peak_MiB")}
        writer.writerow(line | {"train_images_per_second": training.get("images_per_second")})
    return text.getvalue()


def covered(found: Found) -> list[str]:
    """What each interval and figure stands for, as sentences."""
    val, level = found["data"]["val"], f"{100 * found['level']:g} %"
    several = sum(bool(row.get("difference")) for row in found["rows"])
    lines = [
        f"Measured on {val['pictures']} pictures of {val['source']}; published on what the paper says. Other data or another recipe give "
        "other levels: compare differences within a column, not the columns.",
        f"Over seeds ({level}): Student's t of the mean, for differences Welch's. It covers another seed on these very pictures.",
        f"Over pictures ({level}): percentiles of {found['resamples']} paired resamples of the pictures, of the mean over seeds. It covers "
        "other pictures drawn in the same way, with these very weights.",
    ]
    if several > 1:
        lines.append(
            f"{several} rows are compared with the baseline: of twenty intervals of rows that differ in nothing, about one misses 0."
        )
    return lines


def show(console: Console, sheet: Sheet) -> None:
    """Print a table."""
    table = Terminal(title=escape(sheet.title), title_justify="left")
    for i, name in enumerate(sheet.head):
        widest = max(len(row[0]) for row in sheet.rows)
        least = max(map(len, name.split())) if i else min(widest, LABEL)
        table.add_column(escape(name), justify="right" if i else "left", overflow="fold", min_width=least)
    for row in sheet.rows:
        table.add_row(*map(escape, row))
    wide = console if console.is_terminal else Console(file=console.file, width=UNBOUND, highlight=False, emoji=False)
    wide.print(table)


def number(value: float | None, digits: int = 1) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """A difference with its sign."""
    return "-" if value is None else f"{value:+.2f}"


def ends(pair: Sequence[float | None] | None, write: Callable[[float], str] = "{:.2f}".format) -> str:
    """An interval; "none" where it needs more seeds or objects."""
    known = [write(end) for end in pair or () if end is not None]
    return " to ".join(known) if len(known) == 2 else "none"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_safe, cells)) + " |"


def _safe(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
