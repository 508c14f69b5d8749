"""Reading of a dataset whose format is auto-detected. `LAYOUTS` lists all that is read, in the order of detection."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers import coco_layout, darknet
from fusedet.data.readers.coco import read_coco
from fusedet.data.readers.cvat import list_cvat_files, read_cvat
from fusedet.data.readers.data_folder import DataFolder, file_mentions, has_yolo_labels, is_data_yaml
from fusedet.data.readers.imagefolder import list_metadata_files, read_imagefolder
from fusedet.data.readers.labelme import list_labelme_files, read_labelme
from fusedet.data.readers.records import RecordSet, build_split
from fusedet.data.readers.unrecognized import explain_unrecognized, list_voc_below
from fusedet.data.readers.via import list_via_files, read_via
from fusedet.data.readers.voc import list_voc_splits, read_voc
from fusedet.data.readers.yolo import get_label_path, list_yolo_splits, load_data_yaml, read_yolo
from fusedet.errors import InputError

_YAML = (".yaml", ".yml")


@dataclass(frozen=True)
class ReadOptions:
    """How a split is read.

    Attributes:
        images: The image folder of a COCO json.
        need_images: Whether none of the first 100 images may be absent.
        exif: Whether EXIF orientation is applied to the images.
    """

    images: str | Path | None = None
    need_images: bool = True
    exif: bool = True


@dataclass(frozen=True)
class Layout:
    """A layout of files that is read.

    Attributes:
        dataset_format: The format's name: "coco", "voc", "yolo", "labelme", "cvat", "via" or "imagefolder".
        is_present: Whether a folder or file has the layout.
        list_splits: Returns the splits and the file or folder of each.
        read: Reads a split, given its name.
    """

    dataset_format: str
    is_present: Callable[[DataFolder], Any]
    list_splits: Callable[[DataFolder], dict[str, str]]
    read: Callable[[DataFolder, str, ReadOptions], DetectionDataset]


def _read_coco(folder: DataFolder, split: str, options: ReadOptions) -> DetectionDataset:
    file, folders, likely, root = coco_layout.find_split(folder, split)
    if options.images is not None:
        if not os.path.isdir(options.images):
            raise InputError(f"images={options.images} is not a folder")
        folders = [Path(options.images)]
    return read_coco(
        file,
        folders,
        root=root,
        need_images=options.need_images,
        by_last_part=options.images is not None,
        exif=options.exif,
        likely=likely,
    )


def _yolo(is_present: Callable[[DataFolder], Any], load: Callable[[DataFolder], tuple[Path, dict[str, Any]]]) -> Layout:
    def read(folder: DataFolder, split: str, options: ReadOptions) -> DetectionDataset:
        file, data = load(folder)
        return read_yolo(file, split, data=data, exif=options.exif)

    return Layout("yolo", is_present, lambda folder: list_yolo_splits(load(folder)[1]), read)


def _records(
    name: str, list_files: Callable[[DataFolder], list[str]], read: Callable[[DataFolder, str | None], RecordSet]
) -> Layout:
    def list_splits(folder: DataFolder) -> dict[str, str]:
        splits = read(folder, None).splits
        return {split: os.path.dirname(records[0].file) for split, records in splits.items()}

    return Layout(
        name,
        list_files,
        list_splits,
        lambda folder, split, options: build_split(folder, read(folder, split), split, exif=options.exif),
    )


def _voc(is_present: Callable[[DataFolder], Any]) -> Layout:
    return Layout(
        "voc",
        is_present,
        lambda folder: list_voc_splits(folder.path),
        lambda folder, split, options: read_voc(folder.path, split, need_images=options.need_images, exif=options.exif),
    )


def _load_yaml(folder: DataFolder) -> tuple[Path, dict[str, Any]]:
    file = _find_yaml(folder.path)
    data = load_data_yaml(file)
    if not list_yolo_splits(data) and "path" not in data:  # as supervision writes it
        data |= _group_images(folder)
    return file, data


def _load_obj_data(folder: DataFolder) -> tuple[Path, dict[str, Any]]:
    files = folder.list_annotations(".data")
    if len(files) > 1:
        raise InputError(f"{folder.path} holds {' and '.join(files)}: give one of them instead of the folder")
    return Path(files[0]), darknet.load_obj_data(Path(files[0]))


def _load_class_list(folder: DataFolder) -> tuple[Path, dict[str, Any]]:
    file = darknet.find_class_list(folder)
    assert file is not None
    return file, darknet.load_class_list(folder, file) | _group_images(folder)


def _group_images(folder: DataFolder) -> dict[str, list[str]]:
    """Group the images of a YOLO folder by split.

    Raises:
        InputError: A folder without labels has images of the same names as one with labels: masks or the like, which
            would be background.
    """
    splits = folder.group_by_split(folder.images)
    labels = {os.path.splitext(file)[0] for file in folder.list_annotations(".txt")}

    def is_labeled(image: str) -> bool:
        return get_label_path(image)[:-4] in labels or os.path.splitext(image)[0] in labels

    for images in splits.values():
        labeled = {Path(image).stem: image for image in filter(is_labeled, images)}
        with_labels = set(map(os.path.dirname, labeled.values()))
        for image in images:
            named_like = labeled.get(Path(image).stem)
            if named_like and os.path.dirname(image) not in with_labels:
                raise InputError(
                    f"{image} has no label file, but {named_like} of the same name has: move masks and copies out of"
                    f" {folder.root}, or name the folders of the images in a data.yaml"
                )
    return splits


def _has_class_list(folder: DataFolder) -> bool:
    """Return whether a folder has a class list and label files of its images."""
    return darknet.find_class_list(folder) is not None and any(map(has_yolo_labels, folder.list_annotations(".txt")))


def _has_voc_folders(folder: DataFolder) -> bool:
    path = folder.path
    return path.is_dir() and ((path / "ImageSets").is_dir() or any((path / "Annotations").glob("[!.]*.xml")))


def _has_voc_xml(folder: DataFolder) -> bool:
    return folder.path.is_dir() and any(
        file_mentions(file, r"<annotation[\s>]") for file in folder.list_annotations(".xml")[:100]
    )


def _has_yaml(folder: DataFolder) -> bool:
    path = folder.path
    return path.suffix.lower() in _YAML if path.is_file() else bool(_find_yamls(path))


KNOWN = (
    Layout("coco", coco_layout.has_usual_files, coco_layout.list_coco_splits, _read_coco),
    _voc(_has_voc_folders),
    _yolo(_has_yaml, _load_yaml),
)
"""Layouts with fixed names of files or folders."""

OTHERS = (
    _yolo(lambda folder: folder.list_annotations(".data"), _load_obj_data),
    _records("imagefolder", list_metadata_files, read_imagefolder),
    _records("cvat", list_cvat_files, read_cvat),
    _voc(_has_voc_xml),
    _records("labelme", list_labelme_files, read_labelme),
    _records("via", list_via_files, read_via),
    Layout("coco", coco_layout.has_files, coco_layout.list_coco_splits, _read_coco),
    _yolo(_has_class_list, _load_class_list),
)
"""Layouts that are recognized by the content of files in any folder, where none of `KNOWN` is present."""


def read_dataset(
    path: str | Path,
    split: str,
    *,
    images: str | Path | None = None,
    need_images: bool = True,
    exif: bool = True,
) -> DetectionDataset:
    """Read a split of a dataset in any of the formats of docs/data.md.

    >>> fusedet.read_dataset("data/coco", "val").names  # doctest: +SKIP
    ('person', 'bicycle', ...)

    Args:
        path: A folder, or an annotation file: a COCO json, a YOLO yaml, ...
        split: "train", "val", "test", ... or a file that is the split: a COCO json, or a list of images (.txt).
        images: The image folder of a COCO json, where the images are not in one of the usual folders.
        need_images: Whether to refuse COCO and VOC annotations where none of the first 100 images exists. YOLO always
            needs its images, to read their sizes.
        exif: Whether EXIF orientation is applied to the images.

    Raises:
        InputError: The dataset or the split cannot be read; the sentence says what is wrong, with the known splits.
    """
    with explain_os_errors(path):
        folder, layout = _detect(Path(path))
        if split.endswith((".json", ".txt")):
            split = _resolve_split_file(split, folder.root)
        if images is not None and layout.dataset_format != "coco":
            raise InputError(
                f"images={images} goes with a COCO json only, but {path} is in {layout.dataset_format.upper()} format"
            )
        return dataclasses.replace(layout.read(folder, split, ReadOptions(images, need_images, exif)), exif=exif)


@contextmanager
def explain_os_errors(path: str | Path) -> Iterator[None]:
    """Turn an OSError inside (a folder without permission, a name that is too long) into an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or path} cannot be read: {error.strerror or error}") from error


