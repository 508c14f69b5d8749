"""A dataset in any of the three forms, told apart by itself, into DetectionDataset."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_files import normalize_split_name, select_split
from fusedet.data.readers.coco import read_coco
from fusedet.data.readers.voc import find_split_folders, list_voc_splits, read_voc
from fusedet.data.readers.yolo import list_yolo_splits, read_yolo
from fusedet.errors import InputError

_YAML = (".yaml", ".yml")
_OTHER_COCO = ("person_keypoints_", "captions_", "stuff_", "panoptic_")  # COCO's files that hold no boxes of their own
_EXPORTED = "_annotations.coco.json"
_HEAD = 1 << 16


def read_dataset(
    path: str | Path, split: str, *, images: str | Path | None = None, need_images: bool = True
) -> DetectionDataset:
    """Read a split of a dataset.

    path is a folder, a COCO json or a YOLO yaml. split is "train", "val", "test", ... or a file that is the split: a
    COCO json, or a list of images (.txt). images is the folder of a COCO json's images where they are not beside
    it. need_images refuses COCO and VOC annotations without a single one of their first 100 images (YOLO's sizes
    always come from the images). Raises InputError: one sentence that says what is wrong, with the splits that exist.
    """
    with explain_os_errors(path):
        return _read(Path(path), split, images, need_images)


@contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """What the system refuses inside (a folder without permission, a name that is too long) is told as an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _read(path: Path, split: str, images: str | Path | None, need_images: bool) -> DetectionDataset:
    kind = detect_format(path)
    own_file = split.endswith((".json", ".txt"))
    if own_file:
        split = _existing(split, path)
    if images is not None and kind != "coco":
        raise InputError(f"images={images} goes with COCO json only, but {path} is of {kind.upper()} form")
    if kind == "yolo":
        return read_yolo(_yaml(path), split)
    if kind == "voc":
        return read_voc(path, split, need_images=need_images)
    file = Path(split) if own_file else _coco_file(path, split)
    root = path if path.is_dir() and path.resolve() in file.resolve().parents else _data_folder(file)
    if images is None:
        return read_coco(file, _image_folders(file, root, split), root=root, need_images=need_images)
    if not os.path.isdir(images):
        raise InputError(f"images={images} is not a folder")
    return read_coco(file, images, root=root, need_images=need_images)


def list_splits(path: str | Path) -> dict[str, str]:
    """The splits of a dataset and where each comes from (a file or a folder). Raises InputError."""
    path, kind = Path(path), detect_format(path)
    with explain_os_errors(path):
        if kind == "yolo":
            return list_yolo_splits(_yaml(path))
        if kind == "voc":
            return list_voc_splits(path)
        return {name: str(file) for name, file in _coco_files(path).items()}


def detect_format(path: str | Path) -> str:
    """ "coco", "voc" or "yolo"; raises InputError where it is none, or where a folder holds two of them."""
    with explain_os_errors(path):
        return _form(Path(path))


def _form(path: Path) -> str:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        raise InputError(f"{path} does not exist: data must be a folder, a COCO json or a YOLO yaml") from None
    if path.is_file():
        if path.suffix.lower() in _YAML:
            return "yolo"
        if path.suffix.lower() == ".json":
            return "coco"
        raise InputError(f"{path} is neither a folder, a COCO .json nor a YOLO .yaml")
    if not any(path.iterdir()):
        raise InputError(
            f"{path} is an empty folder: data must be a folder in COCO, VOC or YOLO form, a COCO json or a YOLO yaml"
        )
    voc = (
        (path / "JPEGImages").is_dir()
        or (path / "ImageSets").is_dir()
        or _has(path / "Annotations", ".xml")
        or find_split_folders(path)
    )
    found = [name for name, there in (("coco", _coco_files(path)), ("voc", voc), ("yolo", _yamls(path))) if there]
    if len(found) > 1:
        raise InputError(
            f"{path} holds data of {' and '.join(f.upper() for f in found)} form: give the json or yaml file instead of the folder"
        )
    if found:
        return found[0]
    if (path / "labels").is_dir() or any(path.glob("*/labels")):
        raise InputError(f"{path} looks like YOLO data, but has no data.yaml with 'names', 'train' and 'val'")
    inner = [str(f) for f in sorted(path.iterdir()) if f.is_dir() and (f / "ImageSets").is_dir()]
    hint = f": did you mean {' or '.join(inner)}?" if inner else ""
    raise InputError(
        f"{path} holds no dataset in COCO (annotations/*.json), VOC (Annotations/*.xml) or YOLO (data.yaml) form{hint}"
    )


