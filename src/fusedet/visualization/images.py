"""Boxes, masks and mistakes drawn into images, and images in a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.greedy_match import IGNORED, match_greedily
from fusedet.visualization import colors
from fusedet.visualization.annotators import BoxAnnotation, LineStyle, draw_annotations, to_pil_image, truncate_text


def draw_boxes(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    scores: Tensor | None = None,
    masks: Tensor | None = None,
    ignore: Tensor | None = None,
    width: int | None = None,
) -> Image.Image:
    """The image with its objects: a colour per class and a tag with the name and, where given, the score.

    image uint8 (3, H, W); boxes (N, 4) xyxy in its pixels; labels (N,) 0..K-1; names (K,); scores (N,) in 0..1; masks
    (N, H, W) bool; ignore (I, 4), boxes that do not count, drawn grey and dashed; width, the lines' in pixels, else it
    grows with the image. Tags stay inside the image; one that would hide another one is left out, best scores first.
    Raises InputError for a label without a name and for shapes that do not fit.
    """
    drawing = to_pil_image(image)
    _check(boxes, labels, names)
    sides = boxes[:, 2:] - boxes[:, :2]
    order = (sides.prod(dim=1) if scores is None else -scores).argsort(stable=True)  # what comes first lies on top
    corners, classes = boxes[order].tolist(), labels.to(order.device)[order].tolist()
    shown = [names[k] for k in classes]
    if scores is not None:
        shown = [f"{name} {score:.2f}" for name, score in zip(shown, scores[order].tolist(), strict=True)]
    if masks is not None:
        drawing = _blend(drawing, masks[order.to(masks.device)].cpu().numpy(), classes)
    marks = [
        BoxAnnotation(box, colors.class_color(k), text) for box, k, text in zip(corners, classes, shown, strict=True)
    ]
    marks += [BoxAnnotation(box, colors.GREY, dashed=True) for box in ([] if ignore is None else ignore.tolist())]
    return draw_annotations(drawing, marks, LineStyle.of(drawing, width))


def draw_comparison(
    image: Tensor,
    truth: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor, Tensor],
    names: Sequence[str],
    *,
    score: float = 0.3,
    iou: float = 0.5,
    ignore: tuple[Tensor, Tensor] | None = None,
) -> Image.Image:
    """Detections against the truth, with a legend below that counts what was found, false, missed and confused, which is both.

    image uint8 (3, H, W); truth (boxes (G, 4), labels (G,)); found (boxes (D, 4), labels (D,), scores (D,)), of which
    those of at least `score` are drawn; ignore (boxes, labels) of objects that do not count. Matched as in `greedy_match.match_greedily`.
    True boxes of what was found are thin, white and dashed. Raises InputError for a label without a name.
    """
    drawing = to_pil_image(image)
    best = found[2].argsort(descending=True, stable=True)
    best = best[found[2][best] >= score]
    guesses, labels, scores = (part[best].cpu().numpy() for part in found)
    objects, classes = (part.cpu().numpy() for part in truth)
    idle, idle_classes = (
        (np.zeros((0, 4)), np.zeros(0, int)) if ignore is None else (part.cpu().numpy() for part in ignore)
    )
    for part in (truth, found[:2]):
        _check(part[0], part[1], names)
    owner = match_greedily(
        guesses.astype(float), labels, objects.astype(float), classes, idle.astype(float), idle_classes, iou
    )

    groups: dict[str, list[BoxAnnotation]] = {"missed": [], "false": [], "confused": [], "found": []}
    rest = [BoxAnnotation(box, colors.GREY, dashed=True) for box in idle.tolist()]
    for box, k, s, g in zip(guesses.tolist(), labels.tolist(), scores.tolist(), owner.tolist(), strict=True):
        text = f"{names[k]} {s:.2f}"
        if g == IGNORED:
            rest.append(BoxAnnotation(box, colors.GREY, text))
        elif g < 0:
            groups["false"].append(BoxAnnotation(box, colors.FALSE_POSITIVE, text))
        elif classes[g] == k:
            groups["found"].append(BoxAnnotation(box, colors.TRUE_POSITIVE, text))
        else:
            groups["confused"].append(BoxAnnotation(box, colors.WRONG_CLASS, f"{text}, is {names[classes[g]]}"))
    for g, (box, k) in enumerate(zip(objects.tolist(), classes.tolist(), strict=True)):
        if g in owner:
            rest.append(BoxAnnotation(box, colors.WHITE, dashed=True, thin=True))
        else:
            groups["missed"].append(BoxAnnotation(box, colors.FALSE_NEGATIVE, names[k], dashed=True))
    pen = LineStyle.of(drawing, None)
    marks = [mark for group in groups.values() for mark in group]
    confused = len(groups["confused"])  # a miss and a false detection, as F1 counts it
    legend = [
        (f"found {len(groups['found'])}", colors.TRUE_POSITIVE, False),
        (f"missed {len(groups['missed']) + confused}", colors.FALSE_NEGATIVE, True),
        (f"false {len(groups['false']) + confused}", colors.FALSE_POSITIVE, False),
        (f"wrong class {confused}{' (in both)' if confused else ''}", colors.WRONG_CLASS, False),
        ("truth", colors.WHITE, True),
    ]
    return _legend(draw_annotations(drawing, [*marks, *rest], pen), legend, pen)


def draw_image_grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None, cell: int = 320
) -> Image.Image:
    """Images in rows on white, each made to fit `cell` pixels, with a line of text below; about square by default.

    Raises InputError where there is no image or the captions are not one per image.
    """
    if not images:
        raise InputError("a grid needs at least one image")
    if captions is not None and len(captions) != len(images):
        raise InputError(f"a grid of {len(images)} images needs as many captions, got {len(captions)}")
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    gap, size = max(4, cell // 40), max(10, cell // 28)
    scaled = [_fitted(drawing, cell) for drawing in images]
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    line = 0 if captions is None else round(size * 1.6)
    heights = [max(drawing.height for drawing in row) for row in rows]
    sheet = Image.new(
        "RGB", (columns * (cell + gap) + gap, sum(heights) + len(rows) * (line + gap) + gap), colors.WHITE
    )
    pen = ImageDraw.Draw(sheet)
    top = gap
    for r, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for c, drawing in enumerate(row):
            left = gap + c * (cell + gap)
            sheet.paste(drawing, (left + (cell - drawing.width) // 2, top + (height - drawing.height) // 2))
            if captions is not None:
                caption = captions[r * columns + c]
                font = colors.load_font(caption, size)
                pen.text(
                    (left + cell / 2, top + height + line / 2),
                    truncate_text(caption, font, cell),
                    (40, 40, 40),
                    font,
                    anchor="mm",
                )
        top += height + line + gap
    return sheet


def _fitted(drawing: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(drawing.size)
    size = max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale))
    return drawing.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _check(boxes: Tensor, labels: Tensor, names: Sequence[str]) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise InputError(
            f"boxes must be (N, 4) with labels (N,), they are {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if len(labels) and not 0 <= low <= high < len(names):
        raise InputError(f"labels must lie in 0..{len(names) - 1}, one per class name, they reach from {low} to {high}")


def _blend(drawing: Image.Image, masks: np.ndarray, classes: list[int]) -> Image.Image:
    """Masks (N, H, W) in their classes' colours, the first on top: a veil inside and a line along the border."""
    pixels = np.asarray(drawing).astype(np.float32)
    if masks.shape[1:] != pixels.shape[:2]:
        raise InputError(f"masks must be as large as the image, {pixels.shape[:2]}, they are {masks.shape[1:]}")
    for mask, k in zip(masks[::-1].astype(bool), classes[::-1], strict=True):
        inner = mask.copy()
        for axis in (0, 1):
            for step in (1, -1):
                inner &= np.roll(np.pad(mask, 1), step, axis)[1:-1, 1:-1]
        tint = np.array(colors.class_color(k), dtype=np.float32)
        pixels[inner] = 0.6 * pixels[inner] + 0.4 * tint
        pixels[mask & ~inner] = tint
    return Image.fromarray(pixels.round().astype(np.uint8))


