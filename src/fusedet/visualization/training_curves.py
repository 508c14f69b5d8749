"""Plot of a training run: losses, learning rate and validation metrics."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from fusedet.errors import InputError
from fusedet.visualization.figure import DARK, new_figure, plot_color, save_figure, set_title, style_axes


def plot_training(metrics_csv: str | Path, path: str | Path, title: str = "Training") -> None:
    """Plot losses, learning rate and validation AP of a run against the step, or the epoch where no step is logged.

    Args:
        metrics_csv: A run's metrics.csv with the columns epoch, step, lr, loss, loss terms (loss_...) and validation
            metrics (AP..., AR..., mAP..., val_loss); cells may be empty.
        path: File to write; its suffix names the format: png, pdf or svg.
        title: Title of the plot.

    Raises:
        InputError: The file is absent or has no numbers.
    """
    table = read_columns(Path(metrics_csv))
    x_name = "step" if "step" in table else "epoch"
    x = table[x_name] if x_name in table else np.arange(len(next(iter(table.values()))), dtype=float)
    scores = [name for name in table if name.startswith(("AP", "mAP", "AR"))]
    terms = loss_terms(table)
    drawn = [group for group in ([*terms, "loss", "val_loss"], scores, ["lr"]) if any(name in table for name in group)]
    if not drawn:
        raise InputError(f"{metrics_csv} has no columns to draw: it must hold some of loss, lr, AP")
    ratios = [0.55 if group == ["lr"] else 1.0 for group in drawn]
    figure = new_figure(7.2, 0.8 + 2.3 * sum(ratios))
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    for axes, group in zip(panels, drawn, strict=True):
        style_axes(axes)
        axes.set_ylabel("AP" if group is scores else "learning rate" if group == ["lr"] else "loss", color=DARK)
        shown = [name for name in group if name in table]
        if group is scores:
            shown = [name for name in ("AP", "AP50", "AP75", "mAP") if name in scores] or scores[:4]
        curves = [_keep_finite(x, table[name]) for name in shown]
        for i, (name, (at, value)) in enumerate(zip(shown, curves)):
            color = DARK if name in ("loss", "lr") or (group is scores and i == 0) else plot_color(i)
            if group is scores:
                best = f", best {value.max():.3f}" if i == 0 and len(value) else ""
                axes.plot(at, value, "o-", ms=3, lw=1.8, color=color, label=name + best)
                continue
            if name == "val_loss":
                axes.plot(at, value, "s--", ms=3, lw=1.4, color=DARK, label="validation loss")
                continue
            if len(value) > 100 and name != "lr":
                axes.plot(at, value, lw=0.5, color=color, alpha=0.25)
                at, value = smooth(at, value)
            axes.plot(at, value, lw=1.6, color=color, label=name)
        if group is scores:
            axes.set_ylim(bottom=0)
        else:
            _limit_peaks(axes, [value for _, value in curves])
        if group != ["lr"]:
            axes.legend(frameon=False, fontsize=9, loc="best")
    set_title(panels[0], title)
    panels[-1].set_xlabel(x_name, color=DARK)
    figure.align_ylabels()
    save_figure(figure, path)


def loss_terms(columns: Iterable[str]) -> list[str]:
    """List the loss terms among a run's columns: the names that begin with loss_."""
    return [name for name in columns if name.startswith("loss_")]


def read_columns(file: Path) -> dict[str, np.ndarray]:
    """Read the columns of a CSV file as numbers, NaN for other cells; drop columns without numbers.

    Returns:
        The columns (rows,) of float64 by name.

    Raises:
        InputError: The file cannot be read, or has no number.
    """
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"metrics file {file} cannot be read: {error}") from error
    table = {name: np.array([_parse_number(row[name]) for row in rows]) for name in (rows[0] if rows else ()) if name}
    table = {name: column for name, column in table.items() if not np.isnan(column).all()}
    if not table:
        raise InputError(f"metrics file {file} has no numbers: it must have a header and one line per step or epoch")
    return table


def _parse_number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return float("nan")


def _keep_finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(x) & np.isfinite(y)
    return x[keep], y[keep]


def smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the running mean over a fiftieth of the run, without the ends that it does not cover."""
    width = max(3, len(y) // 50)
    kernel = np.full(width, 1 / width)
    return np.convolve(x, kernel, mode="valid"), np.convolve(y, kernel, mode="valid")


def _limit_peaks(axes: Axes, shown: list[np.ndarray]) -> None:
    """Let a few early peaks leave the panel, so that they do not flatten the rest of the curve."""
    values = np.concatenate(shown)
    top, most = float(np.quantile(values, 0.98)), float(values.max())
    axes.set_ylim(0 if values.min() >= 0 else None, 1.1 * (most if most < 2 * top else 1.3 * top) or None)
