"""Images of drawn shapes with exact masks, the content of the synthetic dataset."""

import colorsys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

Rng = np.random.Generator
Array = np.ndarray

MIN_DIAMETER = 8.0  # pixels
MAX_DIAMETER = 0.8  # share of the image's shorter side
MAX_INSTANCES = 6
MAX_HIDDEN = 0.2  # maximum hidden share of an instance
MAX_ATTEMPTS = 20  # positions tried for an instance before it is dropped
HUE_SPREAD = 0.06  # a class has its own hue, +- this share of the circle: at 8 pixels the shape alone shows little
SHADOW = 0.15  # extent of a shadow, as a share of the radius


# signed distances, negative inside, to shapes of circumradius about 1 at the origin


def _circle(x: Array, y: Array) -> Array:
    return np.hypot(x, y) - 0.95


def _ring(x: Array, y: Array) -> Array:
    return np.abs(np.hypot(x, y) - 0.74) - 0.22


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 0.74


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum.reduce([x * np.cos(a) + y * np.sin(a) for a in np.pi / 6 + np.arange(3) * 2 * np.pi / 3]) - 0.5


def _cross(x: Array, y: Array) -> Array:
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - 0.94, short - 0.26)


def _star(x: Array, y: Array) -> Array:
    """Draw a star of five tips: a fifth of the circle, folded at its axis, is the half plane of an edge."""
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)  # 0 at a tip, fifth / 2 at a notch
    radius = np.hypot(x, y)
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(fifth / 2), np.sin(fifth / 2)])
    edge = notch - tip
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return radius * np.cos(angle) * normal[0] + radius * np.sin(angle) * normal[1] - tip @ normal


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "triangle": _triangle,
    "square": _square,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}


def name_classes(frequencies: Sequence[float] | None = None) -> list[str]:
    """Name the classes of a dataset with these `frequencies`.

    The first six are the shapes, each in its hue. The next six are the shapes in other hues, "circle 2" to "cross 2",
    and so on.
    """
    shapes = list(SHAPES)
    rounds = [f" {i // len(shapes) + 1}" if i >= len(shapes) else "" for i in range(len(frequencies or shapes))]
    return [shapes[i % len(shapes)] + text for i, text in enumerate(rounds)]


