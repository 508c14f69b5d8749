"""Reading of a dataset whose format is auto-detected: COCO, VOC or YOLO."""

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
_OTHER_COCO = ("person_keypoints_", "captions_", "stuff_", "panoptic_")  # COCO files of other tasks
_ROBOFLOW_COCO = "_annotations.coco.json"
_HEAD = 1 << 16  # bytes that are searched for a keyword


def read_dataset(
    path: str | Path, split: str, *, images: str | Path | None = None, need_images: bool = True
) -> DetectionDataset:
    """Read a split of a dataset.

    Args:
        path: A folder, a COCO json or a YOLO yaml.
        split: "train", "val", "test", ... or a file that is the split: a COCO json, or a list of images (.txt).
        images: The image folder of a COCO json, where the images are not in one of the usual folders.
        need_images: Whether to refuse COCO and VOC annotations where none of the first 100 images exists. YOLO always
            needs its images, to read their sizes.

    Raises:
        InputError: The dataset or the split cannot be read; the sentence says what is wrong, with the known splits.
    """
    with explain_os_errors(path):
        return _read_split(Path(path), split, images, need_images)


@contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside (a folder without permission, a name that is too long) into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def _read_split(path: Path, split: str, images: str | Path | None, need_images: bool) -> DetectionDataset:
    dataset_format = detect_format(path)
    is_file = split.endswith((".json", ".txt"))
    if is_file:
        split = _resolve_split_file(split, path)
    if images is not None and dataset_format != "coco":
        raise InputError(
            f"images={images} goes with a COCO json only, but {path} is in {dataset_format.upper()} format"
        )
    if dataset_format == "yolo":
        return read_yolo(_find_yaml(path), split)
    if dataset_format == "voc":
        return read_voc(path, split, need_images=need_images)
    file = Path(split) if is_file else _find_coco_file(path, split)
    root = path if path.is_dir() and path.resolve() in file.resolve().parents else _data_folder(file)
    if images is None:
        return read_coco(file, _list_image_folders(file, root, split), root=root, need_images=need_images)
    if not os.path.isdir(images):
        raise InputError(f"images={images} is not a folder")
    return read_coco(file, images, root=root, need_images=need_images)


def list_splits(path: str | Path) -> dict[str, str]:
    """Return the splits of a dataset and the file or folder of each; raises InputError."""
    path, dataset_format = Path(path), detect_format(path)
    with explain_os_errors(path):
        if dataset_format == "yolo":
            return list_yolo_splits(_find_yaml(path))
        if dataset_format == "voc":
            return list_voc_splits(path)
        return {name: str(file) for name, file in _find_coco_files(path).items()}


def detect_format(path: str | Path) -> str:
    """Detect the dataset format: "coco", "voc" or "yolo".

    Raises:
        InputError: The path is no dataset, or a folder holds datasets in several formats.
    """
    with explain_os_errors(path):
        return _detect(Path(path))


def _detect(path: Path) -> str:
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
            f"{path} is an empty folder: data must be a folder in COCO, VOC or YOLO format, a COCO json or a YOLO yaml"
        )
    voc = (
        (path / "JPEGImages").is_dir()
        or (path / "ImageSets").is_dir()
        or _has_files(path / "Annotations", ".xml")
        or find_split_folders(path)
    )
    candidates = (("coco", _find_coco_files(path)), ("voc", voc), ("yolo", _find_yamls(path)))
    detected = [name for name, evidence in candidates if evidence]
    if len(detected) > 1:
        raise InputError(
            f"{path} holds data in {' and '.join(name.upper() for name in detected)} format: give the json or yaml "
            "file instead of the folder"
        )
    if detected:
        return detected[0]
    if (path / "labels").is_dir() or any(path.glob("*/labels")):
        raise InputError(f"{path} looks like YOLO data, but has no data.yaml with 'names', 'train' and 'val'")
    inner = [str(f) for f in sorted(path.iterdir()) if f.is_dir() and (f / "ImageSets").is_dir()]
    hint = f": did you mean {' or '.join(inner)}?" if inner else ""
    raise InputError(
        f"{path} holds no dataset in COCO (annotations/*.json), VOC (Annotations/*.xml) or YOLO (data.yaml) format"
        f"{hint}"
    )


