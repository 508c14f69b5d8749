"""The sections of a page that do not follow the threshold: metrics, errors, curves, calibration, origin."""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from fusedet.evaluation.calibration import Calibration
from fusedet.evaluation.formatting import format_interval, format_number
from fusedet.report.analysis import ERROR_TEXTS, RESAMPLES, Analysis, summarize_failures
from fusedet.report.charts import INK, Curve, class_hex, draw_curves, draw_intervals, draw_reliability
from fusedet.report.counts import DEFAULT
from fusedet.visualization.page import make_faint, make_plain_table, make_section
from fusedet.visualization.training_curves import loss_terms, smooth

MOST_CURVES = 10  # classes whose precision-recall curves have colors


def make_overview(analysis: Analysis) -> str:
    """Return the first screen: where it fails, the metrics, the error breakdown and AP by size."""
    sentences = "".join(f"<li>{escape(line)}</li>" for line in summarize_failures(analysis))
    metrics, tiles = analysis.metrics, ""
    for name in ("AP", "AP50", "AP75", "AR100", "mask_AP", "VOC_AP"):
        if name in metrics:
            ends = format_interval(analysis.intervals.get(name))
            tiles += (
                f"<div><dt>{name.replace('_', ' ')}</dt><dd>{format_number(metrics[name])}</dd><dd>{ends}</dd></div>"
            )
    sizes = draw_intervals(
        [(f"{row.name} ({row.objects:,})", row.ap, row.low, row.high) for row in analysis.sizes], "AP"
    )
    return (
        f'<section id="fails"><h2>Where it fails</h2><ul class="fails">{sentences}</ul><dl class="tiles">{tiles}</dl>'
        f'<div class="pair"><figure><h3>Error breakdown</h3>{_make_errors(analysis)}</figure>'
        f"<figure><h3>AP by object size (instances)</h3>{sizes}</figure></div>"
        + make_faint(
            f"Intervals are of 95 % over the {analysis.images:,} images, from {RESAMPLES} bootstrap resamples. "
            "An error costs what AP50 would gain without the errors of its type (TIDE); the gains do not add up."
        )
        + "</section>"
    )


def _make_errors(analysis: Analysis) -> str:
    """Return the error breakdown as a table with bars, the most costly first."""
    most = max((row["dAP"] for row in analysis.errors.values()), default=0) or 1
    rows = ""
    for name, row in sorted(analysis.errors.items(), key=lambda item: -item[1]["dAP"]):
        bar = f'<span class="bar" style="--w:{100 * row["dAP"] / most:.1f}%"></span>'
        rows += (
            f"<tr><td>{escape(ERROR_TEXTS[name])}</td><td>{row['count']:,}</td><td>{row['dAP']:.3f}</td>"
            f'<td class="cost">{bar}</td></tr>'
        )
    head = "<tr><th>type</th><th>errors</th><th>cost in AP50</th><th></th></tr>"
    return f'<div class="scroll"><table class="errors"><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def make_precision_recall(analysis: Analysis) -> str:
    """Return the precision-recall curves: their mean, and of more than ten classes the five best and worst."""
    rows = [(k, row) for k, row in enumerate(analysis.precision_recall["classes"]) if not math.isnan(row["AP"])]
    rows.sort(key=lambda item: item[1]["AP"])
    half = MOST_CURVES // 2
    shown = rows if len(rows) <= MOST_CURVES else [*rows[:half], *rows[-half:]]
    curves = []
    for place, (k, row) in enumerate(shown):
        color = class_hex(k if len(analysis.names) <= MOST_CURVES else place)
        dashed = len(shown) < len(rows) and place < half
        curves.append(
            Curve(f"{row['name']} {row['AP']:.3f}", row["recall"], _reached(row["precision"]), color, 1.5, dashed)
        )
    mean = analysis.precision_recall
    curves.append(
        Curve(
            f"mean of {len(rows)} classes {format_number(mean['AP'])}", mean["recall"], _reached(mean["mean"]), INK, 2.6
        )
    )
    note = f"At IoU 0.5, with AP50; of {len(rows)} classes the five best and the five worst (dashed)."
    return make_section(
        "Precision and recall",
        f'<figure class="chart">{draw_curves(curves, "recall", "precision", x_range=(0, 1), top=1.0)}</figure>'
        + (make_faint(note) if len(shown) < len(rows) else make_faint("At IoU 0.5, with AP50.")),
        "curves",
    )