def draw_image(
    rng: Rng,
    size: tuple[int, int],
    *,
    empty: bool = False,
    diameters: tuple[float, float] | None = None,
    frequencies: Sequence[float] | None = None,
) -> tuple[Array, list[tuple[int, Array]]]:
    """Draw an image with random instances.

    Args:
        rng: The random generator.
        size: Range in pixels from which width and height are drawn.
        empty: Whether to draw the background only.
        diameters: See `generate_dataset`.
        frequencies: See `generate_dataset`.

    Returns:
        The image (H, W, 3) uint8, and per instance the label in 0..K-1 and the mask (H, W) bool of its visible pixels.
    """
    height, width = (int(side) for side in rng.integers(size[0], size[1] + 1, 2))
    canvas = _draw_background(rng, height, width)
    count = 0 if empty else int(rng.integers(1, MAX_INSTANCES + 1))
    low, high = (MIN_DIAMETER, MAX_DIAMETER * min(height, width)) if diameters is None else diameters
    sizes = np.exp(rng.uniform(np.log(low), np.log(high), count))
    share = None if frequencies is None else np.array(frequencies) / sum(frequencies)
    hue_rounds = -(-len(frequencies or SHAPES) // len(SHAPES))
    labels: list[int] = []
    masks: list[Array] = []
    full_areas: list[float] = []  # pixels of each instance, unoccluded and not cut by the image's border
    for radius in np.sort(sizes)[::-1] / 2:  # small ones in front of large ones
        for _ in range(MAX_ATTEMPTS):
            label = int(rng.integers(len(SHAPES)) if share is None else rng.choice(len(share), p=share))
            patch = _make_patch(rng, label, radius, height, width)
            inside = np.zeros((height, width), dtype=bool)
            inside[patch.rows, patch.columns] = patch.distance[patch.cut] <= 0
            visible = [*(mask & ~inside for mask in masks), inside]
            areas = [*full_areas, float((patch.distance <= 0).sum())]
            if all(mask.sum() >= (1 - MAX_HIDDEN) * area for mask, area in zip(visible, areas)):
                _paint(rng, canvas, patch, radius, label / len(SHAPES) + label // len(SHAPES) / hue_rounds)
                labels, masks, full_areas = [*labels, label], visible, areas
                break
    canvas += rng.normal(0, rng.uniform(1, 6), (height, width, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8), list(zip(labels, masks))


class _Patch(NamedTuple):
    """The signed distance in pixels (S, S) on a square around an instance, and the square's part inside the image."""

    distance: Array
    rows: slice
    columns: slice
    cut: tuple[slice, slice]


def _make_patch(rng: Rng, label: int, radius: float, height: int, width: int) -> _Patch:
    cx, cy = rng.uniform(0, width), rng.uniform(0, height)
    angle = rng.uniform(0, 2 * np.pi)
    half = int(np.ceil(radius + SHADOW * radius + 3))
    left, top = int(cx) - half, int(cy) - half
    steps = np.arange(2 * half + 1) + 0.5  # pixel centers
    x, y = np.meshgrid((left + steps - cx) / radius, (top + steps - cy) / radius)
    rotated = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    rows, columns = (
        slice(max(top, 0), min(top + len(steps), height)),
        slice(max(left, 0), min(left + len(steps), width)),
    )
    cut = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return _Patch(SHAPES[list(SHAPES)[label % len(SHAPES)]](*rotated) * radius, rows, columns, cut)


def _paint(rng: Rng, canvas: Array, patch: _Patch, radius: float, hue: float) -> None:
    """Draw an instance with a soft shadow, a shaded fill that contrasts with its background, and sometimes a rim."""
    behind = canvas[patch.rows, patch.columns]
    distance = patch.distance[patch.cut]
    shadow = 0.35 * np.clip(1 - distance / (SHADOW * radius + 1), 0, 1) ** 2
    behind *= 1 - shadow[..., None]

    colors = np.array(
        [_draw_color(rng, (hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1, (0.6, 1.0), (0.4, 1.0)) for _ in range(16)]
    )
    border = behind[np.abs(distance) < 3][:, None]  # (n, 1, 3)
    contrast = np.quantile(np.abs(border - colors).sum(2), 0.1, axis=0)
    color = colors[contrast.argmax()]
    down, right = np.ogrid[-1 : 1 : distance.shape[0] * 1j, -1 : 1 : distance.shape[1] * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    fill = color * (1 + 0.22 * (right * np.cos(angle) + down * np.sin(angle)))[..., None]
    if rng.random() < 0.5:
        rim = np.clip(distance + max(1.0, 0.1 * radius) + 0.5, 0, 1)[..., None]
        fill = fill * (1 - rim) + color * rng.choice([0.45, 1.5]) * rim
    cover = np.clip(0.5 - distance, 0, 1)[..., None]  # the share of each pixel that the shape covers
    behind += cover * (np.clip(fill, 0, 255) - behind)


def _draw_color(rng: Rng, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> Array:
    return 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value)))


def _draw_background(rng: Rng, height: int, width: int) -> Array:
    """Draw a gradient, stripes, clouds or tiles between two muted colors, (H, W, 3) float."""
    down, right = np.ogrid[0:height, 0:width]
    angle = rng.uniform(0, 2 * np.pi)
    along = right * np.cos(angle) + down * np.sin(angle)
    across = down * np.cos(angle) - right * np.sin(angle)
    period = rng.uniform(12, 60)
    kind = rng.integers(4)
    if kind == 0:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 1:
        mix = np.clip(0.5 + rng.uniform(0.6, 3) * np.sin(2 * np.pi * along / period), 0, 1)
    elif kind == 2:
        mix = _draw_clouds(rng, height, width)
    else:
        mix = np.clip(0.5 + 2 * np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period), 0, 1)
    first, second = (_draw_color(rng, rng.random(), (0.05, 0.3), (0.25, 0.95)) for _ in range(2))
    if kind in (1, 3):
        second = first + 0.5 * (second - first)  # hard patterns have a low contrast
    light = 1 + 0.15 * (2 * _draw_clouds(rng, height, width) - 1)
    return (first + mix[..., None] * (second - first)) * light[..., None]


def _draw_clouds(rng: Rng, height: int, width: int) -> Array:
    """Draw smooth noise of three octaves in 0..1, (H, W)."""
    total = np.zeros((height, width))
    for cells, weight in ((3, 1.0), (7, 0.5), (15, 0.25)):
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip((total - total.min()) / np.ptp(total), 0, 1)
