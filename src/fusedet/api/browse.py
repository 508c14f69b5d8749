"""Images of a dataset: augmented training samples, the distribution of box centres, and predictions in a grid."""

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
from fusedet.visualization.object_centers import QUADRANTS, count_quadrants, plot_centers


def browse(config: Config, split: str, images: int, epoch: int, target: Path) -> int:
    """Draw the first training samples of an epoch with their boxes, as the network sees them.

    Args:
        config: The configuration.
        split: The split.
        images: Maximum number of images.
        epoch: The epoch, from 0, which sets the data augmentation.
        target: The image file to write.

    Returns:
        The number of images drawn.

    Raises:
        InputError: target exists or is not an image file, or the dataset cannot be read.
    """
    _check_target(target, (".png", ".jpg", ".webp", ".jpeg"))
    dataset = read_dataset(config.data.path or "", split, images=config.data.images)
    count = min(images, len(dataset))
    loader = build_train_loader(dataset, train_transform(config), batch=1, seed=config.train.seed)
    drawn, captions = [], []
    for batch in loader.epoch(epoch):
        height, width = batch.sizes[0].tolist()
        annotations = batch.targets[0] if batch.targets else None
        assert annotations is not None
        drawn.append(
            visualization.boxes(
                batch.images[0, :, :height, :width],
                annotations.boxes,
                annotations.labels,
                dataset.names,
                ignore=annotations.ignore,
            )
        )
        captions.append(f"id {batch.ids[0]}: {width} x {height}, {plural(len(annotations), 'annotation')}")
        if len(drawn) == count:
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    visualization.grid(drawn, captions).save(target)
    return count


def centres(config: Config, split: str, target: Path) -> list[dict[str, Any]]:
    """Plot the distribution of a split's box centres, as in Figure 5 of MSIL (Wang et al., 2023).

    Ignored annotations are left out.

    Args:
        config: The configuration.
        split: The split.
        target: The file to write: .png, .pdf or .svg.

    Returns:
        Per class its "name", its number of "annotations", and the number of centres in each quadrant.

    Raises:
        InputError: As for `browse`, and where there are no annotations.
    """
    _check_target(target, (".png", ".pdf", ".svg"))
    dataset = read_dataset(config.data.path or "", split, images=config.data.images, need_images=False)
    counted = ~dataset.ignore
    image_index = torch.repeat_interleave(torch.arange(len(dataset)), dataset.offsets.diff())[counted]
    boxes, labels = dataset.boxes[counted], dataset.labels[counted]
    points = ((boxes[:, :2] + boxes[:, 2:]) / 2 / dataset.sizes[image_index].flip(1)).clamp(0, 1).numpy()
    groups = [points[labels == k] for k in range(len(dataset.names))]
    target.parent.mkdir(parents=True, exist_ok=True)
    plot_centers(groups, dataset.names, target, f"Distribution of box centres: {split} of {config.data.path}")
    counts = [dict(zip(QUADRANTS, map(int, count_quadrants(own)))) for own in groups]
    return [
        {"name": name, "annotations": len(own), **quadrants}
        for name, own, quadrants in zip(dataset.names, groups, counts)
    ]


def _check_target(target: Path, extensions: tuple[str, ...]) -> None:
    if target.exists():
        raise InputError(f"out={target} exists: nothing is overwritten, choose another file")
    if target.suffix.lower() not in extensions:
        raise InputError(f"out={target} must end in {', '.join(extensions[:2])} or {extensions[2]}")


def predictions(predictor: Predictor, images: list[Path], target: Path, score: float = 0.3) -> None:
    """Draw the predictions for several images into one grid."""
    results = list(predictor.stream(images, batch=4))
    visualization.grid([result.plot(score=score) for result in results], [path.name for path in images]).save(target)