def _resolve_split_file(split: str, path: Path) -> str:
    """The file of a split, relative to the working directory or the data folder."""
    folder = path if path.is_dir() else path.parent
    for file in (split, os.path.join(folder, split)):
        if os.path.isfile(file):
            return os.path.abspath(file) if split.endswith(".txt") else file
    raise InputError(f"the file {split} does not exist, neither here nor in {folder}")


def _has_files(folder: Path, ending: str) -> bool:
    return folder.is_dir() and any(entry.name.endswith(ending) for entry in os.scandir(folder))


def _mentions(file: Path, *patterns: str) -> bool:
    """Whether the beginning of a regular file matches one of the patterns."""
    if not file.is_file():
        return False
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return False  # reported when it is read
    return any(re.search(pattern.encode(), head, re.MULTILINE) for pattern in patterns)


def _find_yamls(folder: Path) -> list[Path]:
    files = [f for f in sorted(folder.iterdir()) if f.suffix.lower() in _YAML and f.is_file()]
    return [f for f in files if _mentions(f, r"^['\"]?names['\"]?\s*:")]


def _find_yaml(path: Path) -> Path:
    """The data.yaml of a folder, or the file itself."""
    if path.is_file():
        return path
    files = _find_yamls(path)
    data_yaml = [f for f in files if f.stem == "data"]
    if len(files) > 1 and not data_yaml:
        raise InputError(
            f"{path} holds several YOLO yaml files ({', '.join(f.name for f in files)}): give one of them instead of "
            "the folder"
        )
    return (data_yaml or files)[0]


def _find_coco_files(path: Path) -> dict[str, Path]:
    """The splits of a COCO json ("train") or folder; a year is removed where the names stay unique."""
    if path.is_file():
        return {"train": path}
    files: dict[str, Path] = {}
    for folder in (path / "annotations", path):
        for file in sorted(folder.glob("*.json")):
            if not file.name.startswith(_OTHER_COCO) and (folder != path or _is_split(file)):
                files.setdefault(file.stem.removeprefix("instances_").removeprefix("image_info_"), file)
    for file in sorted(path.glob(f"*/{_ROBOFLOW_COCO}")):
        files.setdefault(file.parent.name, file)
    short = [normalize_split_name(re.sub(r"\d{4}$", "", name)) for name in files]
    return {
        s if s and short.count(s) == 1 else name: file for (name, file), s in zip(files.items(), short, strict=True)
    }


def _is_split(file: Path) -> bool:
    is_split_name = normalize_split_name(re.sub(r"^instances_|\d{4}$", "", file.stem)) in (
        "train",
        "val",
        "test",
        "trainval",
    )
    return is_split_name or _mentions(file, r'"(images|annotations|categories)"\s*:\s*\[')


def _find_coco_file(path: Path, split: str) -> Path:
    files = _find_coco_files(path)
    if path.is_file():
        if normalize_split_name(split) != "train":
            raise InputError(
                f"{path} is one json file and has no split '{split}': give that as a file too, e.g. "
                f"data.{split}=FILE.json"
            )
        return path
    exact = [f for f in files.values() if f.stem.removeprefix("instances_").removeprefix("image_info_") == split]
    if exact:
        return exact[0]
    pattern = re.escape(normalize_split_name(split)) + r"\d{4}"
    several = [name for name in files if re.fullmatch(pattern, normalize_split_name(name))]
    if split not in files and len(several) > 1:
        raise InputError(f"{path} has several splits '{split}': give one of {', '.join(several)}")
    return select_split(files, split, path)


def _data_folder(file: Path) -> Path:
    return file.parent.parent if file.parent.name == "annotations" else file.parent


def _list_image_folders(file: Path, root: Path, split: str) -> list[Path]:
    """Folders where the images of a COCO json may be, the likeliest first."""
    stem = re.sub(r"^(instances|image_info)_", "", file.stem)
    names = dict.fromkeys([stem, split, normalize_split_name(split), re.sub(r"\d{4}$", "", stem)])
    bases = [root, root / "images"]
    below = [f for base in bases if base.is_dir() for f in sorted(base.iterdir()) if f.is_dir()]
    equal = [f for name in names for f in below if f.name == name]
    similar = [
        f
        for name in names
        for f in below
        if name and normalize_split_name(f.name).startswith(normalize_split_name(name))
    ]
    return [f for f in dict.fromkeys([*equal, *similar, file.parent, *bases[::-1], *below]) if f.is_dir()]
