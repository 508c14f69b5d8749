"""The files of a COCO dataset: the json of each split, and the folders where its images may be."""

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from fusedet.data.image_files import (
    SPLIT_NAMES,
    is_inside,
    is_system_file,
    normalize_split_name,
    normalize_split_names,
    resolve_inside,
    select_split,
)
from fusedet.data.readers.data_folder import DataFolder, last_part
from fusedet.errors import InputError

_OTHER_TASKS = ("person_keypoints_", "captions_", "stuff_", "panoptic_")
_ROBOFLOW = "_annotations.coco.json"


def list_coco_splits(folder: DataFolder) -> dict[str, str]:
    """Return the splits and the json file of each."""
    return {name: str(file) for name, file in _find_files(folder).items()}


def has_usual_files(folder: DataFolder) -> bool:
    """Return whether a folder has json files where COCO's are, or is a json file."""
    return bool(_find_usual_files(folder))


def has_files(folder: DataFolder) -> bool:
    """Return whether a folder has COCO json files anywhere."""
    return bool(_find_files(folder))


def find_split(folder: DataFolder, split: str) -> tuple[Path, list[Path], int, Path]:
    """Find the json file of a split, the folders where its images may be, how many of these fit, and the data folder.

    Raises:
        InputError: There is no such split, or several have the name.
    """
    file = Path(split) if split.endswith(".json") else _find_file(folder, split)
    path = folder.path
    root = path if path.is_dir() and path.resolve() in file.resolve().parents else _data_folder(file)
    return file, *_list_image_folders(file, root, split), root


def find_images(
    names: list[str], folders: list[Path], root: Path | None, file: Path, by_last_part: bool, likely: int = 1
) -> list[str]:
    """Find the files of images.

    Args:
        names: The `file_name`s.
        folders: The folders that they may be relative to. The one that holds most of the first 100 counts; for images
            that it lacks, the first that holds them.
        root: The folder that names must not leave by "..", by default that folder.
        file: The json file, for messages.
        by_last_part: Whether images are also found by the last part of their names, anywhere in the first folder.
        likely: How many of the folders have a name or a place that fits; of the others, only one may hold the images.

    Raises:
        InputError: A name leaves the folders, two names end in the same image, or several folders hold the images.
    """
    if by_last_part:
        return _find_by_last_part(names, folders[0], file)
    sample = names[:100]
    counts = [sum(os.path.exists(folder / name) for name in sample) for folder in folders]
    if not any(counts):
        for folder in filter(os.path.isdir, folders):
            os.scandir(folder).close()  # raises where the reason is a folder that must not be read
    best = folders[int(np.argmax(counts))]
    paths = [resolve_inside(best, name, root or best, source=file) for name in names]
    if len(folders) > 1 and any(counts):  # images in several folders
        is_likely = best in folders[:likely]
        for i, name in enumerate(names):
            if ".." not in name and not (is_likely and os.path.exists(paths[i])):
                places = [folder for folder in folders if os.path.exists(folder / name.replace("\\", "/"))]
                if len(places) > 1 and places[0] not in folders[:likely]:
                    raise InputError(f"{file} may mean the images of {places[0]} or of {places[1]}")
                if places and best not in places:
                    paths[i] = os.path.join(places[0], name.replace("\\", "/"))
    return paths


def _find_by_last_part(names: list[str], folder: Path, file: Path) -> list[str]:
    """Find the files of the images by their whole names, else by the last parts of them; only inside the folder."""
    data = DataFolder(folder)
    paths: list[str] = []
    short: set[str] = set()  # those that are found by the last part of a name
    for name in names:
        path = os.path.normpath(folder / name.replace("\\", "/"))
        if not (is_inside(path, folder) and os.path.exists(path)):
            path = data.find_image(str(file), name) or str(folder / last_part(name))
            short |= {path} & data.images
        paths.append(path)
    for path, count in Counter(paths).items():
        if count > 1 and path in short:
            same = list(dict.fromkeys(name for name, own in zip(names, paths, strict=True) if own == path))
            if len(same) > 1:
                raise InputError(f"{file} names {same[0]} and {same[1]}, and both are {path} by their last parts")
    return paths


