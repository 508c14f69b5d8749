"""Draw boxes, masks and a comparison with the ground truth; arrange images in a grid, and write images."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from fusedet.atomic_io import write_atomically
from fusedet.errors import InputError
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
    track_ids: Tensor | None = None,
) -> Image.Image:
    """Draw instances: one color per class, and a tag with the class name, and track and score if given.

    Tags stay inside the image. A tag that would hide another one is left out, the best scores first.

    Args:
        image: uint8 (3, H, W).
        boxes: (N, 4) xyxy in pixels of the image.
        labels: (N,) in 0..K-1.
        names: K class names.
        scores: (N,) in 0..1.
        masks: (N, H, W) bool.
        ignore: (I, 4) boxes of ignored regions, drawn gray and dashed.
        width: Line width in pixels; by default in proportion to the image.
        track_ids: (N,) numbers of tracks, -1 for none.

    Raises:
        InputError: A label has no name, or shapes do not fit.
    """
    drawing = to_pil_image(image)
    _check_boxes(boxes, labels, names)
    sides = boxes[:, 2:] - boxes[:, :2]
    # What comes first lies on top: small boxes, or high scores.
    order = (sides.prod(dim=1) if scores is None else -scores).argsort(stable=True)
    corners, classes = boxes[order].tolist(), labels.to(order.device)[order].tolist()
    tags = [names[k] for k in classes]
    if track_ids is not None:
        tags = [f"{name} #{track}" if track >= 0 else name for name, track in zip(tags, track_ids[order].tolist())]
    if scores is not None:
        tags = [f"{name} {score:.2f}" for name, score in zip(tags, scores[order].tolist(), strict=True)]
    if masks is not None:
        drawing = _blend_masks(drawing, masks[order.to(masks.device)].cpu().numpy(), classes)
    annotations = [
        BoxAnnotation(box, colors.class_color(k), tag) for box, k, tag in zip(corners, classes, tags, strict=True)
    ]
    if ignore is not None:
        annotations += [BoxAnnotation(box, colors.GRAY, dashed=True) for box in ignore.tolist()]
    return draw_annotations(drawing, annotations, LineStyle.for_image(drawing, width))


def draw_comparison(
    image: Tensor,
    ground_truth: tuple[np.ndarray, np.ndarray, np.ndarray],
    detections: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    matches: np.ndarray,
    names: Sequence[str],
) -> Image.Image:
    """Draw detections against the ground truth, with a legend of the counts below the image.

    The ground truth of correct detections is thin, white and dashed. A detection of the wrong class counts as missed
    and as false.

    Args:
        image: uint8 (3, H, W).
        ground_truth: Boxes (G, 4) xyxy, labels (G,) and whether each is ignored (G,).
        detections: Boxes (D, 4) xyxy, labels (D,), scores (D,) and whether each is ignored (D,).
        matches: (D,), the index of the ground truth that each detection matches, negative without one.
        names: K class names.

    Raises:
        InputError: A label has no name.
    """
    drawing = to_pil_image(image)
    _check_boxes(*ground_truth[:2], names)
    _check_boxes(*detections[:2], names)
    gt_labels, matched = ground_truth[1].tolist(), set(matches.tolist())
    groups: dict[str, list[BoxAnnotation]] = {"missed": [], "false": [], "wrong class": [], "correct": []}
    background = []
    for box, k, s, is_ignored, g in zip(*(part.tolist() for part in (*detections, matches)), strict=True):
        text = f"{names[k]} {s:.2f}"
        if is_ignored:
            background.append(BoxAnnotation(box, colors.GRAY, text))
        elif g < 0:
            groups["false"].append(BoxAnnotation(box, colors.FALSE_POSITIVE, text))
        elif gt_labels[g] == k:
            groups["correct"].append(BoxAnnotation(box, colors.TRUE_POSITIVE, text))
        else:
            text = f"{text}, is {names[gt_labels[g]]}"
            groups["wrong class"].append(BoxAnnotation(box, colors.WRONG_CLASS, text))
    for g, (box, k, is_ignored) in enumerate(zip(*(part.tolist() for part in ground_truth), strict=True)):
        if is_ignored:
            background.append(BoxAnnotation(box, colors.GRAY, dashed=True))
        elif g in matched:
            background.append(BoxAnnotation(box, colors.WHITE, dashed=True, thin=True))
        else:
            groups["missed"].append(BoxAnnotation(box, colors.FALSE_NEGATIVE, names[k], dashed=True))
    style = LineStyle.for_image(drawing, None)
    annotations = [annotation for group in groups.values() for annotation in group]
    wrong = len(groups["wrong class"])  # both a miss and a false detection, as F1 counts it
    legend = [
        (f"correct {len(groups['correct'])}", colors.TRUE_POSITIVE, False),
        (f"missed {len(groups['missed']) + wrong}", colors.FALSE_NEGATIVE, True),
        (f"false {len(groups['false']) + wrong}", colors.FALSE_POSITIVE, False),
        (f"wrong class {wrong}{' (in both)' if wrong else ''}", colors.WRONG_CLASS, False),
        ("ground truth", colors.WHITE, True),
    ]
    return _legend(draw_annotations(drawing, [*annotations, *background], style), legend, style)


def draw_image_grid(
    images: Sequence[Image.Image], captions: Sequence[str] | None = None, columns: int | None = None, cell: int = 320
) -> Image.Image:
    """Arrange images in rows on a white sheet.

    Args:
        images: One image or more.
        captions: A line of text below each image.
        columns: Images per row; by default the grid is about square.
        cell: Longest side of an image in the grid, in pixels.

    Raises:
        InputError: No images, or another number of captions than of images.
    """
    if not images:
        raise InputError("a grid needs at least one image")
    if captions is not None and len(captions) != len(images):
        raise InputError(f"a grid of {len(images)} images needs as many captions, got {len(captions)}")
    columns = min(len(images), columns or math.ceil(math.sqrt(len(images))))
    gap, size = max(4, cell // 40), max(10, cell // 28)
    scaled = [_fit_to_cell(image, cell) for image in images]
    rows = [scaled[i : i + columns] for i in range(0, len(scaled), columns)]
    line = 0 if captions is None else round(size * 1.6)
    heights = [max(image.height for image in row) for row in rows]
    sheet = Image.new(
        "RGB", (columns * (cell + gap) + gap, sum(heights) + len(rows) * (line + gap) + gap), colors.WHITE
    )
    canvas = ImageDraw.Draw(sheet)
    top = gap
    for r, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for c, image in enumerate(row):
            left = gap + c * (cell + gap)
            sheet.paste(image, (left + (cell - image.width) // 2, top + (height - image.height) // 2))
            if captions is not None:
                caption = captions[r * columns + c]
                font = colors.load_font(caption, size)
                center = (left + cell / 2, top + height + line / 2)
                canvas.text(center, truncate_text(caption, font, cell), (40, 40, 40), font, anchor="mm")
        top += height + line + gap
    return sheet


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image in the format that the file's suffix names.

    Raises:
        StorageError: The file cannot be written.
    """
    content = io.BytesIO()
    image.save(content, Image.registered_extensions()[path.suffix.lower()])
    write_atomically(path, content.getbuffer())


