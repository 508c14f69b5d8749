"""A generator of scenes with drawn shapes, exact boxes and masks: data for a first training with no download."""

from __future__ import annotations

import colorsys
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from fusedet.errors import InputError

Rng = np.random.Generator
Array = np.ndarray

VERSION = 5  # to be raised whenever the same parameters draw other images
MARKER = "demo.json"
SMALLEST = 8.0  # pixels across
LARGEST = 0.8  # of the image's shorter side
MOST_OBJECTS = 6
HIDDEN = 0.2  # no object is hidden more than this
TRIES = 20  # places tried for an object before it is left out
EMPTY_EVERY = 25  # every 25th image has no object
HUE_SPREAD = (
    0.06  # each class has its own hue, give or take this share of the circle: at 8 pixels a form alone says little
)
SHADOW = 0.15  # how far a shadow reaches, of the object's radius


# Signed distances, negative inside, to shapes of circumradius about 1 at the origin.


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
    """Five points: in each fifth of the circle, folded at its axis, the half plane of an edge."""
    fifth = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + fifth / 2) % fifth - fifth / 2)  # 0 at a tip, fifth / 2 in a notch
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


def generate_dataset(
    folder: str | Path,
    *,
    images: int = 400,
    seed: int = 0,
    size: tuple[int, int] = (224, 288),
    splits: Mapping[str, float] | None = None,
) -> Path:
    """Write a dataset in COCO's form and return its folder.

    images, in all; size, the range in pixels that each image's width and height are drawn from; splits, the share of
    each split (default train 0.8, val 0.2). Written are `<split>/*.jpg` and `annotations/instances_<split>.json` with
    the visible part of each object as box and RLE mask. Equal parameters give equal bytes (with the same Pillow); a
    folder that holds just these data is left as it is. Raises InputError for a folder that holds anything else.
    """
    folder, shares = Path(folder), dict(splits or {"train": 0.8, "val": 0.2})
    _check(images, seed, size, shares)
    parameters = {"version": VERSION, "images": images, "seed": seed, "size": list(size), "splits": shares}
    if folder.exists():
        if _generated_with(folder) == parameters:
            return folder
        if not folder.is_dir() or any(folder.iterdir()):
            raise InputError(f"{folder} exists and is not the demo data asked for: name a new or empty folder")
    # complete or absent: an interrupted run leaves only the .part folder, which the next one replaces
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "annotations").mkdir(parents=True)
    ends = np.rint(np.cumsum([0, *shares.values()]) / sum(shares.values()) * images).astype(int).tolist()
    for split, first, end in zip(shares, ends, ends[1:]):
        _write_split(part, split, range(first, end), seed, size)
    (part / MARKER).write_text(json.dumps(parameters, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    return part.rename(folder)


def _check(images: int, seed: int, size: tuple[int, int], shares: Mapping[str, float]) -> None:
    if images < len(shares):
        raise InputError(f"images must be at least {len(shares)}, one per split, got {images}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if len(size) != 2 or not 64 <= size[0] <= size[1]:
        raise InputError(f"size must be the smallest and the largest side, at least 64 pixels, got {tuple(size)}")
    if min(shares.values()) <= 0:
        raise InputError(f"every split needs a share above 0, got {dict(shares)}")


def _generated_with(folder: Path) -> Any:
    """The parameters that a folder was generated with; None if it was not generated."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_split(folder: Path, split: str, numbers: range, seed: int, size: tuple[int, int]) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in numbers:
        pixels, found = draw_image(
            np.random.default_rng([seed, number]), size, empty=number % EMPTY_EVERY == EMPTY_EVERY // 2
        )
        height, width = pixels.shape[:2]
        name = f"{number:06d}.jpg"
        Image.fromarray(pixels).save(folder / split / name, quality=92)
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for label, mask in found:
            about = {"id": len(objects) + 1, "image_id": number + 1, "category_id": label + 1, "iscrowd": 0}
            objects.append(about | _segmentation(mask))
    categories = [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(SHAPES)]
    text = json.dumps({"images": images, "annotations": objects, "categories": categories})
    (folder / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")


def _segmentation(mask: Array) -> dict[str, Any]:
    """COCO's bbox [x, y, width, height], area and RLE of a mask (H, W) bool."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(xs[0]), int(ys[0])
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "bbox": [x, y, int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
    }


def draw_image(rng: Rng, size: tuple[int, int], *, empty: bool = False) -> tuple[Array, list[tuple[int, Array]]]:
    """An image (H, W, 3) uint8 and its objects: label 0..K-1 and mask of the visible pixels (H, W) bool."""
    height, width = (int(side) for side in rng.integers(size[0], size[1] + 1, 2))
    canvas = _background(rng, height, width)
    count = 0 if empty else int(rng.integers(1, MOST_OBJECTS + 1))
    across = np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST * min(height, width)), count))
    labels: list[int] = []
    masks: list[Array] = []
    whole: list[float] = []  # pixels of each object, were nothing in front of it and the image without end
    for radius in np.sort(across)[::-1] / 2:  # small ones in front of large ones
        for _ in range(TRIES):
            label = int(rng.integers(len(SHAPES)))
            patch = _patch(rng, label, radius, height, width)
            inside = np.zeros((height, width), dtype=bool)
            inside[patch.rows, patch.columns] = patch.distance[patch.cut] <= 0
            left = [*(mask & ~inside for mask in masks), inside]
            areas = [*whole, float((patch.distance <= 0).sum())]
            if all(mask.sum() >= (1 - HIDDEN) * area for mask, area in zip(left, areas)):
                _paint(rng, canvas, patch, radius, label / len(SHAPES))
                labels, masks, whole = [*labels, label], left, areas
                break
    canvas += rng.normal(0, rng.uniform(1, 6), (height, width, 1))
    return np.clip(canvas, 0, 255).astype(np.uint8), list(zip(labels, masks))


