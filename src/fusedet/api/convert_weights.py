"""Conversion of another project's weights into a run directory: the command `convert weights`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Unpack

from rich.console import RenderableType

from fusedet import interop
from fusedet.api import run_dir
from fusedet.api.results import CommandResult, group_lines
from fusedet.api.settings import Settings, to_overrides
from fusedet.api.weights_cache import save_converted
from fusedet.atomic_io import write_atomically
from fusedet.errors import InputError


@dataclass(frozen=True)
class WeightConversion(CommandResult):
    """The written weights.

    Attributes:
        out: The directory or file that was asked for.
        weights: The file of the weights.
        classes: Names of the classes.
        notes: What differs from the other project.
    """

    out: Path
    weights: Path
    classes: list[str]
    notes: list[str]

    def __rich__(self) -> RenderableType:
        return group_lines([*(f"note: {note}" for note in self.notes), f"weights: {self.weights}"])


def convert_weights(
    source: str | Path,
    target: str | Path,
    *overrides: str,
    config: str | Path | None = None,
    **settings: Unpack[Settings],
) -> WeightConversion:
    """Convert a checkpoint of MMDetection or torchvision.

    >>> fusedet.convert_weights("retinanet_r50_fpn_1x_coco.pth", "runs/retinanet")  # doctest: +SKIP

    Args:
        source: The checkpoint.
        target: A new directory for config.yaml, best.safetensors and run.json, or a file NAME.safetensors.
        overrides: "key=value" texts for the resulting config.
        config: MMDetection's config or a config of fusedet; by default inferred from the checkpoint.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: `target` exists, or the checkpoint cannot be converted; nothing is written then.
        StorageError: A file cannot be written.
    """
    target = Path(target)
    is_file = target.suffix == ".safetensors"
    if is_file and target.exists():
        raise InputError(f"{target} exists: nothing is overwritten, choose another name")
    if not is_file:
        run_dir.check_new_dir(target)
    converted = interop.convert_checkpoint(
        source, None if config is None else str(config), to_overrides(overrides, settings)
    )
    if is_file:
        target.parent.mkdir(parents=True, exist_ok=True)
        file = target
    else:
        file = run_dir.create_run_dir(target) / "best.safetensors"
    save_converted(file, converted)
    if not is_file:
        write_atomically(target / "config.yaml", converted.config.to_yaml().encode())
        about = {
            "converted from": str(source),
            "config": None if config is None else str(config),
            "notes": converted.notes,
        }
        run_dir.write_json(target / "run.json", about)
    return WeightConversion(target, file, list(converted.names), list(converted.notes))
