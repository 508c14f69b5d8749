"""Images in a grid: the data as the network sees it, and what a detector finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusedet import visualization
from fusedet.api.predict import Predictor
from fusedet.api.train import train_transform
from fusedet.config import Config
from fusedet.data.loader import build_train_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError, plural
from fusedet.visualization import object_centers as drawing


def browse(config: Config, split: str, images: int, epoch: int, target: Path) -> int:
    """Draw the first `images` images of an epoch with their boxes into target; gives how many there were.

    Raises InputError where target exists, ends in no image format, or the data cannot be read.
    """
    _check(target, (".png", ".jpg", ".webp", ".jpeg"))
    dataset = read_dataset(config.data.path or "", split, images=config.data.images)
    count = min(images, len(dataset))
    loader = build_train_loader(dataset, train_transform(config), batch=1, seed=config.train.seed)
    drawn, captions = [], []
    for batch in loader.epoch(epoch):
        height, width = batch.sizes[0].tolist()
        seen = batch.targets[0] if batch.targets else None
        assert seen is not None
        drawn.append(
            visualization.draw_boxes(
                batch.images[0, :, :height, :width], seen.boxes, seen.labels, dataset.names, ignore=seen.ignore
            )
        )
        captions.append(f"id {batch.ids[0]}: {width} x {height}, {plural(len(seen), 'object')}")
        if len(drawn) == count:
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    visualization.draw_image_grid(drawn, captions).save(target)
    return count


def centres(config: Config, split: str, target: Path) -> list[dict[str, Any]]:
    """Draw where the centres of a split's objects lie into target; gives each class's name, objects and how many lie in each quadrant.

    The image's quarters, as in Figure 5 of MSIL (Wang et al., 2023). Objects that do not count are left out.
    Raises InputError as `browse` does, and where there is no object.
    """
    _check(target, (".png", ".pdf", ".svg"))
    dataset = read_dataset(config.data.path or "", split, images=config.data.images, need_images=False)
    counted = ~dataset.ignore
    owner = torch.repeat_interleave(torch.arange(len(dataset)), dataset.offsets.diff())[counted]
    boxes, labels = dataset.boxes[counted], dataset.labels[counted]
    points = ((boxes[:, :2] + boxes[:, 2:]) / 2 / dataset.sizes[owner].flip(1)).clamp(0, 1).numpy()
    groups = [points[labels == k] for k in range(len(dataset.names))]
    target.parent.mkdir(parents=True, exist_ok=True)
    drawing.plot_centers(
        groups, dataset.names, target, f"Where the objects' centres lie: {split} of {config.data.path}"
    )
    counts = [dict(zip(drawing.QUADRANTS, map(int, drawing.count_quadrants(own)))) for own in groups]
    return [{"name": name, "objects": len(own), **parts} for name, own, parts in zip(dataset.names, groups, counts)]


def _check(target: Path, endings: tuple[str, ...]) -> None:
    if target.exists():
        raise InputError(f"out={target} exists: nothing is overwritten, choose another file")
    if target.suffix.lower() not in endings:
        raise InputError(f"out={target} must end in {', '.join(endings[:2])} or {endings[2]}")


def predictions(predictor: Predictor, images: list[Path], target: Path, score: float = 0.3) -> None:
    """Draw what a detector finds in images into one grid."""
    found = list(predictor.stream(images, batch=4))
    visualization.draw_image_grid([one.plot(score=score) for one in found], [path.name for path in images]).save(target)