def _find_usual_files(folder: DataFolder) -> dict[str, Path]:
    """Find the json files of a folder by the name of the split, with its year, or the file itself."""
    path = folder.path
    if path.is_file():
        is_coco = path.suffix.lower() == ".json" and folder.identify_json(path) in (None, "coco")
        return {"train": path} if is_coco else {}
    files: dict[str, Path] = {}
    for parent in (path / "annotations", path):
        for file in sorted(parent.glob("*.json")):
            kind = folder.identify_json(file)
            is_coco = kind == "coco" or (kind is None and _names_split(file))
            if is_coco and not file.name.startswith(_OTHER_TASKS) and not is_system_file(file.name):
                _add_split(files, _split_of(file), file, folder)
    for file in sorted(path.glob(f"*/{_ROBOFLOW}")):
        if not is_system_file(file.parent.name):
            _add_split(files, file.parent.name, file, folder)
    return files


def _add_split(files: dict[str, Path], split: str, file: Path, folder: DataFolder) -> None:
    """Add a json file, and refuse a second one of a split: none of the two is to vanish."""
    first = files.setdefault(split, file)
    is_coco = folder.identify_json(first) == folder.identify_json(file) == "coco"
    if is_coco and not first.samefile(file):
        raise InputError(
            f"{first} and {file} are both the split '{split}' by their names: join them, move one elsewhere, or give "
            "one of them instead of the folder"
        )


def _find_files(folder: DataFolder) -> dict[str, Path]:
    """Find the splits of a COCO json ("train") or folder; a year is removed where the names stay unique."""
    files = _find_usual_files(folder)
    if not files:
        for file in map(Path, folder.list_json("coco")):
            parents = [
                part for part in file.relative_to(folder.root).parts[:-1] if normalize_split_name(part) in SPLIT_NAMES
            ]
            _add_split(files, parents[-1] if parents and not _names_split(file) else _split_of(file), file, folder)
    short = normalize_split_names([re.sub(r"\d{4}$", "", name) for name in files])
    return {
        s if s and short.count(s) == 1 else name: file for (name, file), s in zip(files.items(), short, strict=True)
    }


def _split_of(file: Path) -> str:
    return file.stem.removeprefix("instances_").removeprefix("image_info_")


def _names_split(file: Path) -> bool:
    return normalize_split_name(re.sub(r"^instances_|\d{4}$", "", file.stem)) in SPLIT_NAMES


def _find_file(folder: DataFolder, split: str) -> Path:
    path, files = folder.path, _find_files(folder)
    if path.is_file():
        if normalize_split_name(split) != "train":
            raise InputError(
                f"{path} is one json file and has no split '{split}': give that as a file too, e.g. "
                f"data.{split}=FILE.json"
            )
        return path
    exact = [file for file in files.values() if _split_of(file) == split]
    if exact:
        return exact[0]
    pattern = re.escape(normalize_split_name(split)) + r"\d{4}"
    several = [name for name in files if re.fullmatch(pattern, normalize_split_name(name))]
    if split not in files and len(several) > 1:
        raise InputError(f"{path} has several splits '{split}': give one of {', '.join(several)}")
    return select_split(files, split, path)


def _data_folder(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _list_image_folders(file: Path, root: Path, split: str) -> tuple[list[Path], int]:
    """List the folders that may hold a COCO json's images, and the number of the first that fit by name or place.

    Where a folder has the name of the json's split, those of other splits are left out: numbers as file names often
    begin again in each split.
    """
    stem = re.sub(r"^(instances|image_info)_", "", file.stem)
    names = dict.fromkeys([stem, split, normalize_split_name(split), re.sub(r"\d{4}$", "", stem)])
    bases = [root, root / "images"]
    near = (
        [file.parent, file.parent / "images", file.parent.parent / "images"] if root in file.parents else [file.parent]
    )
    below = [f for base in dict.fromkeys([*bases, *near[:1]]) for f in _list_subfolders(base)]
    own, parent = _split_of_folder(stem), normalize_split_name(file.parent.name)
    own = own or (parent if parent in SPLIT_NAMES else "")
    if own and own in {_split_of_folder(f.name) for f in below}:
        below = [f for f in below if _split_of_folder(f.name) in (own, "")]
    equal = [f for name in names for f in below if f.name == name]
    similar = [
        f
        for name in names
        for f in below
        if name and normalize_split_name(f.name).startswith(normalize_split_name(name))
    ]
    likely = [f for f in dict.fromkeys([*equal, *similar, *near, *bases[::-1]]) if os.path.isdir(f)]
    return list(dict.fromkeys([*likely, *below])), len(likely)


def _split_of_folder(name: str) -> str:
    """Return the split that a folder's name begins with: train2017, val_images; "" for any other, such as trainval."""
    match = re.match(r"(train(ing)?|val(id(ation)?)?|test(ing)?)(?![a-z])", name.lower())
    return normalize_split_name(match[1]) if match else ""


def _list_subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [f for f in sorted(folder.iterdir()) if f.is_dir() and not is_system_file(f.name)]
