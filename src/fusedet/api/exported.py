"""Exported models where a run can stand: loaded with the config, class names and category ids of their run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fusedet.config import Config, Data, parse
from fusedet.data.transforms import EvalTransform
from fusedet.errors import InputError
from fusedet.exporters import ExportedDetector, find_export, open_session, read_export
from fusedet.exporters.runtime import choose_file

SETTABLE = ("data", "test.batch", "test.tiles", "device", "out")
"""What can be set for an exported model, but not `FIXED`; thresholds and the resize rule are part of the file."""
FIXED = ("size", "antialias", "channels")
"""The keys of `data` that are part of the file."""


class Exported(NamedTuple):
    """An exported model, what `load_model.rebuild_detector` returns of a checkpoint, and the file."""

    detector: ExportedDetector
    config: Config
    names: list[str]
    category_ids: list[int]
    file: Path


def load_exported(path: str | Path, trust: bool = False) -> Exported | None:
    """Open an exported model, given by its directory or one of its files; None if the path is something else.

    Args:
        path: The directory, or a file in it, which says the format.
        trust: Whether a .pt2 file may be opened, which torch unpickles.

    Raises:
        InputError: A file is damaged or was changed, no runtime is installed, or the file needs `trust`.
    """
    folder = find_export(path)
    if folder is None:
        return None
    metadata, files = read_export(folder)
    if metadata.raw:
        raise InputError(f"{path} was exported with --raw: it has no final detections, export it without")
    name, file = choose_file(files, Path(path))
    if name == "torch" and not trust:
        raise InputError(f"{file} is read by torch, which may run code that it holds: add --trust if it is your own")
    detector = ExportedDetector(open_session(name, file, metadata), metadata)
    return Exported(detector, parse(metadata.config), metadata.names, metadata.category_ids, file)


def check_preprocessing(data: Data, own: Data) -> None:
    """Raise InputError for a resize rule or number of channels other than the exported model's own."""
    for key in FIXED:
        value, fixed = (json.dumps(getattr(section, key)) for section in (data, own))
        if value != fixed:
            raise InputError(
                f"data.{key}={value} cannot be set for an exported model, whose file has {fixed}: leave it out, or "
                "export the run again"
            )


def check_device(name: str) -> None:
    """Raise InputError for another device than the CPU, on which exported models run here."""
    if name not in ("auto", "cpu"):
        raise InputError(f"device={name}: an exported model runs on the CPU here, leave device out")


@dataclass(frozen=True)
class CanvasTransform(EvalTransform):
    """The resize of `EvalTransform`, smaller where the image would not fit a canvas (height, width)."""

    canvas: tuple[int, int] = (0, 0)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the image's (height, width) for the network."""
        h, w = super().network_size(height, width)
        if h <= self.canvas[0] and w <= self.canvas[1]:
            return h, w
        shrink = min(self.canvas[0] / h, self.canvas[1] / w)
        return max(1, int(h * shrink)), max(1, int(w * shrink))
