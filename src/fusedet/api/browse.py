"""Images in a grid: training images as the network sees them, and predictions: the command `browse`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from rich.console import Group, RenderableType

from fusedet import visualization
from fusedet.api import run_dir
from fusedet.api.predictor import Predictor
from fusedet.api.results import CommandResult, group_lines
from fusedet.api.settings import Settings, Source, refuse_other_keys, resolve_config, to_overrides
from fusedet.api.tables import centers_table
from fusedet.api.train_inputs import train_transform, training_images
from fusedet.config import Config
from fusedet.data.loader import build_train_loader
from fusedet.data.splits import read_split
from fusedet.errors import InputError, format_count, require_at_least
from fusedet.visualization import object_centers

SETTABLE = ("data", "train.schedule", "train.seed", "out")
"""What can be set where images are drawn."""


@dataclass(frozen=True)
class BrowseResult(CommandResult):
    """The written image.

    Attributes:
        image: Its file.
        images: How many images it shows; None where it shows object centers.
        classes: Each class's name, number of objects, and how many lie in each quarter of the image; None where it
            shows images.
    """

    image: Path
    images: int | None = None
    classes: list[dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are not None."""
        shown = {"images": self.images} if self.classes is None else {"classes": self.classes}
        return {"image": str(self.image), **shown}

    def __rich__(self) -> RenderableType:
        if self.classes is None:
            return group_lines([f"{format_count(self.images or 0, 'image')}: {self.image}"])
        return Group(centers_table(self.classes), group_lines([f"centers: {self.image}"]))


def browse(
    *overrides: str,
    config: Source | None = None,
    split: str | None = None,
    images: int | None = None,
    epoch: int | None = None,
    centers: bool = False,
    **settings: Unpack[Settings],
) -> BrowseResult:
    """Draw training images with their boxes as the network sees them, or where the centers of all objects lie.

    >>> fusedet.browse(data="data/coco", out="images.png")  # doctest: +SKIP

    Args:
        overrides: "key=value" texts, such as "data=PATH". `out` is the file, by default browse.png or centers.png.
        config: A config's name, a YAML file, a run directory or a `Config`, whose `data` section is used.
        split: The split, by default `data.train`.
        images: How many images, by default 16.
        epoch: The epoch whose data augmentation is shown, by default the first one, 0.
        centers: Whether the centers of all objects are drawn, class by class, instead of images.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The data cannot be read, or the file exists or is of no image format.
        StorageError: The file cannot be written.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, of="this command")
    options = resolve_config(config, texts)
    if options.data.path is None:
        raise InputError("no data: write fusedet browse data=PATH")
    name = "centers" if centers else "browse"
    target = Path(options.out) if options.out else run_dir.find_free_path(".", name, ".png")
    split = split or options.data.train
    if centers:
        if images is not None or epoch is not None:
            raise InputError("centers are those of the whole split: leave out the number of images and the epoch")
        return BrowseResult(target, classes=_draw_centers(options, split, target))
    images, epoch = 16 if images is None else images, epoch or 0
    require_at_least(1, images=images)
    require_at_least(0, epoch=epoch)
    return BrowseResult(target, images=_draw_images(options, split, images, epoch, target))


def draw_predictions(predictor: Predictor, images: list[Path], target: Path, score: float = 0.3) -> None:
    """Draw predictions on images, into one grid.

    Args:
        predictor: The detector.
        images: Paths of the images.
        target: The file to write.
        score: Least score of a drawn prediction, in 0..1.
    """
    drawn = [prediction.plot(score=score) for prediction in predictor.stream(images, batch=4)]
    visualization.save_image(visualization.draw_image_grid(drawn, [path.name for path in images]), target)


def _draw_images(config: Config, split: str, images: int, epoch: int, target: Path) -> int:
    """Draw the first images of an epoch with their boxes; return how many there were."""
    _check_target(target, (".png", ".jpg", ".webp", ".jpeg"))
    dataset = training_images(config, read_split(config.data, split))
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
        captions.append(f"id {batch.ids[0]}: {width} x {height}, {format_count(len(seen), 'object')}")
        if len(drawn) == count:
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    visualization.save_image(visualization.draw_image_grid(drawn, captions), target)
    return count


def _draw_centers(config: Config, split: str, target: Path) -> list[dict[str, Any]]:
    """Draw the centers of a split's objects; return each class's name, objects and how many lie in each quadrant.

    The quadrants are those of Figure 5 of MSIL (Wang et al., 2023). Ignored objects are left out.
    """
    _check_target(target, (".png", ".pdf", ".svg"))
    dataset = read_split(config.data, split, need_images=False)
    counted = ~dataset.ignore
    image_indices = torch.from_numpy(dataset.image_indices)[counted]
    boxes, labels = dataset.boxes[counted], dataset.labels[counted]
    points = ((boxes[:, :2] + boxes[:, 2:]) / 2 / dataset.sizes[image_indices].flip(1)).clamp(0, 1).numpy()
    groups = [points[labels == k] for k in range(len(dataset.names))]
    target.parent.mkdir(parents=True, exist_ok=True)
    title = f"Where the objects' centers lie: {split} of {config.data.path}"
    object_centers.plot_centers(groups, dataset.names, target, title)
    counts = [dict(zip(object_centers.QUADRANTS, map(int, object_centers.count_quadrants(own)))) for own in groups]
    return [{"name": name, "objects": len(own), **parts} for name, own, parts in zip(dataset.names, groups, counts)]


def _check_target(target: Path, endings: tuple[str, ...]) -> None:
    if target.exists():
        raise InputError(f"out={target} exists: nothing is overwritten, choose another file")
    if target.suffix.lower() not in endings:
        raise InputError(f"out={target} must end in {', '.join(endings[:2])} or {endings[2]}")
