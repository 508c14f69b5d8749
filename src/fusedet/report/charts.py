"""Charts as inline SVG in the colors of the page."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from matplotlib.colors import to_hex

from fusedet.visualization.figure import plot_color

INK = "currentColor"
_WIDTH, _HEIGHT = 440, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 10, 40  # margins around the axes
_MOST_POINTS = 300  # of a curve


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: What the legend says.
        x: (N,).
        y: (N,); points that are not finite are left out.
        color: A CSS color.
        width: In pixels.
        dashed: Whether the line is dashed.
        dots: Whether each point has a dot.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    color: str
    width: float = 1.6
    dashed: bool = False
    dots: bool = False


def class_hex(k: int) -> str:
    """Return class k's color in plots, as a CSS color."""
    return to_hex(plot_color(k))


def draw_curves(
    curves: Sequence[Curve],
    x_label: str,
    y_label: str,
    *,
    x_range: tuple[float, float] | None = None,
    top: float | None = None,
    diagonal: bool = False,
) -> str:
    """Draw curves over common axes, with a legend of text below them.

    Args:
        curves: The curves, the last one on top.
        x_label: Name of the x axis.
        y_label: Name of the y axis, which begins at 0; may be empty.
        x_range: Ends of the x axis, by default those of the curves.
        top: End of the y axis, by default a little above the curves.
        diagonal: Whether x = y is drawn.
    """
    shown = [_thin(curve) for curve in curves]
    xs = np.concatenate([x for x, _ in shown])
    ys = np.concatenate([y for _, y in shown])
    low, high = x_range or ((float(xs.min()), float(xs.max())) if len(xs) else (0.0, 1.0))
    high = high if high > low else low + 1
    top = top or (1.05 * float(ys.max()) if len(ys) and ys.max() > 0 else 1.0)
    lines = _draw_axes((low, high), top, x_label, y_label)
    if diagonal:
        lines += _path([(low, low), (high, high)], (low, high), top, 'stroke="var(--rest)" stroke-dasharray="4 3"')
    for curve, (x, y) in zip(curves, shown, strict=True):
        dash = ' stroke-dasharray="5 3"' if curve.dashed else ""
        style = f'stroke="{curve.color}" stroke-width="{curve.width:g}"{dash}'
        lines += _path(zip(x.tolist(), y.tolist()), (low, high), top, style)
        if curve.dots:
            for px, py in zip(x.tolist(), y.tolist()):
                cx, cy = _place(px, py, (low, high), top)
                lines += f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="3" fill="{curve.color}"/>'
    keys = "".join(
        f'<li><span class="key{" dashed" if curve.dashed else ""}" style="--c:{curve.color}"></span>'
        f"{escape(curve.name)}</li>"
        for curve in reversed(curves)
    )
    return f'{_wrap(lines, f"{y_label or curves[-1].name} over {x_label}")}<ul class="legend">{keys}</ul>'


def draw_reliability(edges: np.ndarray, precision: np.ndarray, count: np.ndarray) -> str:
    """Draw the precision in bins of the score as bars, against the diagonal; fewer detections make paler bars."""
    span = (0.0, 1.0)
    lines = _draw_axes(span, 1.0, "score", "precision")
    most = max(1, int(count.max(initial=0)))
    for low, high, value, n in zip(edges[:-1].tolist(), edges[1:].tolist(), precision.tolist(), count.tolist()):
        if n:
            (left, y), (right, floor) = _place(low, value, span, 1.0), _place(high, 0, span, 1.0)
            pale = 0.35 + 0.65 * math.sqrt(n / most)
            lines += (
                f'<rect x="{left + 1:.1f}" y="{y:.1f}" width="{right - left - 2:.1f}" height="{floor - y:.1f}" '
                f'fill="{class_hex(0)}" fill-opacity="{pale:.2f}">'
                f"<title>score {low:.1f} to {high:.1f}: {n:,} detections, precision {value:.3f}</title></rect>"
            )
    lines += _path([(0, 0), (1, 1)], span, 1.0, 'stroke="currentColor" stroke-dasharray="4 3"')
    return _wrap(lines, "precision over score")


