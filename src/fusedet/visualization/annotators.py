"""Draw boxes with tags, so that small objects stay visible and tags do not hide each other."""

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
    """A box (xyxy) to draw, with an optional tag.

    Attributes:
        box: Corners x1, y1, x2, y2 in pixels.
        color: Color of the line and of the tag's background.
        text: Text of the tag; empty for none.
        dashed: Whether the line is dashed.
        thin: Whether the line has half the usual width.
    """

    box: Sequence[float]
    color: colors.Color
    text: str = ""
    dashed: bool = False
    thin: bool = False


@dataclass(frozen=True)
class LineStyle:
    """Line width and font size, in pixels."""

    width: int
    font_size: int

    @classmethod
    def for_image(cls, image: Image.Image, width: int | None) -> Self:
        """Return a style in proportion to the image; a given width replaces the computed one."""
        side = (image.width + image.height) / 2
        return cls(width or max(1, round(side / 260)), max(10, round(side / 40)))


def to_pil_image(image: Tensor) -> Image.Image:
    """Convert a uint8 (C, H, W) tensor to a PIL image: the first three channels as RGB, or the first one as gray.

    Raises:
        InputError: The tensor has another type or shape.
    """
    if image.dtype != torch.uint8 or image.ndim != 3 or not len(image):
        raise InputError(f"an image to draw on must be uint8 (C, H, W), it is {image.dtype} {tuple(image.shape)}")
    shown = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    return Image.fromarray(shown.permute(1, 2, 0).contiguous().cpu().numpy())


def draw_annotations(image: Image.Image, annotations: Sequence[BoxAnnotation], style: LineStyle) -> Image.Image:
    """Draw annotations into an image in place and return it.

    Args:
        image: RGB image.
        annotations: The first ones lie on top and get their tags first.
        style: Line width and font size.
    """
    canvas = ImageDraw.Draw(image, "RGBA")
    rectangles = [_place_line(annotation, image, style) for annotation in annotations]
    for annotation, (box, line) in zip(reversed(annotations), reversed(rectangles), strict=True):
        _draw_rectangle(canvas, box, annotation, line)
    placed: list[Rectangle] = []
    small = [box for box, _ in rectangles if (box[2] - box[0]) * (box[3] - box[1]) < 16 * style.font_size**2]
    for annotation, (box, _) in zip(annotations, rectangles, strict=True):
        if annotation.text:
            _draw_tag(canvas, image, annotation, box, style, placed, small)
    return image


def truncate_text(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Cut a text that is wider than `width` pixels and end it with an ellipsis."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _place_line(annotation: BoxAnnotation, image: Image.Image, style: LineStyle) -> tuple[Rectangle, int]:
    """Return a line's outer edge and width: outside of a small box, centered on the edge of a large one."""
    x1, y1, x2, y2 = annotation.box
    side = min(x2 - x1, y2 - y1)
    line = max(1, style.width // 2) if annotation.thin or side < 8 * style.width else style.width
    out = line if side < 12 * line else line / 2
    left, top = (min(max(0, round(v - out)), size - 1) for v, size in ((x1, image.width), (y1, image.height)))
    right, bottom = (min(max(0, round(v + out) - 1), size - 1) for v, size in ((x2, image.width), (y2, image.height)))
    return (left, top, max(left, right), max(top, bottom)), line


def _draw_rectangle(canvas: ImageDraw.ImageDraw, box: Rectangle, annotation: BoxAnnotation, line: int) -> None:
    x1, y1, x2, y2 = box
    if annotation.dashed:
        dash = max(3, 4 * line)
        for low, high, horizontal in ((x1, x2, True), (y1, y2, False)):
            count = max(1, round((high - low) / dash)) // 2 * 2 + 1  # odd, so that both corners are drawn
            cuts = [round(low + (high - low) * i / count) for i in range(count + 1)]
            for a, b in zip(cuts[::2], cuts[1::2], strict=True):
                for edge in (y1, y2 - line + 1) if horizontal else (x1, x2 - line + 1):
                    part = (a, edge, b, edge + line - 1) if horizontal else (edge, a, edge + line - 1, b)
                    canvas.rectangle((part[0] - 1, part[1] - 1, part[2] + 1, part[3] + 1), (0, 0, 0, 70))
                    canvas.rectangle(part, annotation.color)
    else:
        canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0, 110))
        canvas.rectangle(box, outline=annotation.color, width=line)


def _draw_tag(
    canvas: ImageDraw.ImageDraw,
    image: Image.Image,
    annotation: BoxAnnotation,
    box: Rectangle,
    style: LineStyle,
    placed: list[Rectangle],
    small: list[Rectangle],
) -> None:
    """Draw the tag where it hides tags and small boxes the least; skip it where tags cover half of it."""
    font = colors.load_font(annotation.text, style.font_size)
    pad = max(2, style.font_size // 4)
    text = truncate_text(annotation.text, font, image.width - 2 * pad)
    width, height = round(font.getlength(text)) + 2 * pad, style.font_size + pad
    x1, y1, x2, y2 = box
    positions = [
        (x1, y1 - height),
        (x1, y2 + 1),
        (x2 - width, y1 - height),
        (x2 - width, y2 + 1),
        (x2 + 1, y1),
        (x1 - width, y1),
        (x1, y1),
    ]
    candidates = []
    for rank, (left, top) in enumerate(positions):
        x = min(max(0, left), max(0, image.width - width))
        y = min(max(0, top), max(0, image.height - height))
        tag = (x, y, x + width - 1, y + height - 1)
        hidden, moved = _covered_fraction(tag, placed), (abs(x - left) + abs(y - top)) / (width + height)
        cost = hidden + 0.3 * _covered_fraction(tag, small) + 0.02 * rank + 0.5 * moved
        candidates.append((cost, rank, hidden, tag))
    _, _, hidden, tag = min(candidates)
    if hidden > 0.5:
        return
    placed.append(tag)
    canvas.rectangle(tag, (*annotation.color, 235))
    middle = (tag[1] + tag[3] + 1) / 2
    canvas.text((tag[0] + pad, middle), text, colors.text_color(annotation.color), font, anchor="lm")


def _covered_fraction(tag: Rectangle, rectangles: list[Rectangle]) -> float:
    """Return the summed overlap of a tag with rectangles, as a fraction of the tag's area."""
    corners = np.array(rectangles).reshape(-1, 4)
    width = np.minimum(tag[2], corners[:, 2]) - np.maximum(tag[0], corners[:, 0]) + 1
    height = np.minimum(tag[3], corners[:, 3]) - np.maximum(tag[1], corners[:, 1]) + 1
    return float((width.clip(0) * height.clip(0)).sum() / ((tag[2] - tag[0] + 1) * (tag[3] - tag[1] + 1)))