def _legend(drawing: Image.Image, items: list[tuple[str, colors.Color, bool]], pen: LineStyle) -> Image.Image:
    """The image over a dark strip with a sample of each line and its meaning, in as many rows as it takes."""
    font = colors.load_font("legend", pen.font)
    dash, gap, line = 2 * pen.font, pen.font, round(1.7 * pen.font)
    places, left, row = [], gap // 2, 0
    for text, _, _ in items:
        step = dash + gap // 2 + round(font.getlength(text)) + gap
        if left + step > drawing.width and left > gap // 2:
            left, row = gap // 2, row + 1
        places.append((left, row))
        left += step
    sheet = Image.new("RGB", (drawing.width, drawing.height + (row + 1) * line + gap // 2), (38, 38, 38))
    sheet.paste(drawing)
    brush = ImageDraw.Draw(sheet)
    for (text, colour, dashed), (x, r) in zip(items, places, strict=True):
        y = drawing.height + gap // 4 + r * line + line // 2
        for part in range(3) if dashed else [None]:
            a, b = (x, x + dash) if part is None else (x + part * dash * 3 // 8, x + part * dash * 3 // 8 + dash // 4)
            brush.line((a, y, b, y), colour, max(2, pen.line))
        brush.text((x + dash + gap // 2, y), text, (235, 235, 235), font, anchor="lm")
    return sheet
