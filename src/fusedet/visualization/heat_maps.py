"""Figures of heat maps over an image, level by level, and of level weights."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fusedet.visualization.figure import DARK, new_figure, plot_color, save_figure, set_title, style_axes

COLORS = "inferno"  # monotonic in brightness, also in gray print and for color-blind readers
CELL = 1.5  # inches, the longer side of an image
ABSENT = "not in\nthis detector"
UNTOUCHED = "no map here"


@dataclass(frozen=True)
class Panel:
    """The block of columns of one detector.

    Attributes:
        title: Title above the block.
        marked: Image before each row of maps.
        rows: Maps (H, W) by row and column. The detector lacks a missing row; a missing column did not influence the
            score.
    """

    title: str
    marked: Image.Image
    rows: Mapping[str, Mapping[str, np.ndarray]]


class WeightPanel(NamedTuple):
    """Level weights of one SMSL.

    Attributes:
        title: Title above the panel.
        levels: Names of the L levels.
        mean: (T, L), means over the channels. T is L, or L + 1 with a global target last.
        ends: (2, T, L), lower and upper end of the spread over the channels.
    """

    title: str
    levels: Sequence[str]
    mean: np.ndarray
    ends: np.ndarray


def draw_maps(
    image: Image.Image,
    panels: Sequence[Panel],
    captions: Mapping[str, str],
    columns: Sequence[str],
    path: str | Path,
    title: str,
    unit: str,
    top: float | None = None,
) -> None:
    """Draw rows of maps over the image, the panels side by side, with one color scale from 0.

    Args:
        image: Image under the maps.
        panels: One block of columns per detector.
        captions: Text of each row by its key, in the order of the rows.
        columns: Names of the maps' columns in order.
        path: File to write.
        title: Title of the figure.
        unit: Unit of the values.
        top: End of a linear color scale; None for the highest value, with colors by the square root, so that a tenth
            of it remains visible.

    Raises:
        InputError: The format is unknown, or the file cannot be written.
    """
    peak = max((float(x.max()) for panel in panels for row in panel.rows.values() for x in row.values()), default=0.0)
    scale = PowerNorm(0.5, 0, peak or 1.0) if top is None else Normalize(0, top)
    across = 1 + len(columns)
    ratio = image.height / image.width
    wide, high = (CELL, CELL * ratio) if ratio <= 1 else (CELL / ratio, CELL)
    ratios = [width for i in range(len(panels)) for width in ([0.12] if i else []) + [1.0] * across]
    figure = new_figure((wide + 0.08) * sum(ratios) + 1.5, (high + 0.06) * len(captions) + 1.5, title)
    gray = np.asarray(image.convert("L"), dtype=np.float32)[..., None] / 255
    blank = np.ones((*gray.shape[:2], 3))
    grid = figure.subplots(len(captions), len(ratios), squeeze=False, width_ratios=ratios)
    for axes in grid.flat:
        axes.set_axis_off()
    for p, panel in enumerate(panels):
        left = p * (across + 1)
        set_title(grid[0, left], panel.title, 10)
        for axes, column in zip(grid[0, left + 1 :], columns):
            axes.set_title(column, fontsize=9, color=DARK)
        for r, key in enumerate(captions):
            row = panel.rows.get(key)
            grid[r, left].imshow(blank if row is None else np.asarray(panel.marked))
            for axes, column in zip(grid[r, left + 1 :], columns):
                if row is not None and column in row:
                    axes.imshow(blend(gray, np.asarray(scale(row[column]))), interpolation="none")
                else:
                    axes.imshow(blank)
                    text = ABSENT if row is None else UNTOUCHED
                    axes.text(
                        0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=8, color="#767676"
                    )
    for axes, caption in zip(grid[:, 0], captions.values()):
        style: dict[str, Any] = {"ha": "right", "va": "center", "fontsize": 9, "color": DARK}
        axes.text(-0.06, 0.5, textwrap.fill(caption, 20), transform=axes.transAxes, **style)
    place: dict[str, Any] = {"location": "bottom", "shrink": 0.4, "aspect": 40, "pad": 0.02}
    bar = figure.colorbar(ScalarMappable(scale, COLORS), ax=grid, ticks=MaxNLocator(4), **place)
    bar.outline.set_visible(False)
    bar.set_label(unit, color=DARK, fontsize=9)
    bar.ax.tick_params(labelsize=8, color=DARK, labelcolor=DARK)
    save_figure(figure, path)


def blend(gray: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blend a gray image (H, W, 1) in 0..1 with a map (H, W) in 0..1 to colors (H, W, 3); heat hides the image."""
    color = colormaps[COLORS](heat)[..., :3]
    cover = 0.45 + 0.4 * heat.clip(0, 1)[..., None]
    mixed: np.ndarray = (1 - cover) * gray + cover * color
    return mixed.clip(0, 1)


def draw_level_weights(panels: Sequence[WeightPanel], path: str | Path, title: str) -> None:
    """Draw how much each target takes of each level: a group of bars per target.

    Thin lines are the spread over the channels. The dashed line is 1 / L, the weight of a level in a plain mean.

    Args:
        panels: SMSL's weights, one panel each.
        path: File to write; its suffix names the format: png, pdf or svg.
        title: Title of the plot.

    Raises:
        InputError: The format is unknown, or the file cannot be written.
    """
    widest = max(panel.mean.size for panel in panels)
    figure = new_figure(1.6 + 0.19 * widest, 0.7 + 2.3 * len(panels), title)
    top = max(float(panel.ends.max()) for panel in panels)
    for axes, (name, levels, mean, ends) in zip(
        figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True
    ):
        style_axes(axes)
        axes.grid(False, axis="x")
        set_title(axes, name, 10)
        count = len(levels)
        width = 0.8 / count
        for level in range(count):
            at = np.arange(len(mean)) + (level - (count - 1) / 2) * width
            axes.bar(at, mean[:, level], 0.9 * width, color=plot_color(level), label=levels[level])
            axes.vlines(at, ends[0, :, level], ends[1, :, level], color=DARK, lw=0.8)
        axes.axhline(1 / count, color=DARK, lw=1, ls=(0, (4, 3)))
        axes.set_xticks(
            range(len(mean)), [f"to\n{level}" for level in levels] + ["to the\nglobal one"] * (len(mean) - count)
        )
        axes.set(ylim=(0, min(1.0, 1.08 * top)), ylabel="weight")
        axes.legend(
            title="taken from", alignment="left", loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize=9
        )
    save_figure(figure, path)