def draw_intervals(rows: Sequence[tuple[str, float, float, float]], label: str) -> str:
    """Draw a value and its interval per row (name, value, low, high); a value that is not finite has no mark."""
    left, step, top = 176, 28, 6
    height = top + step * len(rows) + 38
    values = [v for _, *three in rows for v in three if math.isfinite(v)]
    most = 1.02 * max([0.05, *values])
    scale = (_WIDTH - left - 16) / most
    floor = top + step * len(rows)
    lines = ""
    for tick in _ticks(most):
        x = left + scale * tick
        lines += f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}" stroke="var(--grid)"/>'
        lines += f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{tick:g}</text>'
    for i, (name, value, low, high) in enumerate(rows):
        y = top + step * (i + 0.5)
        lines += f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{escape(name)}</text>'
        if math.isfinite(low) and math.isfinite(high):
            ends = f'x1="{left + scale * low:.1f}" x2="{left + scale * high:.1f}"'
            lines += f'<line {ends} y1="{y}" y2="{y}" stroke="{class_hex(6)}" stroke-width="3" stroke-linecap="round"/>'
        if math.isfinite(value):
            lines += f'<circle cx="{left + scale * value:.1f}" cy="{y}" r="4.5" fill="{class_hex(0)}"/>'
        else:
            lines += f'<text x="{left + 6}" y="{y + 4:.1f}" class="faint">no instances</text>'
    lines += f'<text x="{left + (_WIDTH - left - 16) / 2}" y="{floor + 33}" text-anchor="middle">{escape(label)}</text>'
    return _wrap(lines, label, height)


def _draw_axes(x_range: tuple[float, float], top: float, x_label: str, y_label: str) -> str:
    low, high = x_range
    floor, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    lines = ""
    for tick in _ticks(top):
        y = _place(low, tick, x_range, top)[1]
        lines += f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--grid)"/>'
        lines += f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
    for tick in _ticks(high - low, 5):
        x = _place(low + tick, 0, x_range, top)[0]
        lines += f'<text x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{low + tick:g}</text>'
    lines += f'<path d="M{_LEFT} {_TOP}V{floor}H{right}" fill="none" stroke="var(--rest)"/>'
    lines += f'<text x="{(_LEFT + right) / 2}" y="{floor + 34}" text-anchor="middle">{escape(x_label)}</text>'
    if not y_label:
        return lines
    middle = (_TOP + floor) / 2
    turn = f'transform="rotate(-90 11 {middle})"'
    return lines + f'<text x="11" y="{middle}" text-anchor="middle" {turn}>{escape(y_label)}</text>'


def _path(points: Iterable[tuple[float, float]], x_range: tuple[float, float], top: float, style: str) -> str:
    steps = [_place(x, y, x_range, top) for x, y in points]
    return f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in steps)}" fill="none" {style}/>' if steps else ""


def _place(x: float, y: float, x_range: tuple[float, float], top: float) -> tuple[float, float]:
    """Return where a point lies in the chart, in pixels; what is above the y axis lies at its end."""
    low, high = x_range
    across = _LEFT + (x - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)
    return across, _HEIGHT - _BOTTOM - min(y / top, 1) * (_HEIGHT - _TOP - _BOTTOM)


def _ticks(top: float, count: int = 4) -> list[float]:
    """Return round numbers from 0 up to `top`."""
    power = 10 ** math.floor(math.log10(top / count))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m * count >= 0.999 * top)
    return [round(i * step, 12) for i in range(int(top / step + 1e-9) + 1)]


def _thin(curve: Curve) -> tuple[np.ndarray, np.ndarray]:
    """Return at most `_MOST_POINTS` finite points of a curve, evenly chosen."""
    keep = np.flatnonzero(np.isfinite(curve.x) & np.isfinite(curve.y))
    if len(keep) > _MOST_POINTS:
        keep = keep[np.linspace(0, len(keep) - 1, _MOST_POINTS).round().astype(int)]
    return curve.x[keep], curve.y[keep]


def _wrap(lines: str, name: str, height: float = _HEIGHT) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:g}" role="img" aria-label="{escape(name)}">{lines}</svg>'
