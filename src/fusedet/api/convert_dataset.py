"""Conversion of a dataset into another format: the command `convert data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import RenderableType

from fusedet.api.results import CommandResult, lines
from fusedet.data import conversion

DatasetFormat = Literal["coco", "voc", "yolo"]


@dataclass(frozen=True)
class DatasetConversion(CommandResult):
    """The written dataset.

    Attributes:
        out: Its directory.
        splits: By split the numbers of images and annotations, and counts of what the format cannot hold.
    """

    out: Path
    splits: dict[str, dict[str, int]]

    def __rich__(self) -> RenderableType:
        rows = ((name, ", ".join(f"{n} {what}" for what, n in counts.items())) for name, counts in self.splits.items())
        return lines(f"{name}: {counts}" for name, counts in rows)


def convert_dataset(
    source: str | Path, target: str | Path, to: DatasetFormat, *, link: bool = False
) -> DatasetConversion:
    """Write all splits of a dataset into a new directory in another format; boxes keep their values.

    >>> fusedet.convert_dataset("data/voc", "data/coco", to="coco")  # doctest: +SKIP

    Args:
        source: A dataset in COCO, VOC or YOLO format.
        target: The new directory; it appears complete or not at all.
        to: The format.
        link: Whether images become hard links instead of copies.

    Raises:
        InputError: `target` is not empty, an image is missing, or a class name cannot be written.
    """
    return DatasetConversion(Path(target), conversion.convert_dataset(source, target, to, link=link))
