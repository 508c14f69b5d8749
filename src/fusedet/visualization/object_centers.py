"""Where the objects' centres lie in their images, class by class, as in Figure 5 of MSIL (Wang et al., 2023)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

from fusedet.errors import InputError
from fusedet.visualization import colors
from fusedet.visualization.figure import DARK, new_figure, save_figure

CELLS = 32  # of the density, along each side
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
MOST_POINTS = 400  # that are drawn one by one
HIGHEST = 3.0  # densities above it look alike


def count_quadrants(points: np.ndarray) -> np.ndarray:
    """How many of the points (M, 2), x and y in 0..1, lie in each of QUADRANTS, (4,); the middle belongs to the right and the lower one."""
    x, y = points.T
    found: np.ndarray = np.bincount((x >= 0.5).astype(int) + 2 * (y >= 0.5), minlength=4)
    return found


def estimate_density(points: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """How dense the points (M, 2), x and y in 0..1, lie, (cells, cells) by row and column; 1 everywhere would be uniform, the mean is 1.

    A Gaussian kernel of Scott's width, M^(-1/6) times the points' standard deviation along each side, at least half a cell; what it would
    put outside the image is spread over the inside. Raises ValueError for no points.
    """
    if not len(points):
        raise ValueError("a density needs at least one point")
    at = np.minimum((points.clip(0, 1) * cells).astype(int), cells - 1)
    counts = np.zeros((cells, cells))
    np.add.at(counts, (at[:, 1], at[:, 0]), 1.0)
    steps = np.arange(cells) / cells
    kernels = []
    for spread in points.std(axis=0)[::-1]:
        width = max(spread * len(points) ** (-1 / 6), 0.5 / cells)
        kernel = np.exp(-0.5 * ((steps[:, None] - steps) / width) ** 2)
        kernels.append(kernel / kernel.sum(axis=0))  # of every column the sum is 1: no point is lost at an edge
    rows, columns = kernels
    found: np.ndarray = rows @ counts @ columns.T * cells**2 / len(points)
    return found


def plot_centers(
    points: Sequence[np.ndarray], names: Sequence[str], path: str | Path, title: str = "Where the objects' centres lie"
) -> None:
    """A panel per class: its density in one colour scale, the share of each quadrant, and up to 400 of its points.

    points: of each class (M, 2), x and y in shares of the image's width and height, from the upper left corner; names: of the classes.
    The ending of `path` gives the form: png, pdf or svg. Raises InputError where there is no object.
    """
    shown = [(name, own) for name, own in zip(names, points, strict=True) if len(own)]
    if not shown:
        raise InputError("there are no objects whose centres could be shown")
    columns = min(len(shown), max(3, math.ceil(math.sqrt(len(shown)))))
    rows = math.ceil(len(shown) / columns)
    figure = new_figure(1.75 * columns + 1.2, 1.95 * rows + 0.45)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=DARK, fontfamily=colors.font_families([title]))
    scale = TwoSlopeNorm(1.0, 0.0, HIGHEST)
    colours = LinearSegmentedColormap.from_list("centres", ["#0072B2", "#f7f7f7", "#D55E00"])
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    for axes, (name, own) in zip(grid.flat, shown):
        axes.imshow(estimate_density(own), cmap=colours, norm=scale, extent=(0, 1, 1, 0), interpolation="bilinear")
        few = own[np.linspace(0, len(own) - 1, min(len(own), MOST_POINTS)).astype(int)]
        axes.plot(*few.T, ".", color=DARK, ms=1.2, alpha=0.5)
        axes.axhline(0.5, color=DARK, lw=0.7)
        axes.axvline(0.5, color=DARK, lw=0.7)
        parts = count_quadrants(own)
        for k, count in enumerate(parts):
            corner = (0.03 + 0.94 * (k % 2), 0.04 + 0.92 * (k // 2))
            put = {"ha": "right" if k % 2 else "left", "va": "bottom" if k // 2 else "top"}
            box = {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1.0}
            axes.text(*corner, f"{100 * count / len(own):.0f} %", fontsize=8, color=DARK, bbox=box, **put)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
        axes.set_title(
            f"{name}  {len(own):,}", loc="left", fontsize=9, color=DARK, fontfamily=colors.font_families([name])
        )
        axes.spines[:].set_color("#8c8c8c")
    bar = figure.colorbar(
        ScalarMappable(scale, colours), ax=grid, shrink=min(1.0, 1.6 / rows), aspect=20, pad=0.02, extend="max"
    )
    bar.outline.set_visible(False)
    bar.set_ticks([0, 1, 2, 3], labels=["0", "1, uniform", "2", "3"], fontsize=8, color=DARK)
    bar.set_label("density", color=DARK, fontsize=9)
    save_figure(figure, path)
