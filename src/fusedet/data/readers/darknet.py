"""Reader of Darknet's obj.data and of class lists, which stand in for the data.yaml of a YOLO dataset."""

import os
from pathlib import Path
from typing import Any

from fusedet.data.image_files import read_text, resolve_inside
from fusedet.data.readers.data_folder import DataFolder
from fusedet.errors import InputError

CLASS_LISTS = ("classes.txt", "obj.names", "_darknet.labels", "classes.names", "labels.txt")
"""File names of class lists, a name in each line: of Label Studio, LabelImg, Darknet and Roboflow."""

_SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}


def load_obj_data(file: Path) -> dict[str, Any]:
    """Read Darknet's obj.data as the mapping of a data.yaml: names, path and a list of images per split.

    The paths in it are relative to Darknet's own folder, so their first folder (data/) may be missing here.

    Raises:
        InputError: The file has no `names`, or a file that it names does not exist.
    """
    lines = [line.partition("#")[0].partition("=") for line in read_text(file).splitlines()]
    values = {key.strip().lower(): value.strip() for key, sign, value in lines if sign}
    if "names" not in values:
        raise InputError(f"{file} is not Darknet's data file: it must hold 'names', 'train' and 'valid'")
    data: dict[str, Any] = {
        "names": read_class_list(_find_file(file, values["names"])),
        "path": str(file.parent),
    }
    if "classes" in values:
        data["nc"] = values["classes"]
    return data | {_SPLITS[key]: str(_find_file(file, value)) for key, value in values.items() if key in _SPLITS}


def find_class_list(folder: DataFolder) -> Path | None:
    """Find the class list of a folder with YOLO labels, the highest first."""
    lists = [file for file in folder.files if os.path.basename(file) in CLASS_LISTS]
    return Path(min(lists, key=lambda file: file.count(os.sep))) if lists else None


def load_class_list(folder: DataFolder, file: Path) -> dict[str, Any]:
    """Make the mapping of a data.yaml, without splits, from a class list.

    Raises:
        InputError: The class lists of the folder differ.
    """
    names = read_class_list(file)
    for other in folder.files:
        if os.path.basename(other) in CLASS_LISTS and (found_names := read_class_list(Path(other))) != names:
            raise InputError(
                f"{file} and {other} list different classes: {', '.join(names)} and {', '.join(found_names)}"
            )
    return {"names": names, "path": str(folder.root)}


def read_class_list(file: Path) -> list[str]:
    """Return the class names of a list, one in each line.

    Raises:
        InputError: The list is empty.
    """
    names = [line.strip() for line in read_text(file).splitlines()]
    while names and not names[-1]:
        names.pop()
    if not names or not all(names):
        raise InputError(f"{file} must hold a class name in each line")
    return names


def _find_file(source: Path, name: str) -> Path:
    """Find a file that obj.data names: relative to it, with or without the first folder of the name."""
    name = name.replace("\\", "/")
    for part in (name, name.partition("/")[2], os.path.basename(name)):
        if (
            part
            and not os.path.isabs(part)
            and os.path.isfile(path := resolve_inside(source.parent, part, source=source))
        ):
            return Path(path)
    raise InputError(f"{source} names {name}, but there is no such file in {source.parent}")
