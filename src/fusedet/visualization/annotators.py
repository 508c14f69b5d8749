"""Rectangles with tags: lines that leave small objects visible, and tags that do not hide each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fusedet.errors import InputError
from fusedet.visualization import colors

Rectangle = tuple[int, int, int, int]


@dataclass(frozen=True)
class BoxAnnotation:
    """A box xyxy in a colour, with a tag where there is a text."""

    box: Sequence[float]
    colour: colors.Color
    text: str = ""
    dashed: bool = False
    thin: bool = False


@dataclass(frozen=True)
class LineStyle:
    """The width of a line and the height of the letters, in pixels."""

    line: int
    font: int

    @classmethod
    def of(cls, image: Image.Image, width: int | None) -> Self:
        """In proportion to the image, unless the width is given."""
        side = (image.width + image.height) / 2
        return cls(width or max(1, round(side / 260)), max(10, round(side / 40)))


def to_pil_image(image: Tensor) -> Image.Image:
    """A uint8 (3, H, W) tensor as an image; raises InputError for anything else."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"an image to draw on must be uint8 (3, H, W), it is {image.dtype} {tuple(image.shape)}")
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def draw_annotations(image: Image.Image, marks: Sequence[BoxAnnotation], pen: LineStyle) -> Image.Image:
    """The image with its marks, the first ones on top and the first to be tagged."""
    brush = ImageDraw.Draw(image, "RGBA")
    rectangles = [_around(mark, image, pen) for mark in marks]
    for mark, (box, line) in zip(reversed(marks), reversed(rectangles), strict=True):
        _draw_rectangle(brush, box, mark, line)
    placed: list[Rectangle] = []
    small = [box for box, _ in rectangles if (box[2] - box[0]) * (box[3] - box[1]) < 16 * pen.font**2]
    for mark, (box, _) in zip(marks, rectangles, strict=True):
        if mark.text:
            _tag(brush, image, mark, box, pen, placed, small)
    return image


def truncate_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _around(mark: BoxAnnotation, image: Image.Image, pen: LineStyle) -> tuple[Rectangle, int]:
    """The outer edge and the width of a line that lies outside of a small box and over the edge of a large one."""
    x1, y1, x2, y2 = mark.box
    side = min(x2 - x1, y2 - y1)
    line = max(1, pen.line // 2) if mark.thin or side < 8 * pen.line else pen.line
    out = line if side < 12 * line else line / 2
    left, top = (min(max(0, round(v - out)), size - 1) for v, size in ((x1, image.width), (y1, image.height)))
    right, bottom = (min(max(0, round(v + out) - 1), size - 1) for v, size in ((x2, image.width), (y2, image.height)))
    return (left, top, max(left, right), max(top, bottom)), line


def _draw_rectangle(brush: ImageDraw.ImageDraw, box: Rectangle, mark: BoxAnnotation, line: int) -> None:
    x1, y1, x2, y2 = box
    if mark.dashed:
        dash = max(3, 4 * line)
        for lo, hi, along in ((x1, x2, True), (y1, y2, False)):
            count = max(1, round((hi - lo) / dash)) // 2 * 2 + 1  # odd, so that both corners are drawn
            cuts = [round(lo + (hi - lo) * i / count) for i in range(count + 1)]
            for a, b in zip(cuts[::2], cuts[1::2], strict=True):
                for edge in (y1, y2 - line + 1) if along else (x1, x2 - line + 1):
                    part = (a, edge, b, edge + line - 1) if along else (edge, a, edge + line - 1, b)
                    brush.rectangle((part[0] - 1, part[1] - 1, part[2] + 1, part[3] + 1), (0, 0, 0, 70))
                    brush.rectangle(part, mark.colour)
    else:
        brush.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0, 110))
        brush.rectangle(box, outline=mark.colour, width=line)


def _tag(
    brush: ImageDraw.ImageDraw,
    image: Image.Image,
    mark: BoxAnnotation,
    box: Rectangle,
    pen: LineStyle,
    placed: list[Rectangle],
    small: list[Rectangle],
) -> None:
    """Write the tag beside the box where it hides other tags and small boxes the least, or nowhere where tags cover half of it."""
    font = colors.load_font(mark.text, pen.font)
    pad = max(2, pen.font // 4)
    text = truncate_text(mark.text, font, image.width - 2 * pad)
    width, height = round(font.getlength(text)) + 2 * pad, pen.font + pad
    x1, y1, x2, y2 = box
    best: tuple[float, Rectangle] | None = None
    sides = [
        (x1, y1 - height),
        (x1, y2 + 1),
        (x2 - width, y1 - height),
        (x2 - width, y2 + 1),
        (x2 + 1, y1),
        (x1 - width, y1),
        (x1, y1),
    ]
    for rank, (left, top) in enumerate(sides):
        x = min(max(0, left), max(0, image.width - width))
        y = min(max(0, top), max(0, image.height - height))
        here = (x, y, x + width - 1, y + height - 1)
        moved = abs(x - left) + abs(y - top)
        cost = _hidden(here, placed) + 0.3 * _hidden(here, small) + 0.02 * rank + 0.5 * moved / (width + height)
        if best is None or cost < best[0]:
            best = cost, here
    if best is None or _hidden(best[1], placed) > 0.5:
        return
    placed.append(best[1])
    left, top, right, bottom = best[1]
    brush.rectangle((left, top, right, bottom), (*mark.colour, 235))
    brush.text((left + pad, (top + bottom + 1) / 2), text, colors.text_color(mark.colour), font, anchor="lm")


def _hidden(tag: Rectangle, placed: list[Rectangle]) -> float:
    """The share of a tag that lies on others, from 0."""
    if not placed:
        return 0.0
    others = np.array(placed)
    wide = np.minimum(tag[2], others[:, 2]) - np.maximum(tag[0], others[:, 0]) + 1
    high = np.minimum(tag[3], others[:, 3]) - np.maximum(tag[1], others[:, 1]) + 1
    return float((wide.clip(0) * high.clip(0)).sum() / ((tag[2] - tag[0] + 1) * (tag[3] - tag[1] + 1)))
