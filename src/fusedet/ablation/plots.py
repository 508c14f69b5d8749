"""The plots of an ablation: AP against cost, by object size, over the training, and differences by class."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fusedet import visualization
from fusedet.visualization import colors
from fusedet.visualization.figure import DARK, PALE, new_figure, plot_color, save_figure, style_axes

Found = Mapping[str, Any]
COSTS = {
    "multiply-adds (G)": ("multiply_adds", None, 1e-9),
    "latency of prediction, p50 (ms)": ("prediction", "p50_ms", 1.0),
}
SIZES = {"s": "small, < 32² px", "m": "medium", "l": "large, > 96² px"}
APART = 10
"""More rows than this are not told apart by colour."""


def draw_plots(found: Found, folder: Path) -> dict[str, Path]:
    """Write every plot that there is something to show in, as svg; gives the files by what they show."""
    rows = [
        row for row in found["rows"] if row.get("measured") and not row["same_as"]
    ]  # rows that share runs lie on each other
    for old in folder.glob("*.svg"):
        old.unlink()
    if not rows:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    baseline = next(
        (row["same_as"] or row["label"] for row in found["rows"] if row["label"] == found["baseline"]), None
    )
    figure, files = found["figure"], {}
    ap = "mask_AP" if figure.startswith("mask_") else "AP"
    if known := [row for row in rows if figure in row["measured"]]:
        files[f"{figure} against cost"] = folder / "cost.svg"
        plot_metric_against_cost(known, baseline, files[f"{figure} against cost"], figure)
    files[f"{ap} by object size"] = folder / "sizes.svg"
    plot_ap_by_size(rows, baseline, files[f"{ap} by object size"], ap)
    files["Learning curves"] = folder / "learning.svg"
    plot_learning_curves(
        [row for row in rows if not row["weights_of"]], baseline, files["Learning curves"], validation_metric(figure)
    )
    for i, row in enumerate(rows):
        if row["classes"]:
            name = f"{row['label']} less {row['reference']}, {ap} by class"
            files[name] = folder / f"classes-{i}.svg"
            visualization.plot_differences([_with_ends(one) for one in row["classes"]], files[name], name)
    return files


def validation_metric(figure: str) -> str:
    """The figure of the learning curves of a table about a figure: validations have COCO's alone."""
    return "AP" if figure.startswith("VOC_") else figure


def plot_metric_against_cost(rows: Sequence[Found], baseline: str | None, path: Path, name: str = "AP") -> None:
    """A figure with its interval over seeds against multiply-adds and, where measured, latency; points are numbered as the legend says."""
    panels = [(cost, key) for cost, key in COSTS.items() if all(_cost(row, *key) is not None for row in rows)]
    figure = new_figure(4.3 * len(panels) + 1.6, max(3.4, 0.6 + 0.21 * len(rows)))
    handles: list[Any] = []
    for axes, (cost, key) in zip(figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels):
        style_axes(axes)
        axes.set_xlabel(cost, color=DARK)
        handles = []
        for i, row in enumerate(rows):
            x, ap, colour = _cost(row, *key), row["measured"][name], _colour(i, row, rows, baseline)
            if ap["low"] is not None:
                axes.plot([x, x], [ap["low"], ap["high"]], color=colour, lw=1.6, alpha=0.8, solid_capstyle="round")
            handles += axes.plot(x, ap["mean"], "o", color=colour, ms=6, label=f"{i + 1}  {row['label']}")
            axes.annotate(str(i + 1), (x, ap["mean"]), (6, 4), textcoords="offset points", fontsize=8, color=DARK)
        axes.margins(0.12)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(useOffset=False)
    figure.axes[0].set_ylabel(name, color=DARK)
    _legend(figure, handles)
    save_figure(figure, path)


def plot_ap_by_size(rows: Sequence[Found], baseline: str | None, path: Path, ap: str = "AP") -> None:
    """APs, APm and APl, or those of masks (`ap` is then mask_AP), of every row with intervals over seeds, one panel each."""
    figure = new_figure(9.2, 1.1 + 0.26 * len(rows))
    panels = figure.subplots(1, len(SIZES), sharey=True)
    for axes, (size, title) in zip(panels, SIZES.items()):
        name = ap + size
        style_axes(axes)
        axes.grid(False, axis="y")
        axes.set_title(f"{name}: {title}", loc="left", fontsize=10, color=DARK)
        for i, row in enumerate(rows):
            one = row["measured"].get(name)
            if one is None:
                axes.annotate(
                    "no objects",
                    (0.02, i),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    fontsize=8,
                    color="#8c8c8c",
                )
                continue
            colour = DARK if row["label"] == baseline else plot_color(6)
            if one["low"] is not None:
                axes.plot([one["low"], one["high"]], [i, i], color=colour, lw=2, solid_capstyle="round")
            axes.plot(one["values"], [i] * len(one["values"]), "|", color=colour, ms=7, alpha=0.7)
            axes.plot(one["mean"], i, "o", color=colour, ms=5)
    labels = [row["label"] for row in rows]
    panels[0].set_yticks(range(len(rows)), labels, fontfamily=colors.font_families(labels), fontsize=9)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    save_figure(figure, path)


def plot_learning_curves(rows: Sequence[Found], baseline: str | None, path: Path, name: str = "AP") -> None:
    """A figure of the validations against the epoch: thin a seed, thick the mean of all seeds at epochs that all of them have."""
    figure = new_figure(8.4, max(3.4, 0.6 + 0.21 * len(rows)))
    axes = figure.add_subplot()
    style_axes(axes)
    axes.set_xlabel("epoch", color=DARK)
    axes.set_ylabel(name, color=DARK)
    handles = []
    for i, row in enumerate(rows):
        colour = _colour(i, row, rows, baseline)
        curves = [
            curve for run in row["runs"] if run["figures"] and (curve := dict(_validations(Path(run["folder"]), name)))
        ]
        for curve in curves:
            axes.plot(list(curve), list(curve.values()), color=colour, lw=0.6, alpha=0.5)
        if curves:
            epochs = sorted(set.intersection(*map(set, curves)))
            means = [sum(curve[epoch] for curve in curves) / len(curves) for epoch in epochs]
            handles += axes.plot(epochs, means, "o-", color=colour, lw=1.8, ms=3, label=row["label"])
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(figure, handles)
    save_figure(figure, path)


def _validations(run: Path, name: str) -> Iterator[tuple[int, float]]:
    """Epoch and a figure in percent of a run's validations."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            if row.get(name) and not math.isnan(float(row[name])):
                yield int(row["epoch"]), 100 * float(row[name])


def _cost(row: Found, section: str, key: str | None, scale: float) -> float | None:
    value = row["cost"].get(section)
    value = value.get(key) if key and value else value
    return None if value is None else scale * value


def _colour(i: int, row: Found, rows: Sequence[Found], baseline: str | None) -> Any:
    """The baseline is dark; others have their own colours as long as these can be told apart."""
    if row["label"] == baseline:
        return DARK
    return plot_color(i) if len(rows) <= APART else plot_color(6) if i < APART else PALE


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    labels = [handle.get_label() for handle in handles]
    letters = {"family": colors.font_families(labels), "size": 9}
    figure.legend(handles, labels, loc="outside right center", frameon=False, prop=letters, labelcolor=DARK)


def _with_ends(row: Found) -> dict[str, Any]:
    """A class's difference as `draw.differences` takes it."""
    low, high = row["over_images"] or (math.nan, math.nan)
    return {
        "name": row["name"],
        "difference": math.nan if row["value"] is None else row["value"],
        "low": low,
        "high": high,
    }
