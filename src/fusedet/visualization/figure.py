"""Matplotlib figures in one style, made without matplotlib's global state."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fusedet.atomic_io import write_atomically
from fusedet.errors import make_unknown_error
from fusedet.visualization import colors

DARK, PALE = "#262626", "#d4d4d4"
FORMATS = ("png", "pdf", "svg")


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Create an empty white figure of a size in inches, with a title for all its axes."""
    figure = Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=DARK, fontfamily=colors.font_families([title]))
    return figure


def new_axes(figure: Figure, title: str, x: str, y: str) -> Axes:
    """Add the only axes of a figure, with a title and axis labels."""
    axes = figure.add_subplot()
    style_axes(axes)
    set_title(axes, title)
    axes.set_xlabel(x, color=DARK)
    axes.set_ylabel(y, color=DARK)
    return axes


def set_title(axes: Axes, title: str, size: float = 12) -> None:
    """Set the title of axes at their left, in a font that has its letters."""
    axes.set_title(title, loc="left", fontsize=size, color=DARK, fontfamily=colors.font_families([title]))


def style_axes(axes: Axes) -> None:
    """Give axes two spines, a faint grid behind the data and small ticks."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#8c8c8c")
    axes.grid(True, color="#ebebeb", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(color="#8c8c8c", labelcolor=DARK, labelsize=9, length=3)


def add_legend(figure: Figure, handles: Sequence[Any]) -> None:
    """Add a legend at the right of a figure, in fonts that have its letters."""
    labels = [handle.get_label() for handle in handles]
    font = {"family": colors.font_families(labels), "size": 9}
    figure.legend(handles, labels, loc="outside right center", frameon=False, prop=font, labelcolor=DARK)


def plot_color(k: int) -> tuple[float, float, float]:
    """Return class k's color in matplotlib's range 0..1; yellow is darkened because it is too pale on white."""
    red, green, blue = colors.class_color(k)
    dim = 0.8 if (red, green, blue) == colors.FALSE_NEGATIVE else 1.0
    return dim * red / 255, dim * green / 255, dim * blue / 255


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure in the format that the file's suffix names: png, pdf or svg.

    Raises:
        InputError: The format is unknown.
        StorageError: The file cannot be written.
    """
    suffix = Path(path).suffix[1:].lower()
    if suffix not in FORMATS:
        raise make_unknown_error(f"format of the plot {path}", suffix, FORMATS)
    content = io.BytesIO()
    figure.savefig(content, format=suffix, bbox_inches="tight", pad_inches=0.08)
    write_atomically(Path(path), content.getbuffer())