def list_splits(path: str | Path) -> dict[str, str]:
    """Return the splits of a dataset and the file or folder of each; raises InputError."""
    with explain_os_errors(path):
        folder, layout = _detect(Path(path))
        return layout.list_splits(folder)


def detect_format(path: str | Path) -> str:
    """Detect the dataset format: "coco", "voc", "yolo", "labelme", "cvat", "via" or "imagefolder".

    Raises:
        InputError: The path is no dataset, or a folder holds datasets in several formats.
    """
    with explain_os_errors(path):
        return _detect(Path(path))[1].dataset_format


def _detect(path: Path) -> tuple[DataFolder, Layout]:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte
        raise InputError(f"{path} does not exist: data must be a folder, a COCO json or a YOLO yaml") from None
    folder = DataFolder(path)
    if path.is_file():
        return folder, _detect_file(folder)
    if not any(path.iterdir()):
        raise InputError(
            f"{path} is an empty folder: data must be a folder in COCO, VOC or YOLO format, a COCO json or a YOLO yaml"
        )
    detected = [layout for layout in KNOWN if layout.is_present(folder)]
    if not detected and not list_voc_below(folder):
        detected = [layout for layout in OTHERS if layout.is_present(folder)]
    if len(formats := dict.fromkeys(layout.dataset_format.upper() for layout in detected)) > 1:
        raise InputError(
            f"{path} holds data in {' and '.join(formats)} format: give the json or yaml file instead of the folder, "
            "or move the other annotations elsewhere"
        )
    if not detected:
        raise InputError(explain_unrecognized(folder))
    return folder, detected[0]


def _detect_file(folder: DataFolder) -> Layout:
    for layout in (*KNOWN, *OTHERS):
        if layout.is_present(folder):
            return layout
    raise InputError(explain_unrecognized(folder))


def _resolve_split_file(split: str, folder: Path) -> str:
    """Return the file of a split, relative to the working directory or the data folder."""
    for file in (split, os.path.join(folder, split)):
        if os.path.isfile(file):
            return os.path.abspath(file) if split.endswith(".txt") else file
    raise InputError(f"the file {split} does not exist, neither here nor in {folder}")


def _find_yamls(folder: Path) -> list[Path]:
    files = [f for f in sorted(folder.glob("[!.]*")) if f.suffix.lower() in _YAML and f.is_file()]
    return list(filter(is_data_yaml, files))


def _find_yaml(path: Path) -> Path:
    """Find the data.yaml of a folder, or return the file itself."""
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
