"""From JPEG files to the network's normalized input: fusedet's loader and torchvision's detection pipeline.

    python benchmarks/loader.py [--images 40] [--batch 2]

Both sides read the same 640x480 images, flip half of them, resize to 800/1333, normalize and pad, in one process and
one thread, in turn batch by batch. The output is JSON: median milliseconds per image, the ratio of the medians (above
1: fusedet is faster), and the peak memory of each side in a separate process. Then the same for each data augmentation
of fusedet, applied to every image, with its ratio to the loader without it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_report
from PIL import Image
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from fusedet.data import shape_drawing
from fusedet.data.augmentation import AugmentedTransform
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.loader import build_train_loader
from fusedet.data.transforms import TrainTransform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WIDTH, HEIGHT, SHORT, LONG = 640, 480, 800, 1333
INCLUDES = {
    "fusedet": "dataset, Pillow decode, resize of uint8, flip, targets, padded uint8 batch, then float and normalize",
    "fusedet_uint8": "the same up to the uint8 batch, which is what travels to the device; a model normalizes there",
    "torchvision": "CocoDetection wrapped for transforms.v2 (Pillow decode), references/detection's preset "
    "(PILToTensor, flip, float, sanitize), then GeneralizedRCNNTransform (normalize, resize of float, pad), "
    "as its models do inside",
}


def write_images(folder: Path, count: int) -> Path:
    """Write a COCO dataset of 640x480 scenes with about as many objects as COCO has."""
    images, objects = [], []
    for i in range(count):
        rng = np.random.default_rng([7, i])
        pixels, _ = shape_drawing.draw_image(rng, (WIDTH, WIDTH))
        Image.fromarray(pixels[:HEIGHT]).save(folder / f"{i}.jpg", quality=92)
        images.append({"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH})
        for x, y, w, h in rng.integers(20, 200, (7, 4)).tolist():
            box = {
                "id": len(objects) + 1,
                "image_id": i,
                "category_id": 1,
                "iscrowd": 0,
                "area": w * h,
                "bbox": [x, y, w, h],
            }
            objects.append(box | {"segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]})
    path = folder / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}))
    return path


def fusedet_records(path: Path) -> DetectionDataset:
    data = json.loads(path.read_text())
    dataset = []
    for image in data["images"]:
        own = [o for o in data["annotations"] if o["image_id"] == image["id"]]
        corners = np.array([o["bbox"] for o in own], dtype=np.float64)
        corners[:, 2:] += corners[:, :2]
        n = len(own)
        file = path.parent / image["file_name"]
        dataset.append(
            ImageAnnotations(
                image["id"],
                file,
                HEIGHT,
                WIDTH,
                corners,
                np.zeros(n, int),
                np.zeros(n, bool),
                np.ones(n),
                [o["segmentation"] for o in own],
                np.zeros(n, bool),
            )
        )
    return DetectionDataset.build(["thing"], [1], dataset, source=path, dataset_format="coco")


def fusedet_uint8_side(path: Path, batch: int) -> Iterator[object]:
    yield from build_train_loader(fusedet_records(path), TrainTransform([SHORT], LONG), batch=batch).epoch(0)


def fusedet_side(path: Path, batch: int) -> Iterator[object]:
    mean, std = (torch.tensor(x)[:, None, None] * 255 for x in (MEAN, STD))
    for made in build_train_loader(fusedet_records(path), TrainTransform([SHORT], LONG), batch=batch).epoch(0):
        yield made.images.float().sub_(mean).div_(std), made.targets


def torchvision_side(path: Path, batch: int) -> Iterator[object]:
    preset = v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.ConvertBoundingBoxFormat("XYXY"),
            v2.SanitizeBoundingBoxes(),
            v2.ToPureTensor(),
        ]
    )
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        data = CocoDetection(str(path.parent), str(path), transforms=preset)
    data = wrap_dataset_for_transforms_v2(data, target_keys=["boxes", "labels"])
    inside = GeneralizedRCNNTransform(SHORT, LONG, list(MEAN), list(STD))
    loader = torch.utils.data.DataLoader(
        data, batch_size=batch, shuffle=True, collate_fn=lambda samples: tuple(zip(*samples))
    )
    for images, targets in loader:
        yield inside(list(images), list(targets))


SIDES: dict[str, Callable[[Path, int], Iterator[object]]] = {
    "fusedet": fusedet_side,
    "fusedet_uint8": fusedet_uint8_side,
    "torchvision": torchvision_side,
}


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "photometric": {"photometric": True},
    "scale_jitter": {"scale_jitter": (0.1, 2.0)},
    "crop": {"crop": (0.5, 1.0)},
    "right_angles": {"right_angles": True},
    "mosaic": {"mosaic": 1.0},
    "mixup": {"mixup": 1.0},
    "rotate (masks)": {"rotate": 15.0},
    "copy_paste (masks)": {"copy_paste": 1.0},
}
"""Options of `AugmentedTransform` by what they do, each applied to every image."""


def augmented_side(name: str, path: Path, batch: int) -> Iterator[object]:
    options = AUGMENTATIONS[name]
    transform = AugmentedTransform([SHORT], LONG, **options) if options else TrainTransform([SHORT], LONG)
    yield from build_train_loader(fusedet_records(path), transform, batch=batch).epoch(0)


def time_sides(
    sides: dict[str, Callable[[Path, int], Iterator[object]]], path: Path, images: int, batch: int
) -> dict[str, float]:
    """Median milliseconds per image of each side, in turn batch by batch."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for warm in (True, False):
        running = {name: side(path, batch) for name, side in sides.items()}
        for _ in range(images // batch if not warm else 2):
            for name, side in running.items():
                begin = time.perf_counter()
                next(side)
                if not warm:
                    times[name].append((time.perf_counter() - begin) * 1e3 / batch)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_mib(name: str, path: Path, batch: int) -> float | None:
    """Measure by how much one side raises the resident memory above that of the imports; None if it is unknown."""
    torch.set_num_threads(1)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return None
    before = _status("VmRSS")
    for _ in SIDES[name](path, batch):
        pass
    return round((_status("VmHWM") - before) / 1024, 1)


def _status(key: str) -> int:
    """Read a value in KiB from /proc/self/status."""
    return next(
        int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = write_images(Path(folder), options.images)
        medians = time_sides(SIDES, path, options.images, options.batch)
        augmented = time_sides(
            {name: partial(augmented_side, name) for name in AUGMENTATIONS}, path, options.images, options.batch
        )
        peaks = {}
        for name in SIDES:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                peaks[name] = pool.submit(peak_mib, name, path, options.batch).result()
    print_report(
        benchmark="loader",
        milliseconds_per_image={name: round(value, 2) for name, value in medians.items()},
        torchvision_over_fusedet=round(medians["torchvision"] / medians["fusedet"], 2),
        peak_memory_over_imports_mib=peaks,
        augmentation={
            name: {"milliseconds_per_image": round(value, 2), "times_none": round(value / augmented["none"], 2)}
            for name, value in augmented.items()
        },
        includes=INCLUDES,
        images=options.images,
        batch=options.batch,
        image=f"{WIDTH}x{HEIGHT} JPEG, resized to {SHORT}/{LONG}",
        pillow=Image.__version__,
    )


if __name__ == "__main__":
    main()
