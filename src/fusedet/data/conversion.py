"""Conversion of a dataset to another dataset format."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from fusedet.config.schema import Data
from fusedet.data import writers
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_files import (
    SPLIT_NAMES,
    AbsentSplitError,
    get_image_extensions,
    normalize_split_name,
    select_split,
)
from fusedet.data.readers.auto import list_splits
from fusedet.data.splits import read_split
from fusedet.errors import InputError, make_unknown_error

_WRITERS: dict[str, Callable[[Path, dict[str, DetectionDataset], dict[str, list[str]]], dict[str, dict[str, int]]]] = {
    "coco": writers.write_coco,
    "voc": writers.write_voc,
    "yolo": writers.write_yolo,
}


def convert_dataset(
    src: str | Path | Data,
    dst: str | Path,
    dataset_format: str,
    *,
    splits: Sequence[str] | None = None,
    link: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, int]]:
    """Convert a dataset; boxes keep their float64 values, to rounding.

    A split that the dataset names, but whose files do not exist, is left out unless it is one of `splits`.

    Args:
        src: The dataset, as for `read_dataset`, or the section `data` of a config.
        dst: A new or empty folder; it appears completely or not at all.
        dataset_format: The format to write: "coco", "voc" or "yolo".
        splits: The splits to convert, by default all.
        link: Whether to make hard links to the images instead of copies.
        note: Takes a sentence about each split that is left out.

    Returns:
        Per split the number of "images" and "annotations", and a count per loss and per problem of the annotations.

    Raises:
        InputError: dst is not empty, an image is missing, the splits have different classes, or the format cannot hold
            a class name.
    """
    if dataset_format not in _WRITERS:
        raise make_unknown_error("dataset format", dataset_format, _WRITERS)
    target = Path(os.path.abspath(dst))
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(f"{target} exists and is not an empty folder: give a new one, nothing is overwritten")
    data = _read_splits(src if isinstance(src, Data) else Data(path=str(src)), splits, dataset_format, note)
    images = writers.assign_file_names(data)
    part = target.with_name(f".{target.name}.half")
    try:
        part.mkdir(parents=True)
    except FileExistsError as error:
        raise InputError(
            f"{part} is left by a conversion that was interrupted, or is still running: remove it"
        ) from error
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror or error}") from error
    try:
        report = _WRITERS[dataset_format](part, data, images)
        for split, dataset in data.items():
            _copy_images(dataset, images[split], part / writers.IMAGE_FOLDERS[dataset_format], link)
        if target.exists():
            target.rmdir()
        part.rename(target)
    except OSError as error:
        raise InputError(f"cannot write to {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return report


def _read_splits(
    source: Data, wanted: Sequence[str] | None, dataset_format: str, note: Callable[[str], None]
) -> dict[str, DetectionDataset]:
    """Read the splits; raises InputError where their classes differ or an image is missing."""
    src = source.path or ""
    available = dict.fromkeys(map(normalize_split_name, list_splits(src)))
    if not available:
        raise InputError(f"{src} has no splits to convert")
    if len(available) == 1 and not SPLIT_NAMES & available.keys():
        available = {"train": None}  # the only split, whatever its name
    if isinstance(source.val, float):
        if source.val_split in available and source.val_split in map(normalize_split_name, wanted or available):
            note(
                f"the split '{source.val_split}' of {src} is left out: data.val={source.val:g} makes one of that name "
                f"from '{source.train}'"
            )
        available |= {source.val_split: None}
    for name in wanted or []:
        select_split(available, name, Path(src))
    data: dict[str, DetectionDataset] = {}
    reasons: list[str] = []
    for name in dict.fromkeys(map(normalize_split_name, wanted or available)):
        try:
            data[name] = read_split(source, name)
        except AbsentSplitError as error:
            if wanted:
                raise
            reasons.append(f"the split '{name}' is left out: {error}")
            note(reasons[-1])
    if not data:
        raise InputError("; ".join(reasons))
    (first, reference), *further = data.items()
    for name, dataset in further:
        if dataset.names != reference.names or dataset.category_ids != reference.category_ids:
            raise InputError(
                f"the splits '{first}' and '{name}' of {src} have different classes: "
                f"{_describe_difference(reference, dataset)}"
            )
    for dataset in data.values():
        for i in range(len(dataset)):
            if not dataset.path(i).is_file():
                raise InputError(f"{dataset.source} lists the image {dataset.path(i)}, which does not exist")
            # only COCO writes the whole file name into its annotations
            if dataset_format != "coco" and dataset.path(i).suffix.lower() not in get_image_extensions():
                raise InputError(
                    f"the image {dataset.path(i)} has no image extension, by which {dataset_format.upper()} finds its "
                    "images: rename it"
                )
    return data


def _describe_difference(a: DetectionDataset, b: DetectionDataset) -> str:
    for i, (left, right) in enumerate(zip(a.names, b.names, strict=False)):
        if (left, a.category_ids[i]) != (right, b.category_ids[i]):
            return f"'{left}' (id {a.category_ids[i]}) against '{right}' (id {b.category_ids[i]})"
    return f"{len(a.names)} against {len(b.names)} classes"


def _copy_images(dataset: DetectionDataset, names: list[str], folder: Path, link: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        target = folder / name
        if target.exists():  # the image is in two splits
            continue
        if link:
            _make_link(dataset.path(i), target)
        else:
            shutil.copyfile(dataset.path(i), target)


def _make_link(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        raise InputError(
            f"{source} cannot be linked ({error.strerror}): hard links need one file system, copy instead"
        ) from error
