"""Conversion of a dataset into another format: the command `convert data`."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Unpack

from rich.console import RenderableType

from fusedet.api.results import CommandResult, group_lines
from fusedet.api.settings import Settings, refuse_other_keys, resolve_config, to_overrides
from fusedet.data import conversion

DatasetFormat = Literal["coco", "voc", "yolo"]


SETTABLE = tuple(f"data.{key}" for key in ("train", "val", "split_seed", "classes", "rename", "images", "exif"))
"""Settings of a conversion."""


@dataclass(frozen=True)
class DatasetConversion(CommandResult):
    """The written dataset.

    Attributes:
        out: Its directory.
        splits: By split the numbers of images and annotations, and counts of what the format cannot hold.
        notes: A sentence for each split that was left out.
        next_command: A command that uses the dataset.
    """

    out: Path
    splits: dict[str, dict[str, int]]
    notes: list[str] = field(default_factory=list)
    next_command: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the next command."""
        return {"out": str(self.out), "splits": self.splits, "notes": self.notes}

    def __rich__(self) -> RenderableType:
        rows = ((name, ", ".join(f"{n} {what}" for what, n in counts.items())) for name, counts in self.splits.items())
        return group_lines([*(f"{name}: {counts}" for name, counts in rows), *(f"note: {note}" for note in self.notes)])


def convert_dataset(
    source: str | Path,
    target: str | Path,
    to: DatasetFormat,
    *overrides: str,
    splits: Sequence[str] | None = None,
    link: bool = False,
    **settings: Unpack[Settings],
) -> DatasetConversion:
    """Write the splits of a dataset into a new directory in another format; boxes keep their values.

    >>> fusedet.convert_dataset("data/voc", "data/coco", to="coco")  # doctest: +SKIP
    >>> fusedet.convert_dataset("data/voc", "data/cars", "yolo", "data.classes=[car]")  # doctest: +SKIP

    Args:
        source: A dataset in one of the formats that are read.
        target: The new directory; it appears complete or not at all.
        to: The format.
        overrides: "key=value" texts of the section data: classes, rename, val (a share), split_seed, images, exif.
        splits: The splits to write, by default all whose files exist.
        link: Whether images become hard links instead of copies.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: `target` is not empty, an image is missing, or a class name cannot be written.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, of="a conversion")
    data = resolve_config(None, texts).data.replace(path=str(source))
    notes: list[str] = []
    written = conversion.convert_dataset(data, target, to, splits=splits, link=link, note=notes.append)
    if not data.exif:
        notes.append(
            "the images keep their EXIF orientation, and the boxes fit the pixels as stored: read them with "
            "data.exif=false"
        )
    return DatasetConversion(Path(target), written, notes, _next_command(Path(target), list(written), data.exif))


def _next_command(target: Path, splits: list[str], exif: bool) -> str:
    path = f"data={shlex.quote(str(target))}" + ("" if exif else " data.exif=false")
    if "train" not in splits:
        return f"fusedet browse {path} --split {splits[0]}"
    share = "" if "val" in splits else " data.val=0.2"
    return f"fusedet train retinanet_r50 {path}{share} out=runs/a"