class _Patch(NamedTuple):
    """An object's signed distance in pixels (S, S) on a square around it, and where the square meets the image."""

    distance: Array
    rows: slice
    columns: slice
    cut: tuple[slice, slice]


def _patch(rng: Rng, label: int, radius: float, height: int, width: int) -> _Patch:
    cx, cy = rng.uniform(0, width), rng.uniform(0, height)
    angle = rng.uniform(0, 2 * np.pi)
    half = int(np.ceil(radius + SHADOW * radius + 3))
    left, top = int(cx) - half, int(cy) - half
    steps = np.arange(2 * half + 1) + 0.5  # pixel centres
    x, y = np.meshgrid((left + steps - cx) / radius, (top + steps - cy) / radius)
    turned = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    rows, columns = (
        slice(max(top, 0), min(top + len(steps), height)),
        slice(max(left, 0), min(left + len(steps), width)),
    )
    cut = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return _Patch(SHAPES[list(SHAPES)[label]](*turned) * radius, rows, columns, cut)


def _paint(rng: Rng, canvas: Array, patch: _Patch, radius: float, hue: float) -> None:
    """Draw an object with a soft shadow, a shaded fill that stands out from what is behind it, and perhaps a rim."""
    behind = canvas[patch.rows, patch.columns]
    distance = patch.distance[patch.cut]
    shadow = 0.35 * np.clip(1 - distance / (SHADOW * radius + 1), 0, 1) ** 2
    behind *= 1 - shadow[..., None]

    colours = np.array(
        [_colour(rng, (hue + rng.uniform(-HUE_SPREAD, HUE_SPREAD)) % 1, (0.6, 1.0), (0.4, 1.0)) for _ in range(16)]
    )
    border = behind[np.abs(distance) < 3][:, None]  # (n, 1, 3)
    contrast = np.quantile(np.abs(border - colours).sum(2), 0.1, axis=0)
    colour = colours[contrast.argmax()]
    down, right = np.ogrid[-1 : 1 : distance.shape[0] * 1j, -1 : 1 : distance.shape[1] * 1j]
    angle = rng.uniform(0, 2 * np.pi)
    fill = colour * (1 + 0.22 * (right * np.cos(angle) + down * np.sin(angle)))[..., None]
    if rng.random() < 0.5:
        rim = np.clip(distance + max(1.0, 0.1 * radius) + 0.5, 0, 1)[..., None]
        fill = fill * (1 - rim) + colour * rng.choice([0.45, 1.5]) * rim
    cover = np.clip(0.5 - distance, 0, 1)[..., None]  # the share of a pixel that the shape covers
    behind += cover * (np.clip(fill, 0, 255) - behind)


def _colour(rng: Rng, hue: float, saturation: tuple[float, float], value: tuple[float, float]) -> Array:
    return 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(*saturation), rng.uniform(*value)))


def _background(rng: Rng, height: int, width: int) -> Array:
    """(H, W, 3) floats: a gradient, stripes, clouds or tiles between two muted colours."""
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
        mix = _clouds(rng, height, width)
    else:
        mix = np.clip(0.5 + 2 * np.sin(2 * np.pi * along / period) * np.sin(2 * np.pi * across / period), 0, 1)
    one, other = (_colour(rng, rng.random(), (0.05, 0.3), (0.25, 0.95)) for _ in range(2))
    if kind in (1, 3):
        other = one + 0.5 * (other - one)  # hard patterns are kept low in contrast
    light = 1 + 0.15 * (2 * _clouds(rng, height, width) - 1)
    return (one + mix[..., None] * (other - one)) * light[..., None]


def _clouds(rng: Rng, height: int, width: int) -> Array:
    """(H, W) smooth noise in 0..1 of three octaves."""
    total = np.zeros((height, width))
    for cells, weight in ((3, 1.0), (7, 0.5), (15, 0.25)):
        coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
        total += weight * np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
    return np.clip((total - total.min()) / np.ptp(total), 0, 1)
