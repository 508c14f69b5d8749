"""Figures in one clean style, by matplotlib's objects: its global state is neither read nor changed."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusedet.errors import InputError, unknown
from fusedet.visualization import colors

DARK, PALE = "#262626", "#d4d4d4"
FORMS = ("png", "pdf", "svg")


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def new_axes(figure: Figure, title: str, x: str, y: str) -> Axes:
    """The figure's only axes, with its title and labels."""
    axes = figure.add_subplot()
    style_axes(axes)
    axes.set_title(title, loc="left", fontsize=12, color=DARK, fontfamily=colors.font_families([title]))
    axes.set_xlabel(x, color=DARK)
    axes.set_ylabel(y, color=DARK)
    return axes


def style_axes(axes: Axes) -> None:
    """Two spines, a faint grid behind, small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8c8c8c")
    axes.grid(True, color="#ebebeb", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color="#8c8c8c", labelcolor=DARK, labelsize=9, length=3)


def plot_color(k: int) -> tuple[float, float, float]:
    """Class k's colour in matplotlib's 0..1; yellow, too pale on white, is darkened."""
    red, green, blue = colors.class_color(k)
    dim = 0.8 if (red, green, blue) == colors.FALSE_NEGATIVE else 1.0
    return dim * red / 255, dim * green / 255, dim * blue / 255


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure in the form that the file's ending names. Raises InputError for another form or a place that cannot be written."""
    form = Path(path).suffix[1:].lower()
    if form not in FORMS:
        raise unknown(f"form of the plot {path}", form, FORMS)
    try:
        figure.savefig(path, format=form, bbox_inches="tight", pad_inches=0.08)
    except OSError as error:
        raise InputError(f"plot {path} cannot be written: {error.strerror}") from error