def _fit_to_cell(image: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _check_boxes(boxes: Tensor | np.ndarray, labels: Tensor | np.ndarray, names: Sequence[str]) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise InputError(
            f"boxes must be (N, 4) with labels (N,), they are {tuple(boxes.shape)} and {tuple(labels.shape)}"
        )
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if len(labels) and not 0 <= low <= high < len(names):
        raise InputError(f"labels must lie in 0..{len(names) - 1}, one per class name, they reach from {low} to {high}")


def _blend_masks(drawing: Image.Image, masks: np.ndarray, classes: list[int]) -> Image.Image:
    """Blend masks (N, H, W) in their classes' colors, the first on top, with a line along each border."""
    pixels = np.asarray(drawing).astype(np.float32)
    if masks.shape[1:] != pixels.shape[:2]:
        raise InputError(f"masks must be as large as the image, {pixels.shape[:2]}, they are {masks.shape[1:]}")
    for mask, k in zip(masks[::-1].astype(bool), classes[::-1], strict=True):
        outside = np.pad(~mask, 1, constant_values=True)
        inner = mask & ~(outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:])
        color = np.array(colors.class_color(k), dtype=np.float32)
        pixels[inner] = 0.6 * pixels[inner] + 0.4 * color
        pixels[mask & ~inner] = color
    return Image.fromarray(pixels.round().astype(np.uint8))


def _legend(drawing: Image.Image, items: list[tuple[str, colors.Color, bool]], style: LineStyle) -> Image.Image:
    """Add a dark strip below the image with a sample of each line and its meaning, in as many rows as needed."""
    font = colors.load_font("legend", style.font_size)
    dash, gap, line = 2 * style.font_size, style.font_size, round(1.7 * style.font_size)
    places, left, row = [], gap // 2, 0
    for text, _, _ in items:
        step = dash + gap // 2 + round(font.getlength(text)) + gap
        if left + step > drawing.width and left > gap // 2:
            left, row = gap // 2, row + 1
        places.append((left, row))
        left += step
    sheet = Image.new("RGB", (drawing.width, drawing.height + (row + 1) * line + gap // 2), (38, 38, 38))
    sheet.paste(drawing)
    canvas = ImageDraw.Draw(sheet)
    for (text, color, dashed), (x, r) in zip(items, places, strict=True):
        y = drawing.height + gap // 4 + r * line + line // 2
        for start in (0, dash * 3 // 8, dash * 3 // 4) if dashed else (0,):
            end = start + dash // 4 if dashed else dash
            canvas.line((x + start, y, x + end, y), color, max(2, style.width))
        canvas.text((x + dash + gap // 2, y), text, (235, 235, 235), font, anchor="lm")
    return sheet
