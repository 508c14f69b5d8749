"""The sentence for data that no reader recognizes: the nearest known layout, and what is missing from it."""

from collections.abc import Callable
from pathlib import Path

from fusedet.data.readers.data_folder import DataFolder, file_mentions, has_yolo_labels, is_data_yaml

_KNOWN = (
    "COCO (annotations/*.json), VOC (Annotations/*.xml), YOLO (data.yaml), LabelMe, CVAT for images, VIA or Hugging "
    "Face's imagefolder (metadata.jsonl)"
)
_EXPORTS = {
    "Label Studio": "COCO or YOLO",
    "Create ML": "COCO or VOC",
    "Datumaro": "COCO or VOC",
    "Supervisely": "COCO or VOC",
}
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_OTHER_LABEL = r"^(\S+[ ,]+)*(-?\d+(\.\d+)?[ ,]+){4,}"  # of KITTI, DOTA, VisDrone


def explain_unrecognized(folder: DataFolder) -> str:
    """Return the sentence: what is there, which layout it comes nearest to, and what that one lacks."""
    if folder.path.is_file():
        return _explain_file(folder)
    for count, explain in _HINTS:
        if files := count(folder):
            return f"{folder.path} {explain(folder, files)}"
    return f"{folder.path} holds no dataset: what is read is {_KNOWN}"


def _explain_file(folder: DataFolder) -> str:
    path = folder.path
    if path.suffix.lower() in _ARCHIVES:
        return f"{path} is an archive: unpack it, and give its folder"
    if path.suffix.lower() == ".json" and (kind := folder.identify_json(path)) in _EXPORTS:
        return f"{path} is {kind}'s own json: export it as {_EXPORTS[kind]}"
    return f"{path} is neither a folder, a COCO .json nor a YOLO .yaml"


def _foreign_json(folder: DataFolder) -> list[str]:
    return folder.list_json(*_EXPORTS)


def _labels(folder: DataFolder) -> list[str]:
    return [file for file in folder.list_annotations(".txt")[:1000] if has_yolo_labels(file)]


def _tables(folder: DataFolder) -> list[str]:
    return folder.list_annotations(".csv", ".tfrecord", ".record", ".parquet")


def list_voc_below(folder: DataFolder) -> list[str]:
    """List the subfolders with VOC's lists of images, which a reader of the whole folder would ignore."""
    return sorted(str(f) for f in folder.path.iterdir() if f.is_dir() and (f / "ImageSets").is_dir())


def _yaml_below(folder: DataFolder) -> list[str]:
    return [file for file in folder.list_annotations(".yaml", ".yml") if is_data_yaml(file)]


_HINTS: tuple[tuple[Callable[[DataFolder], list[str]], Callable[[DataFolder, list[str]], str]], ...] = (
    (_yaml_below, lambda folder, files: f"holds no data.yaml: did you mean {' or '.join(files)}?"),
    (
        list_voc_below,
        lambda folder, files: f"holds no dataset, but {len(files)} below: did you mean {' or '.join(files)}?",
    ),
    (
        _foreign_json,
        lambda folder, files: (
            f"holds {folder.identify_json(files[0])}'s own json ({files[0]}): export the project as "
            f"{_EXPORTS[folder.identify_json(files[0]) or '']}"
        ),
    ),
    (
        _labels,
        lambda folder, files: (
            "looks like YOLO data, but has no data.yaml with 'names', 'train' and 'val', and no "
            f"classes.txt with a class name in each line: the labels, such as {files[0]}, hold class numbers only"
        ),
    ),
    (
        lambda folder: folder.list_annotations(".xml"),
        lambda folder, files: (
            f"holds no dataset: {files[0]} is no annotation of VOC (<annotation>) or CVAT (<annotations>)"
        ),
    ),
    (
        lambda folder: folder.list_annotations(".jsonl"),
        lambda folder, files: (
            f"looks like Hugging Face's imagefolder, but its {Path(files[0]).name} must be called metadata.jsonl"
            if file_mentions(files[0], r'"file_name"')
            else f"holds no dataset: the lines of {files[0]} lack 'file_name' and 'objects', those of an imagefolder"
        ),
    ),
    (
        lambda folder: folder.list_annotations(".json"),
        lambda folder, files: (
            f"holds no dataset: {files[0]} is not COCO, it lacks 'images', 'annotations' and "
            "'categories', and it is neither of LabelMe ('shapes') nor of VIA ('regions')"
        ),
    ),
    (
        _tables,
        lambda folder, files: (
            f"holds no dataset: {Path(files[0]).suffix} files, such as {files[0]}, are not read; "
            f"what is read is {_KNOWN}"
        ),
    ),
    (
        lambda folder: [file for file in folder.list_annotations(".txt") if file_mentions(file, _OTHER_LABEL)],
        lambda folder, files: (
            f"holds no dataset: its text files, such as {files[0]}, are no labels of YOLO, whose lines "
            "are 'class cx cy w h' with the number of a class"
        ),
    ),
    (
        lambda folder: folder.list_annotations(*_ARCHIVES),
        lambda folder, files: f"holds no dataset, but the archive {files[0]}: unpack it",
    ),
    (
        lambda folder: sorted(folder.images),
        lambda folder, files: (
            f"holds no dataset: there are {len(files)} images, but no annotations; what is read is {_KNOWN}"
        ),
    ),
)
"""What is looked for, in this order, and the end of the sentence for it."""
