"""Plots of the distribution of box centers in the image, per class, as in Figure 5 of MSIL (Wang et al., 2023)."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm

from fusedet.errors import InputError
from fusedet.visualization.figure import DARK, new_figure, save_figure, set_title

CELLS = 32  # of the density grid, per side
QUADRANTS = ("upper left", "upper right", "lower left", "lower right")
MAX_POINTS = 400  # drawn per class
MAX_DENSITY = 3.0  # end of the color scale


def count_quadrants(points: np.ndarray) -> np.ndarray:
    """Count the points in each of QUADRANTS; the middle belongs to the right and the lower ones.

    Args:
        points: (M, 2) x and y in 0..1.

    Returns:
        (4,) counts.
    """
    x, y = points.T
    counts: np.ndarray = np.bincount((x >= 0.5).astype(int) + 2 * (y >= 0.5), minlength=4)
    return counts


def estimate_density(points: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """Estimate the density of points on a grid; its mean is 1, and a uniform distribution is 1 everywhere.

    The Gaussian kernel has Scott's width: M^(-1/6) times the points' standard deviation along each axis, and at least
    half a cell. Mass outside the image is redistributed inside.

    Args:
        points: (M, 2) x and y in 0..1.
        cells: Number of cells per side.

    Returns:
        (cells, cells) densities by row and column.

    Raises:
        ValueError: There are no points.
    """
    if not len(points):
        raise ValueError("a density needs at least one point")
    indices = np.minimum((points.clip(0, 1) * cells).astype(int), cells - 1)
    counts = np.bincount(indices @ (1, cells), minlength=cells**2).reshape(cells, cells)
    steps = np.arange(cells) / cells
    kernels = []
    for spread in points.std(axis=0)[::-1]:
        width = max(spread * len(points) ** (-1 / 6), 0.5 / cells)
        kernel = np.exp(-0.5 * ((steps[:, None] - steps) / width) ** 2)
        kernels.append(kernel / kernel.sum(axis=0))  # every column sums to 1: no point is lost at a border
    rows, columns = kernels
    density: np.ndarray = rows @ counts @ columns.T * cells**2 / len(points)
    return density


def plot_centers(
    points: Sequence[np.ndarray], names: Sequence[str], path: str | Path, title: str = "Distribution of box centers"
) -> None:
    """Plot a panel per class: density, share of each quadrant, and up to MAX_POINTS points.

    Classes without points have no panel. All panels share one color scale.

    Args:
        points: Per class (M, 2) x and y as shares of the image's width and height, from the upper left corner.
        names: The class names.
        path: The file to write: .png, .pdf or .svg.
        title: Title of the figure.

    Raises:
        InputError: There are no points at all.
    """
    panels = [(name, own) for name, own in zip(names, points, strict=True) if len(own)]
    if not panels:
        raise InputError("there are no annotations whose centers could be plotted")
    columns = min(len(panels), max(3, math.ceil(math.sqrt(len(panels)))))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(1.75 * columns + 1.2, 1.95 * rows + 0.45, title)
    scale = TwoSlopeNorm(1.0, 0.0, MAX_DENSITY)
    colors = LinearSegmentedColormap.from_list("centers", ["#0072B2", "#f7f7f7", "#D55E00"])
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (name, own) in zip(grid.flat, panels):
        axes.imshow(estimate_density(own), cmap=colors, norm=scale, extent=(0, 1, 1, 0), interpolation="bilinear")
        sample = own[np.linspace(0, len(own) - 1, min(len(own), MAX_POINTS)).astype(int)]
        axes.plot(*sample.T, ".", color=DARK, ms=1.2, alpha=0.5)
        axes.axhline(0.5, color=DARK, lw=0.7)
        axes.axvline(0.5, color=DARK, lw=0.7)
        for k, count in enumerate(count_quadrants(own)):
            corner = (0.03 + 0.94 * (k % 2), 0.04 + 0.92 * (k // 2))
            alignment = {"ha": "right" if k % 2 else "left", "va": "bottom" if k // 2 else "top"}
            box = {"fc": "white", "ec": "none", "alpha": 0.75, "pad": 1.0}
            axes.text(*corner, f"{100 * count / len(own):.0f} %", fontsize=8, color=DARK, bbox=box, **alignment)
        axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[])
        set_title(axes, f"{name}  {len(own):,}", 9)
        axes.spines[:].set_color("#8c8c8c")
    bar = figure.colorbar(
        ScalarMappable(scale, colors), ax=grid, shrink=min(1.0, 1.6 / rows), aspect=20, pad=0.02, extend="max"
    )
    bar.outline.set_visible(False)
    bar.set_ticks([0, 1, 2, 3], labels=["0", "1, uniform", "2", "3"], fontsize=8, color=DARK)
    bar.set_label("density", color=DARK, fontsize=9)
    save_figure(figure, path)
