"""Draw the data flow of the four modules: `python docs/drawings.py [FOLDER]` writes mse_fpn, smsl, msil and msfm.png.

The default folder is docs/images. The content is in drawings.yaml. One unit is a pixel of an image 900 wide; y goes
down. Colors are those of fusedet.visualization.colors.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from matplotlib.patheffects import Normal, Stroke
from matplotlib.text import Text
from PIL import Image

from fusedet.visualization.colors import class_color

matplotlib.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})

T = TypeVar("T")
DATA = Path(__file__).with_name("drawings.yaml")
WIDTH, SCALE = 900, 100  # units, and units per inch
INK, SOFT = "#222222", "#555555"
KINDS = {
    "map": (0, 0.45, "a map"),
    "learned": (1, 0.45, "with parameters"),
    "plain": (None, 0.0, "without parameters"),
    "own": (2, 0.45, "the module"),
}
"""By kind of box: number of its color, fraction of the color, and text of the legend."""


@dataclass(frozen=True)
class Box:
    """A box with a text.

    x, y: center. kind: one of KINDS, or "node" (a circle with a sign), "joint" (where lines branch), "corner", "text".
    copies: number of sheets behind it.
    """

    name: str
    x: float
    y: float
    text: str = ""
    kind: str = "plain"
    w: float = 84
    h: float = 34
    copies: int = 0


@dataclass(frozen=True)
class Line:
    """A line from "box.side" to "box.side", side one of l r t b, with "@120" for that row or column of a long side.

    via: "" is straight, "-|" first horizontal, "|-" first vertical, "|-|" vertical to row `at` and horizontal along it.
    label: text beside segment number `part` (the longest by default), moved by `shift`. head: whether it has an
    arrowhead.
    """

    start: str
    end: str
    via: str = ""
    at: float = 0
    label: str = ""
    part: int | None = None
    shift: tuple[float, float] = (0, 0)
    head: bool = True


@dataclass(frozen=True)
class Group:
    """A frame with a title around boxes."""

    left: float
    top: float
    right: float
    bottom: float
    title: str
    title_x: float | None = None


@dataclass(frozen=True)
class Drawing:
    """The content of one image; note: text beside the legend."""

    height: float
    groups: tuple[Group, ...]
    boxes: tuple[Box, ...]
    lines: tuple[Line, ...]
    note: str = "shapes without the batch; numbers in brackets: the paper's equations"


PARTS: dict[str, type] = {"groups": Group, "boxes": Box, "lines": Line}


def mix_with_white(number: int | None, fraction: float) -> tuple[float, float, float]:
    """Mix a class color with white."""
    red, green, blue = class_color(number) if number is not None else (255, 255, 255)
    return (1 - fraction * (1 - red / 255), 1 - fraction * (1 - green / 255), 1 - fraction * (1 - blue / 255))


def write_text(ax: Axes, x: float, y: float, text: str, size: float = 8.4, **options: object) -> Text:
    """Write a text centered at (x, y); texts beside lines get a white border."""
    settings = {"ha": "center", "va": "center", "color": INK, "linespacing": 1.25, "zorder": 6} | options
    drawn = ax.text(x, y, text, fontsize=size, **settings)  # type: ignore[arg-type]
    drawn.set_path_effects([Stroke(linewidth=2, foreground="white"), Normal()] if settings["zorder"] == 5 else [])
    return drawn


def draw_box(ax: Axes, b: Box) -> None:
    """Draw a box, node or joint with its text."""
    if b.kind in ("joint", "node"):
        radius, face = (2.6, INK) if b.kind == "joint" else (10, "white")
        ax.add_patch(Circle((b.x, b.y), radius, fc=face, ec=INK, lw=1, zorder=4))
    elif b.kind in KINDS:
        number, fraction, _ = KINDS[b.kind]
        for i in range(b.copies, -1, -1):
            corner = (b.x - b.w / 2 + 4 * i, b.y - b.h / 2 - 4 * i)
            ax.add_patch(
                FancyBboxPatch(
                    corner,
                    b.w,
                    b.h,
                    "round,pad=0,rounding_size=4",
                    fc=mix_with_white(number, fraction),
                    ec=INK,
                    lw=0.9,
                    zorder=4,
                )
            )
    write_text(ax, b.x, b.y, b.text, size=11 if b.kind == "node" else 8.4)


def locate_side(boxes: dict[str, Box], place: str) -> tuple[float, float]:
    """Return the point named "box.side" or "box.side@120"."""
    name, _, side = place.partition(".")
    side, _, at = side.partition("@")
    b = boxes[name]
    w, h = {"joint": (0.0, 0.0), "corner": (0.0, 0.0), "node": (10.0, 10.0)}.get(b.kind, (b.w / 2, b.h / 2))
    behind = 4 * b.copies
    x, y = b.x + {"l": -w, "r": w + behind}.get(side, 0), b.y + {"t": -h - behind, "b": h}.get(side, 0)
    if not at:
        return x, y
    return (x, float(at)) if side in "lr" else (float(at), y)


def draw_line(ax: Axes, boxes: dict[str, Box], line: Line) -> None:
    """Draw a line with its arrowhead and label."""
    (x0, y0), (x1, y1) = locate_side(boxes, line.start), locate_side(boxes, line.end)
    corners = {"": [], "-|": [(x1, y0)], "|-": [(x0, y1)], "|-|": [(x0, line.at), (x1, line.at)]}
    points = [(x0, y0), *corners[line.via], (x1, y1)]
    ax.plot(*zip(*points), color=INK, lw=1.1, solid_joinstyle="round", zorder=2)
    if line.head:
        style = {"arrowstyle": "-|>,head_width=0.2,head_length=0.42", "color": INK, "lw": 1.1}
        ax.annotate("", points[-1], points[-2], arrowprops=style, zorder=3)
    if line.label:
        parts = list(pairwise(points))
        (ax0, ay0), (ax1, ay1) = (
            max(parts, key=lambda ends: math.dist(*ends)) if line.part is None else parts[line.part]
        )
        x, y = (ax0 + ax1) / 2 + line.shift[0], (ay0 + ay1) / 2 + line.shift[1]
        where = (x, y - 3, "center", "bottom") if ay0 == ay1 else (x + 4, y, "left", "center")
        write_text(ax, *where[:2], line.label, 7.4, ha=where[2], va=where[3], color=SOFT, zorder=5)


def draw_figure(drawing: Drawing) -> Figure:
    """Draw a figure with a legend in its last row."""
    figure = Figure(figsize=(WIDTH / SCALE, drawing.height / SCALE))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(drawing.height, 0))
    ax.axis("off")
    for g in drawing.groups:
        ax.add_patch(
            Rectangle((g.left, g.top), g.right - g.left, g.bottom - g.top, fc="#f6f6f6", ec="#bbbbbb", lw=0.9, zorder=0)
        )
        write_text(ax, g.title_x or g.left + 8, g.top + 12, g.title, 8.8, ha="left", fontweight="bold")
    boxes = {b.name: b for b in drawing.boxes}
    for line in drawing.lines:
        draw_line(ax, boxes, line)
    for b in drawing.boxes:
        draw_box(ax, b)
    x, y = 12.0, drawing.height - 14
    for kind in (k for k in KINDS if any(b.kind == k for b in drawing.boxes)):
        draw_box(ax, Box(kind, x + 11, y, "", kind, 22, 14))
        write_text(ax, x + 28, y, KINDS[kind][2], 7.8, ha="left", va="center_baseline", color=SOFT)
        x += 46 + 6 * len(KINDS[kind][2])
    write_text(ax, WIDTH - 10, y, drawing.note, 7.8, ha="right", va="center_baseline", color=SOFT)
    return figure


def read_drawing(entries: dict[str, Any]) -> Drawing:
    """Read a section of drawings.yaml; an entry lists values in the order of the class, then other fields."""

    def make(kind: type[T], values: list[Any]) -> T:
        named = values[-1] if isinstance(values[-1], dict) else {}
        return kind(*(values[:-1] if named else values), **named)

    parts: dict[str, Any] = {key: tuple(make(kind, entry) for entry in entries[key]) for key, kind in PARTS.items()}
    return Drawing(**entries | parts)


def main(folder: Path) -> None:
    """Write every drawing as a PNG of twice the display size."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in yaml.safe_load(DATA.read_text()).items():
        pixels = BytesIO()
        draw_figure(read_drawing(entries)).savefig(pixels, dpi=2 * SCALE)
        Image.open(pixels).convert("RGB").quantize(64).save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else DATA.parent / "images")
