"""Synthetic dataset of drawn shapes with exact boxes and masks, for a first training without a download."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from PIL import Image

from fusedet.data.shape_drawing import draw_image, name_classes
from fusedet.errors import InputError

VERSION = 5  # increment whenever the same parameters give different images
MARKER = "demo.json"
EMPTY_EVERY = 25  # every 25th image has no instance


def generate_dataset(
    folder: str | Path,
    *,
    images: int = 400,
    seed: int = 0,
    size: tuple[int, int] = (224, 288),
    splits: Mapping[str, float] | None = None,
    diameters: tuple[float, float] | None = None,
    masks: bool = True,
    frequencies: Sequence[float] | None = None,
) -> Path:
    """Generate a synthetic dataset in COCO format.

    It consists of `<split>/*.jpg` and `annotations/instances_<split>.json`, with the visible part of each instance as
    box and RLE mask. Equal parameters give equal bytes, with the same version of Pillow.

    Args:
        folder: A new or empty folder; one that already holds this dataset stays as it is.
        images: Number of images in all splits.
        seed: Seed of the generator.
        size: Range in pixels from which each image's width and height are drawn.
        splits: Share of each split, by default train 0.8 and val 0.2.
        diameters: Range in pixels of the log-uniform diameters of the circles around the shapes, by default 8 to 0.8 of
            the image's shorter side.
        masks: Whether instances have masks. Without them, an instance's area is that of its box.
        frequencies: Relative frequency of each class, see `name_classes`; by default the six shapes are equally
            frequent.

    Returns:
        The folder.

    Raises:
        InputError: An argument is invalid, or the folder holds anything else.
    """
    folder, shares = Path(folder), dict(splits or {"train": 0.8, "val": 0.2})
    _check_arguments(images, seed, size, shares, diameters, frequencies)
    parameters = {"version": VERSION, "images": images, "seed": seed, "size": list(size), "splits": shares}
    parameters |= {} if diameters is None and masks else {"diameters": diameters and list(diameters), "masks": masks}
    parameters |= {} if frequencies is None else {"frequencies": list(frequencies)}
    if folder.exists():
        if _read_parameters(folder) == parameters:
            return folder
        if not folder.is_dir() or any(folder.iterdir()):
            raise InputError(f"{folder} exists and is not the requested synthetic dataset: give a new or empty folder")
    # the folder is complete or absent: an interrupted run leaves only the .part folder, which the next one replaces
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "annotations").mkdir(parents=True)
    ends = np.rint(np.cumsum([0, *shares.values()]) / sum(shares.values()) * images).astype(int).tolist()
    for split, first, end in zip(shares, ends, ends[1:]):
        _write_split(part, split, range(first, end), seed, size, diameters, masks, frequencies)
    (part / MARKER).write_text(json.dumps(parameters, indent=1) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    return part.rename(folder)


def _check_arguments(
    images: int,
    seed: int,
    size: tuple[int, int],
    shares: Mapping[str, float],
    diameters: tuple[float, float] | None,
    frequencies: Sequence[float] | None,
) -> None:
    if images < len(shares):
        raise InputError(f"images must be at least {len(shares)}, one per split, got {images}")
    if seed < 0:
        raise InputError(f"seed must be 0 or more, got {seed}")
    if len(size) != 2 or not 64 <= size[0] <= size[1]:
        raise InputError(f"size must be the smallest and the largest side, at least 64 pixels, got {tuple(size)}")
    if diameters is not None and (len(diameters) != 2 or not 2 <= diameters[0] <= diameters[1] <= size[0]):
        raise InputError(
            f"diameters must be the smallest and the largest, from 2 to {size[0]} pixels, got {list(diameters)}"
        )
    if min(shares.values()) <= 0:
        raise InputError(f"every split needs a share above 0, got {dict(shares)}")
    if frequencies is not None and (not len(frequencies) or min(frequencies) <= 0):
        raise InputError(f"frequencies must be numbers above 0, one per class, got {list(frequencies)}")


def _read_parameters(folder: Path) -> Any:
    """Read the parameters that a folder was generated with; None for any other folder."""
    try:
        return json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_split(
    folder: Path,
    split: str,
    numbers: range,
    seed: int,
    size: tuple[int, int],
    diameters: tuple[float, float] | None,
    masks: bool,
    frequencies: Sequence[float] | None,
) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in numbers:
        is_empty = number % EMPTY_EVERY == EMPTY_EVERY // 2
        rng = np.random.default_rng([seed, number])
        pixels, instances = draw_image(rng, size, empty=is_empty, diameters=diameters, frequencies=frequencies)
        height, width = pixels.shape[:2]
        name = f"{number:06d}.jpg"
        Image.fromarray(pixels).save(folder / split / name, quality=92)
        images.append({"id": number + 1, "file_name": name, "height": height, "width": width})
        for label, mask in instances:
            ids = {"id": len(annotations) + 1, "image_id": number + 1, "category_id": label + 1, "iscrowd": 0}
            annotations.append(ids | _encode_mask(mask, masks))
    names = name_classes(frequencies)
    categories = [{"id": i + 1, "name": name, "supercategory": "shape"} for i, name in enumerate(names)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")


def _encode_mask(mask: np.ndarray, with_rle: bool) -> dict[str, Any]:
    """Return the COCO bbox [x, y, width, height], area and RLE of a mask (H, W) bool, or box and its area only."""
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x, y = int(xs[0]), int(ys[0])
    width, height = int(xs[-1]) + 1 - x, int(ys[-1]) + 1 - y
    if not with_rle:
        return {"bbox": [x, y, width, height], "area": width * height}
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "bbox": [x, y, width, height],
        "area": int(mask.sum()),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
    }