def make_calibration(analysis: Analysis) -> str:
    """Return the reliability diagram and the expected calibration error."""
    if analysis.calibration is None or analysis.calibration_shown is None:
        content = make_faint("The scores do not lie in 0..1, so they say nothing about precision.")
        return make_section("Calibration", content, "calibration")
    own = analysis.calibration
    return make_section(
        "Calibration",
        "<p>Of a calibrated detector's detections of score 0.7, 70 % are true positives. Bars above the line are "
        "scores "
        "that are too low, bars below it scores that are too high; fewer detections make paler bars.</p>"
        f'<figure class="chart">{draw_reliability(own.edges, own.precision, own.count)}</figure>'
        f"<p>Expected calibration error: {_describe_ece(own)}; of the detections of score {DEFAULT / 100:.2f} or more "
        f"{_describe_ece(analysis.calibration_shown)}. A true positive matches an instance of its class at "
        "IoU 0.5.</p>",
        "calibration",
    )


def _describe_ece(calibration: Calibration) -> str:
    return f"{format_number(calibration.ece)} ({int(calibration.count.sum()):,} detections)"


def make_training(table: Mapping[str, np.ndarray]) -> str:
    """Return the learning curves of a run: losses, validation metrics and learning rate."""
    x_name = "step" if "step" in table else "epoch"
    x = table[x_name] if x_name in table else np.arange(len(next(iter(table.values()))), dtype=float)
    charts, span = [], (0.0, float(np.nanmax(x)))
    losses = []
    for i, name in enumerate(loss_terms(table)):
        losses.append(Curve(name, *_smooth_finite(x, table[name]), class_hex(i)))
    if "loss" in table:
        losses.append(Curve("loss", *_smooth_finite(x, table["loss"]), INK, 2))
    if "val_loss" in table:
        losses.append(Curve("validation loss", x, table["val_loss"], INK, 1.4, True, True))
    if losses:
        tops = [float(np.quantile(own.y[np.isfinite(own.y)], 0.98)) for own in losses if np.isfinite(own.y).any()]
        top = 1.25 * max(tops, default=0)
        charts.append(("Losses", draw_curves(losses, x_name, "loss", x_range=span, top=top if top > 0 else None)))
    scores = [name for name in ("AP75", "AP50", "mAP", "AP") if name in table]
    if scores:
        curves = [
            Curve(name, x, table[name], INK if name == "AP" else class_hex(i), 2 if name == "AP" else 1.5, dots=True)
            for i, name in enumerate(scores)
        ]
        charts.append(("Validation", draw_curves(curves, x_name, "AP", x_range=span)))
    if "lr" in table:
        charts.append(
            ("Learning rate", draw_curves([Curve("learning rate", x, table["lr"], INK)], x_name, "", x_range=span))
        )
    figures = "".join(f"<figure><h3>{name}</h3>{chart}</figure>" for name, chart in charts)
    return make_section("Training", f'<div class="charts">{figures}</div>', "training") if charts else ""


def make_metrics(analysis: Analysis) -> str:
    """Return all metrics as a table."""
    rows = []
    for name, value in analysis.metrics.items():
        if isinstance(value, (int, float)):
            ends = format_interval(analysis.intervals.get(name))
            rows.append((name.replace("_", " "), f"{format_number(value)}{f' ({ends})' if ends else ''}"))
    return make_section("All metrics", f"<details><summary>Show</summary>{make_plain_table(rows)}</details>", "metrics")


def make_origin(rows: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]]) -> str:
    """Return what was run on what: rows of name and text, and commands with what they did."""
    blocks = "".join(
        f"<p>{escape(name)}</p><pre tabindex=0><code>{escape(command)}</code></pre>" for name, command in commands
    )
    return make_section("How it was made", blocks + make_plain_table(rows), "origin")


def _smooth_finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    keep = np.isfinite(x) & np.isfinite(y)
    return smooth(x[keep], y[keep]) if keep.sum() > 100 else (x[keep], y[keep])


def _reached(precision: np.ndarray) -> np.ndarray:
    """Set the precision beyond the highest reached recall to NaN."""
    return np.where(precision > 0, precision, np.nan)
