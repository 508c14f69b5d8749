"""A dataset of any form written in another: images copied or linked, boxes without loss, what is lost said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fusedet.data import writers
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_files import get_image_extensions, normalize_split_name, select_split
from fusedet.data.readers.auto import list_splits, read_dataset
from fusedet.errors import InputError, unknown

_WRITERS: dict[str, Callable[[Path, dict[str, DetectionDataset], dict[str, list[str]]], dict[str, dict[str, int]]]] = {
    "coco": writers.write_coco,
    "voc": writers.write_voc,
    "yolo": writers.write_yolo,
}


def convert_dataset(
    src: str | Path, dst: str | Path, to: str, *, splits: list[str] | None = None, link: bool = False
) -> dict[str, dict[str, int]]:
    """Write the splits of src (default: all) into the new folder dst in the form "coco", "voc" or "yolo".

    Boxes keep their float64 value, to rounding. link makes hard links instead of copies of the images. dst appears
    whole or not at all. Returns per split {"images": n, "objects": n, and a count by each sentence that says what the
    form could not carry or what the reader found wrong}. Raises InputError: dst holds something, an image is
    missing, splits name different classes, or a class name cannot be written.
    """
    if to not in _WRITERS:
        raise unknown("form", to, _WRITERS)
    target = Path(os.path.abspath(dst))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder: give a new one, nothing is overwritten")
    data = _read(src, splits, to)
    images = writers.assign_file_names(data)
    half = target.with_name(f".{target.name}.half")
    try:
        half.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(f"{half} is left from a conversion that was broken off or still runs: remove it") from error
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror or error}") from error
    try:
        report = _WRITERS[to](half, data, images)
        for split, dataset in data.items():
            _place(dataset, images[split], half / writers.FOLDERS[to], link)
        if target.exists():
            target.rmdir()
        half.rename(target)
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(half, ignore_errors=True)
    return report


def _read(src: str | Path, wanted: list[str] | None, to: str) -> dict[str, DetectionDataset]:
    """The splits by name, checked to agree in their classes and to have all their images."""
    known = list_splits(src)
    if not known:
        raise InputError(f"{src} has no splits to convert")
    for name in wanted or []:
        select_split(known, name, Path(src))
    data = {name: read_dataset(src, name) for name in dict.fromkeys(map(normalize_split_name, wanted or known))}
    (first, model), *others = data.items()
    for name, dataset in others:
        if dataset.names != model.names or dataset.category_ids != model.category_ids:
            raise InputError(
                f"the splits '{first}' and '{name}' of {src} name different classes: {_differ(model, dataset)}"
            )
    for dataset in data.values():
        for i in range(len(dataset)):
            if not dataset.path(i).is_file():
                raise InputError(f"{dataset.source} lists the image {dataset.path(i)}, which does not exist")
            if (
                to != "coco" and dataset.path(i).suffix.lower() not in get_image_extensions()
            ):  # COCO alone writes the whole name into its annotations
                raise InputError(
                    f"the image {dataset.path(i)} needs an image's extension to be found in {to.upper()} form: rename it"
                )
    return data


def _differ(a: DetectionDataset, b: DetectionDataset) -> str:
    for i, (one, other) in enumerate(zip(a.names, b.names, strict=False)):
        if (one, a.category_ids[i]) != (other, b.category_ids[i]):
            return f"'{one}' (id {a.category_ids[i]}) against '{other}' (id {b.category_ids[i]})"
    return f"{len(a.names)} against {len(b.names)} classes"


def _place(dataset: DetectionDataset, names: list[str], folder: Path, link: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        target = folder / name
        if target.exists():  # an image of two splits
            continue
        if link:
            _link(dataset.path(i), target)
        else:
            shutil.copyfile(dataset.path(i), target)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise InputError(
            f"{source} cannot be linked to ({error.strerror}): hard links need one file system, copy instead"
        ) from error
