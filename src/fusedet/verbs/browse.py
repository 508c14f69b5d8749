"""Pictures in a grid: the data as the network sees it, and what a detector finds."""

from __future__ import annotations

from pathlib import Path

from fusedet import draw
from fusedet.config import Config
from fusedet.data.loader import train_loader
from fusedet.data.read import read
from fusedet.errors import InputError
from fusedet.verbs.predict import Predictor
from fusedet.verbs.train import train_transform


def browse(config: Config, split: str, images: int, epoch: int, target: Path) -> int:
    """Draw the first `images` pictures of an epoch with their boxes into target; gives how many there were.

    Raises InputError where target exists, ends in no picture format, or the data cannot be read.
    """
    if target.exists():
        raise InputError(f"out={target} exists: nothing is overwritten, choose another file")
    if target.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise InputError(f"out={target} must end in .png, .jpg or .webp")
    records = read(config.data.path or "", split, images=config.data.images)
    count = min(images, len(records))
    loader = train_loader(records, train_transform(config), batch=1, seed=config.train.seed)
    drawn, captions = [], []
    for batch in loader.epoch(epoch):
        height, width = batch.sizes[0].tolist()
        seen = batch.targets[0] if batch.targets else None
        assert seen is not None
        drawn.append(draw.boxes(batch.images[0, :, :height, :width], seen.boxes, seen.labels, records.names, ignore=seen.ignore))
        captions.append(f"id {batch.ids[0]}: {width} x {height}, {len(seen)} objects")
        if len(drawn) == count:
            break
    target.parent.mkdir(parents=True, exist_ok=True)
    draw.grid(drawn, captions).save(target)
    return count


def predictions(predictor: Predictor, pictures: list[Path], target: Path, score: float = 0.3) -> None:
    """Draw what a detector finds in pictures into one grid."""
    found = list(predictor.stream(pictures, batch=4))
    draw.grid([one.plot(score=score) for one in found], [path.name for path in pictures]).save(target)
