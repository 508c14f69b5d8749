"""Plots of an ablation: AP against cost, by object size, over the training, and differences by class."""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from fusedet import visualization
from fusedet.ablation.summary_text import Summary
from fusedet.visualization import colors
from fusedet.visualization.figure import (
    DARK,
    PALE,
    add_legend,
    new_figure,
    plot_color,
    save_figure,
    set_title,
    style_axes,
)

RowSummary = Mapping[str, Any]
COSTS = {
    "multiply-adds (G)": ("multiply_adds", None, 1e-9),
    "latency of prediction, p50 (ms)": ("prediction", "p50_ms", 1.0),
}
SIZES = {"s": "small, < 32² px", "m": "medium", "l": "large, > 96² px"}
PANELS = 4
MOST_COLORS = 10
"""More rows than this cannot be distinguished by color."""


def draw_plots(summary: Summary, folder: Path) -> dict[str, Path]:
    """Write every plot that has data, as SVG; return the files by what they show."""
    # Rows that share runs would be drawn on top of each other.
    rows = [row for row in summary["rows"] if row.get("measured") and not row["same_as"]]
    for old in folder.glob("*.svg"):
        old.unlink()
    if not rows:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    baseline = next(
        (row["same_as"] or row["label"] for row in summary["rows"] if row["label"] == summary["baseline"]), None
    )
    metric, files = summary["metric"], {}
    ap = "mask_AP" if metric.startswith("mask_") else "AP"
    if known := [row for row in rows if metric in row["measured"]]:
        files[f"{metric} against cost"] = folder / "cost.svg"
        plot_metric_against_cost(known, baseline, files[f"{metric} against cost"], metric)
    files[f"{ap} by object size"] = folder / "sizes.svg"
    plot_ap_by_size(rows, baseline, files[f"{ap} by object size"], ap)
    if summary["size_bins"]:
        files["AP by size bin"] = folder / "bins.svg"
        plot_ap_by_bin(rows, summary["size_bins"], files["AP by size bin"])
    files["Learning curves"] = folder / "learning.svg"
    plot_learning_curves(
        [row for row in rows if not row["weights_of"]], baseline, files["Learning curves"], validation_metric(metric)
    )
    for i, row in enumerate(rows):
        if row["classes"]:
            name = f"{row['label']} - {row['reference']}: {ap} by class"
            files[name] = folder / f"classes-{i}.svg"
            visualization.plot_differences([_flatten_interval(change) for change in row["classes"]], files[name], name)
    return files


def validation_metric(metric: str) -> str:
    """Return the metric of the learning curves: validations during the training compute COCO's metrics only."""
    return "AP" if metric.startswith("VOC_") else metric


def plot_metric_against_cost(rows: Sequence[RowSummary], baseline: str | None, path: Path, name: str = "AP") -> None:
    """Plot a metric with its interval over seeds against multiply-adds and, if measured, latency.

    Args:
        rows: Rows of a summary, numbered in the plot and in the legend.
        baseline: Label of the row that is drawn dark.
        path: File to write.
        name: Name of the metric.
    """
    panels = [(cost, key) for cost, key in COSTS.items() if all(_get_cost(row, *key) is not None for row in rows)]
    figure = new_figure(4.3 * len(panels) + 1.6, max(3.4, 0.6 + 0.21 * len(rows)))
    handles: list[Any] = []
    for axes, (cost, key) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        style_axes(axes)
        axes.set_xlabel(cost, color=DARK)
        handles = []
        for i, row in enumerate(rows):
            x, ap, color = _get_cost(row, *key), row["measured"][name], _row_color(i, row, rows, baseline)
            if ap["low"] is not None:
                axes.plot([x, x], [ap["low"], ap["high"]], color=color, lw=1.6, alpha=0.8, solid_capstyle="round")
            handles += axes.plot(x, ap["mean"], "o", color=color, ms=6, label=f"{i + 1}  {row['label']}")
            axes.annotate(str(i + 1), (x, ap["mean"]), (6, 4), textcoords="offset points", fontsize=8, color=DARK)
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(useOffset=False)
    figure.axes[0].set_ylabel(name, color=DARK)
    add_legend(figure, handles)
    save_figure(figure, path)


def plot_ap_by_size(rows: Sequence[RowSummary], baseline: str | None, path: Path, ap: str = "AP") -> None:
    """Plot APs, APm and APl of every row with intervals over seeds, one panel each.

    Args:
        rows: Rows of a summary.
        baseline: Label of the row that is drawn dark.
        path: File to write.
        ap: "AP", or "mask_AP" for masks.
    """
    figure = new_figure(9.2, 1.1 + 0.26 * len(rows))
    panels = figure.subplots(1, len(SIZES), sharey=True)
    for axes, (size, title) in zip(panels, SIZES.items()):
        name = ap + size
        style_axes(axes)
        axes.grid(False, axis="y")
        set_title(axes, f"{name}: {title}", 10)
        for i, row in enumerate(rows):
            measured = row["measured"].get(name)
            if measured is None:
                axes.annotate(
                    "no objects",
                    (0.02, i),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=8,
                    color="#8c8c8c",
                )
                continue
            color = DARK if row["label"] == baseline else plot_color(6)
            if measured["low"] is not None:
                axes.plot([measured["low"], measured["high"]], [i, i], color=color, lw=2, solid_capstyle="round")
            axes.plot(measured["values"], [i] * len(measured["values"]), "|", color=color, ms=7, alpha=0.7)
            axes.plot(measured["mean"], i, "o", color=color, ms=5)
    for axes in panels:  # a t interval of few seeds may leave AP's range
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -2), min(high, 102))
    labels = [row["label"] for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontfamily=colors.font_families(labels), fontsize=9)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    save_figure(figure, path)


