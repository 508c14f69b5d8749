"""Plot of latency against AP."""

from collections.abc import Sequence
from pathlib import Path

from fusedet.visualization.figure import DARK, add_legend, new_axes, new_figure, plot_color, save_figure


def plot_latency(points: Sequence[tuple[str, float, float]], path: str | Path, title: str = "") -> None:
    """Plot the AP of models against their latency; the fastest of the most accurate ones is at the top left.

    Args:
        points: Label, milliseconds and AP of each.
        path: File to write; its suffix names the format: png, pdf or svg.
        title: What was measured.

    Raises:
        InputError: The format is unknown.
        StorageError: The file cannot be written.
    """
    figure = new_figure(7.2, 4.2)
    axes = new_axes(figure, title, "latency from file to boxes, p50 (ms)", "AP")
    handles = []
    for i, (label, milliseconds, ap) in enumerate(points):
        handles += axes.plot(milliseconds, ap, "o", color=plot_color(i), ms=7, label=f"{i + 1}  {label}")
        axes.annotate(str(i + 1), (milliseconds, ap), (6, 5), textcoords="offset points", fontsize=8, color=DARK)
    axes.set_xlim(left=0)
    axes.margins(0.15)
    axes.ticklabel_format(useOffset=False)
    add_legend(figure, handles)
    save_figure(figure, path)