def _existing(split: str, path: Path) -> str:
    """A split that is a file: as it stands, or inside the data folder."""
    folder = path if path.is_dir() else path.parent
    for file in (split, os.path.join(folder, split)):
        if os.path.isfile(file):
            return os.path.abspath(file) if split.endswith(".txt") else file
    raise InputError(f"the file {split} does not exist, neither here nor in {folder}")


def _has(folder: Path, ending: str) -> bool:
    return folder.is_dir() and any(entry.name.endswith(ending) for entry in os.scandir(folder))


def _mentions(file: Path, *words: str) -> bool:
    """Whether a file's beginning holds one of the words; of a pipe or a device, which might never end, no."""
    if not file.is_file():
        return False
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return False  # said when it is read
    return any(re.search(word.encode(), head, re.MULTILINE) for word in words)


def _yamls(folder: Path) -> list[Path]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in _YAML and f.is_file()]
    return [f for f in files if _mentions(f, r"^['\"]?names['\"]?\s*:")]


def _yaml(path: Path) -> Path:
    """The data.yaml of a folder or the file itself."""
    if path.is_file():
        return path
    found = _yamls(path)
    named = [f for f in found if f.stem == "data"]
    if len(found) > 1 and not named:
        raise InputError(
            f"{path} holds several YOLO yaml files ({', '.join(f.name for f in found)}): give one of them instead of the folder"
        )
    return (named or found)[0]


def _coco_files(path: Path) -> dict[str, Path]:
    """The splits of a COCO json (it is "train") or folder; a year is left off where no other split then has the name."""
    if path.is_file():
        return {"train": path}
    found: dict[str, Path] = {}
    for folder in (path / "annotations", path):
        for file in sorted(folder.glob("*.json")):
            if not file.name.startswith(_OTHER_COCO) and (folder != path or _is_split(file)):
                found.setdefault(file.stem.removeprefix("instances_").removeprefix("image_info_"), file)
    for file in sorted(path.glob(f"*/{_EXPORTED}")):
        found.setdefault(file.parent.name, file)
    short = [normalize_split_name(re.sub(r"\d{4}$", "", name)) for name in found]
    return {
        s if s and short.count(s) == 1 else name: file for (name, file), s in zip(found.items(), short, strict=True)
    }


def _is_split(file: Path) -> bool:
    known = normalize_split_name(re.sub(r"^instances_|\d{4}$", "", file.stem)) in ("train", "val", "test", "trainval")
    return known or _mentions(file, r'"(images|annotations|categories)"\s*:\s*\[')


def _coco_file(path: Path, split: str) -> Path:
    found = _coco_files(path)
    if path.is_file():
        if normalize_split_name(split) != "train":
            raise InputError(
                f"{path} is one json file and has no split '{split}': give that as a file too, e.g. data.{split}=FILE.json"
            )
        return path
    whole = [
        file for file in found.values() if file.stem.removeprefix("instances_").removeprefix("image_info_") == split
    ]
    if whole:
        return whole[0]
    several = [
        name
        for name in found
        if re.fullmatch(re.escape(normalize_split_name(split)) + r"\d{4}", normalize_split_name(name))
    ]
    if split not in found and len(several) > 1:
        raise InputError(f"{path} has several splits '{split}': give one of {', '.join(several)}")
    return select_split(found, split, path)


def _data_folder(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _image_folders(file: Path, root: Path, split: str) -> list[Path]:
    """Where a COCO json's images may be, likeliest first."""
    stem = re.sub(r"^(instances|image_info)_", "", file.stem)
    words = dict.fromkeys([stem, split, normalize_split_name(split), re.sub(r"\d{4}$", "", stem)])
    bases = [root, root / "images"]
    below = [f for base in bases if base.is_dir() for f in sorted(base.iterdir()) if f.is_dir()]
    named = [f for word in words for f in below if f.name == word]
    alike = [
        f
        for word in words
        for f in below
        if word and normalize_split_name(f.name).startswith(normalize_split_name(word))
    ]
    return [f for f in dict.fromkeys([*named, *alike, file.parent, *bases[::-1], *below]) if f.is_dir()]