def plot_ap_by_bin(rows: Sequence[RowSummary], bins: Sequence[str], path: Path) -> None:
    """Plot AP of the reference rows against the size bin, and the difference of each other row, one panel each.

    Args:
        rows: Rows of a summary.
        bins: Names of the bins' metrics.
        path: File to write.
    """
    compared = [row for row in rows if row["difference"]]
    lines = math.ceil((1 + len(compared)) / PANELS)
    figure = new_figure(3.4 * PANELS, 2.6 * lines)
    panels = figure.subplots(lines, PANELS, squeeze=False).ravel()
    for axes in panels[1 + len(compared) :]:
        axes.remove()
    for axes, row in zip(panels, [None, *compared]):
        style_axes(axes)
        title = "AP of the references" if row is None else f"{row['label']} - {row['reference']}"
        set_title(axes, title, 9)
        axes.set_xticks(range(len(bins)), [name.removeprefix("AP ").removesuffix(" px") for name in bins], fontsize=6)
        if row is None:
            continue
        axes.axhline(0, color=DARK, lw=1)
        for x, change in enumerate(row["difference"][name] for name in bins):
            if change["over_images"]:
                low, high = change["over_images"]
                color = PALE if low <= 0 <= high else plot_color(6)
                axes.plot([x, x], [low, high], color=color, lw=2, solid_capstyle="round")
                axes.plot(x, change["value"], "o", color=color, ms=4)
    for i, row in enumerate(row for row in rows if not row["difference"]):
        known = {x: row["measured"][name]["mean"] for x, name in enumerate(bins) if name in row["measured"]}
        panels[0].plot(list(known), list(known.values()), "o-", color=plot_color(i), ms=3, label=row["label"])
    panels[0].set_ylim(bottom=0)
    panels[0].legend(frameon=False, fontsize=7)
    figure.supxlabel("square root of the area (px); intervals over images, gray if they contain 0", fontsize=9)
    save_figure(figure, path)


def plot_learning_curves(rows: Sequence[RowSummary], baseline: str | None, path: Path, name: str = "AP") -> None:
    """Plot a metric of the validations against the epoch: thin lines are seeds, thick ones the mean at common epochs.

    Args:
        rows: Rows of a summary.
        baseline: Label of the row that is drawn dark.
        path: File to write.
        name: Name of the metric.
    """
    figure = new_figure(8.4, max(3.4, 0.6 + 0.21 * len(rows)))
    axes = figure.add_subplot()
    style_axes(axes)
    axes.set_xlabel("epoch", color=DARK)
    axes.set_ylabel(name, color=DARK)
    handles = []
    for i, row in enumerate(rows):
        color = _row_color(i, row, rows, baseline)
        curves = [
            curve
            for run in row["runs"]
            if run["metrics"] and (curve := dict(_read_validations(Path(run["folder"]), name)))
        ]
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), color=color, lw=0.6, alpha=0.5)
        if curves:
            epochs = sorted(set.intersection(*map(set, curves)))
            means = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs]
            handles += axes.plot(epochs, means, "o-", color=color, lw=1.8, ms=3, label=row["label"])
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    add_legend(figure, handles)
    save_figure(figure, path)


def _read_validations(run: Path, name: str) -> Iterator[tuple[int, float]]:
    """Yield epoch and metric in percent of a run's validations."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row.get(name) and not math.isnan(float(row[name])):
                yield int(row["epoch"]), 100 * float(row[name])


def _get_cost(row: RowSummary, section: str, key: str | None, scale: float) -> float | None:
    value = row["cost"].get(section)
    value = value.get(key) if key and value else value
    return None if value is None else scale * value


def _row_color(i: int, row: RowSummary, rows: Sequence[RowSummary], baseline: str | None) -> Any:
    """Return dark for the baseline, and a color per row as long as colors can be distinguished."""
    if row["label"] == baseline:
        return DARK
    return plot_color(i) if len(rows) <= MOST_COLORS else plot_color(6) if i < MOST_COLORS else PALE


def _flatten_interval(row: RowSummary) -> dict[str, Any]:
    """Convert a class's difference to a row of `visualization.plot_differences`."""
    low, high = row["over_images"] or (math.nan, math.nan)
    return {
        "name": row["name"],
        "difference": math.nan if row["value"] is None else row["value"],
        "low": low,
        "high": high,
    }
