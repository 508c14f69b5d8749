"""Plots of an evaluation: precision-recall curves, confusion matrix, AP by object size, differences of two runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import PercentFormatter

from fusedet.errors import InputError
from fusedet.visualization import colors
from fusedet.visualization.figure import DARK, PALE, new_axes, new_figure, plot_color, save_figure

MOST_CLASSES = 10  # more colors than this cannot be distinguished in one plot
MOST_ROWS = 40
UNCLEAR = "#9a9a9a"


def plot_precision_recall(
    pr: Mapping[str, Any], path: str | Path, title: str = "Precision and recall", iou: float = 0.5
) -> None:
    """Plot precision against recall per class, and the mean over classes in bold.

    Of more than ten classes, the five best (solid) and the five worst (dashed) have colors and names. The rest is gray.

    Args:
        pr: Result of `evaluation.compute_precision_recall`.
        path: File to write; its suffix names the format: png, pdf or svg.
        title: Title of the plot.
        iou: IoU threshold of the curves, for the labels.

    Raises:
        InputError: The format is unknown, or the file cannot be written.
    """
    rows = sorted((row for row in pr["classes"] if not math.isnan(row["AP"])), key=lambda row: -row["AP"])
    half = MOST_CLASSES // 2
    few = len(pr["classes"]) <= MOST_CLASSES
    shown, pale = (rows, []) if len(rows) <= MOST_CLASSES else (rows[:half] + rows[-half:], rows[half:-half])
    order = {row["name"]: k for k, row in enumerate(pr["classes"] if few else shown)}
    figure = new_figure(7.2, 4.4)
    axes = new_axes(figure, title, "recall", f"precision at IoU {iou:g}")
    for row in pale:
        axes.plot(row["recall"], _mask_unreached(row["precision"]), color=PALE, lw=0.8, zorder=1)
    for row in shown:
        label = f"{row['name']}  {row['AP']:.3f}"
        line = (0, (4, 2)) if pale and order[row["name"]] >= half else "-"
        style: dict[str, Any] = {"color": plot_color(order[row["name"]]), "lw": 1.6, "ls": line}
        axes.plot(row["recall"], _mask_unreached(row["precision"]), label=label, zorder=2, **style)
    axes.plot(pr["recall"], pr["mean"], color=DARK, lw=2.8, label=f"mean of {len(rows)}  {pr['AP']:.3f}", zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    font = {"family": colors.font_families([row["name"] for row in shown]), "size": 9}
    heading = f"AP{100 * iou:g}" + (f": {half} best, {half} worst" if pale else "")
    axes.legend(
        title=heading, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, prop=font, alignment="left"
    )
    save_figure(figure, path)


def plot_confusion_matrix(matrix: np.ndarray, names: Sequence[str], path: str | Path, title: str = "Confusion") -> None:
    """Plot a confusion matrix, each row as fractions of its sum.

    Cells have percentages up to 25 classes, and counts too up to 8 classes.

    Args:
        matrix: (K + 1, K + 1) counts of `evaluation.compute_confusion_matrix`; the last row and column are background.
        names: K class names.
        path: File to write; its suffix names the format: png, pdf or svg.
        title: Title of the plot.

    Raises:
        InputError: The matrix has another shape.
    """
    k = len(names)
    if matrix.shape != (k + 1, k + 1):
        raise InputError(f"a confusion matrix of {k} classes must be ({k + 1}, {k + 1}), it is {matrix.shape}")
    total = matrix.sum(axis=1, keepdims=True)
    fraction = np.divide(matrix, total, out=np.full(matrix.shape, np.nan), where=total > 0)
    fraction[k, k] = np.nan
    side = 0.62 if k <= 8 else 0.42 if k <= 25 else 0.16
    size = 10 if k <= 25 else 6
    margin = 0.009 * size * max(len(name) for name in [*names, "background"])  # inches for the class names
    figure = new_figure(side * (k + 1) + margin + 1.6, side * (k + 1) + (0.7 * margin if k <= 25 else margin) + 0.9)
    axes = new_axes(figure, title, "predicted class", "true class")
    axes.grid(False)
    axes.set_facecolor("#f2f2f2")
    image = axes.imshow(fraction, cmap="Blues", vmin=0, vmax=1)
    rotation: dict[str, Any] = (
        {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if k <= 25 else {"rotation": 90}
    )
    font: dict[str, Any] = {"fontfamily": colors.font_families(list(names)), "fontsize": size}
    axes.set_xticks(range(k + 1), [*names, "missed"], **rotation, **font)
    axes.set_yticks(range(k + 1), [*names, "background"], **font)
    axes.axhline(k - 0.5, color=DARK, lw=0.8)
    axes.axvline(k - 0.5, color=DARK, lw=0.8)
    for (r, c), value in np.ndenumerate(fraction if k <= 25 else np.zeros((0, 0))):
        if not math.isnan(value) and value >= 0.005:
            text = f"{100 * value:.0f} %\n{matrix[r, c]}" if k <= 8 else f"{100 * value:.0f}"
            shade: dict[str, Any] = {"fontsize": 9 if k <= 8 else 8, "color": "white" if value > 0.6 else DARK}
            axes.text(c, r, text, ha="center", va="center", **shade)
    place: dict[str, Any] = {"fraction": 0.04, "pad": 0.03, "aspect": 24, "shrink": 0.9 if k <= 25 else 0.5}
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=0, symbol=" %"), **place)
    bar.outline.set_visible(False)
    bar.set_label("fraction of the row", color=DARK)
    save_figure(figure, path)


def plot_ap_by_size(metrics: Mapping[str, Any], path: str | Path, title: str = "AP by object size") -> None:
    """Plot APs, APm and APl, or AP of each size bin, as bars, and AP as a line.

    Args:
        metrics: Result of `evaluation.evaluate_coco`: AP, APs, APm and APl, or size_bins, in 0..1; NaN or None without
            such objects.
        path: File to write; its suffix names the format: png, pdf or svg.
        title: Title of the plot.

    Raises:
        InputError: The format is unknown, or the file cannot be written.
    """
    if bins := metrics.get("size_bins"):
        label, bars = "square root of the area (px)", {f"{row['from']:g}-{row['to']:g}": row["AP"] for row in bins}
    else:
        names = {"small\n< 32² px": "APs", "medium": "APm", "large\n> 96² px": "APl"}
        label, bars = "", {text: metrics[name] for text, name in names.items()}
    values = [math.nan if value is None else value for value in bars.values()]
    heights = np.nan_to_num(values)
    figure = new_figure(max(4.6, 1.6 + 0.8 * len(values)), 3.2)
    axes = new_axes(figure, title, label, "AP")
    axes.grid(False, axis="x")
    note_style: dict[str, Any] = {"textcoords": "offset points", "color": DARK, "annotation_clip": False}
    axes.bar(range(len(values)), heights, width=0.62, color=plot_color(6))
    for i, value in enumerate(values):
        text = "no objects" if math.isnan(value) else f"{value:.3f}"
        box = {"fc": "white", "ec": "none", "pad": 0.6}
        axes.annotate(text, (i, heights[i]), (0, 4), ha="center", bbox=box, **note_style)
    mean = metrics["AP"]
    axes.axhline(mean, color=DARK, lw=1.2, ls=(0, (4, 3)))
    end = len(values) - 0.55
    axes.annotate(f"AP {mean:.3f}", (end, mean), (4, 0), va="center", **note_style)
    axes.set_xticks(range(len(values)), list(bars))
    top = max(mean, *heights)
    axes.set(xlim=(-0.5, end), ylim=(0, min(1.1, max(0.1, 1.25 * top))))
    save_figure(figure, path)


def plot_differences(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str = "Difference of AP",
    mean: Mapping[str, Any] | None = None,
) -> None:
    """Plot a point and its confidence interval per row, the largest difference on top.

    Intervals that contain 0 are gray. Rows without a difference (NaN) are left out. Of more than forty rows, the twenty
    largest and the twenty smallest are shown.

    Args:
        rows: One mapping {name, difference, low, high} per class.
        path: File to write; its suffix names the format: png, pdf or svg.
        title: Title of the plot.
        mean: A row of the same keys, drawn dark above the others.

    Raises:
        InputError: The format is unknown, or the file cannot be written.
    """
    known = sorted((row for row in rows if not math.isnan(row["difference"])), key=lambda row: -row["difference"])
    half = MOST_ROWS // 2
    shown = known if len(known) <= MOST_ROWS else known[:half] + known[-half:]
    left_out = f" ({half} largest and {half} smallest of {len(known)})" if len(shown) < len(known) else ""
    shown = shown[::-1] + ([] if mean is None else [dict(mean)])
    figure = new_figure(6.4, 1.3 + 0.24 * max(1, len(shown)))
    axes = new_axes(figure, title, f"difference{left_out}", "")
    axes.axvline(0, color=DARK, lw=1.2)
    for place, row in enumerate(shown):
        color: Any = UNCLEAR
        if mean is not None and place == len(shown) - 1:
            color = DARK
            axes.axhline(place - 0.5, color=PALE, lw=1.2, ls=(0, (4, 3)))
        elif row["low"] > 0 or row["high"] < 0:
            color = plot_color(6 if row["difference"] > 0 else 4)
        axes.plot([row["low"], row["high"]], [place, place], color=color, lw=2.2, solid_capstyle="round", zorder=2)
        axes.plot(row["difference"], place, "o", color=color, ms=5, zorder=3)
    if left_out:
        axes.axhline(half - 0.5, color=PALE, lw=1.2, ls=(0, (4, 3)))
    names = [row["name"] for row in shown]
    axes.set_yticks(range(len(shown)), names, fontfamily=colors.font_families(names), fontsize=9)
    axes.set_ylim(-0.5, max(1, len(shown)) - 0.5)
    axes.grid(False, axis="y")
    save_figure(figure, path)


def _mask_unreached(precision: np.ndarray) -> np.ndarray:
    """Set the precision beyond the highest reached recall to NaN."""
    return np.where(precision > 0, precision, np.nan)
