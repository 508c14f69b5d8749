"""Writers of a dataset in COCO, VOC or YOLO format."""

import json
import os
import re
from collections import Counter
from itertools import chain, count
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import yaml

from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.image_files import read_image_sizes
from fusedet.errors import InputError

DROPPED_SEGMENTATIONS = "segmentations that {format} cannot hold: boxes only"
DROPPED_FLAGS = "ignored annotations (crowd, ignore, difficult) that became normal ones: YOLO has no flag for them"
DROPPED_CROWDS = "crowds that became difficult annotations: VOC has no crowds"
DROPPED_IGNORE = "annotations with ignore=1 that became difficult ones: VOC's evaluation ignores them too"
NEW_IDS = "classes whose category id changed: {format} assigns its own"
RENAMED = "images renamed: the name was taken, or a list cannot hold it"

_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
TOLERANCE = 1e-6  # pixels: a polygon replaces its box where its bounds are this close
IMAGE_FOLDERS = {"coco": "images", "voc": "JPEGImages", "yolo": "images"}  # of the images of all splits


def assign_file_names(data: dict[str, DetectionDataset]) -> dict[str, list[str]]:
    """Assign a file name to each image, by split.

    An image of two splits has one name, and no two images have the same stem.
    """
    names: dict[str, str] = {}  # by source path
    taken: set[str] = set()
    for dataset in data.values():
        for path in map(dataset.path, range(len(dataset))):
            source = os.path.abspath(path)
            if source not in names:
                names[source] = _free_name(path, taken)
                taken.add(os.path.splitext(names[source])[0].casefold())
    return {split: [names[os.path.abspath(r.path(i))] for i in range(len(r))] for split, r in data.items()}


def write_coco(
    folder: Path, data: dict[str, DetectionDataset], file_names: dict[str, list[str]]
) -> dict[str, dict[str, int]]:
    """Write annotations/instances_SPLIT.json.

    Category ids, image ids and segmentations are kept; annotations that evaluation ignores become crowds.

    Returns:
        Per split the counts of `convert_dataset`.
    """
    (folder / "annotations").mkdir()
    report = {}
    for split, dataset in data.items():
        annotations: list[dict[str, Any]] = []
        image_ids, category_ids = dataset.list_image_ids(), dataset.category_id_texts or dataset.category_ids
        for i, image in enumerate(dataset):
            for j, box in enumerate(image.boxes.tolist()):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": image_ids[i],
                    "category_id": category_ids[image.labels[j]],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": float(image.area[j]),
                    "iscrowd": int(image.eval_ignore[j]),
                }
                if image.ignore[j] and not image.eval_ignore[j]:
                    annotation["ignore"] = 1
                segmentation = image.segmentations[j]
                annotations.append(annotation if segmentation is None else annotation | {"segmentation": segmentation})
        sizes = dataset.sizes.tolist()
        images = [
            {"id": image_id, "file_name": name, "height": height, "width": width}
            for image_id, name, (height, width) in zip(image_ids, file_names[split], sizes, strict=True)
        ]
        categories = [{"id": k, "name": name} for k, name in zip(category_ids, dataset.names, strict=True)]
        whole = {"images": images, "annotations": annotations, "categories": categories}
        with open(folder / "annotations" / f"instances_{split}.json", "w", encoding="utf-8") as file:
            json.dump(whole, file)
        report[split] = _count(dataset, file_names[split], Counter())
    return report


def write_voc(
    folder: Path, data: dict[str, DetectionDataset], file_names: dict[str, list[str]]
) -> dict[str, dict[str, int]]:
    """Write Annotations, ImageSets/Main and labels.txt, which keeps the order of the classes.

    Ignored annotations become difficult ones.

    Returns:
        Per split the counts of `convert_dataset`.
    """
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (folder / "Annotations").mkdir()
    names = next(iter(data.values())).names
    _require_valid_names(names, "VOC")
    _require_one_annotation(data, file_names, "VOC")
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    report = {}
    for split, dataset in data.items():
        losses: Counter[str] = Counter()
        stems = [os.path.splitext(name)[0] for name in file_names[split]]
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
        for image, name, stem in zip(dataset, file_names[split], stems, strict=True):
            _voc_xml(image, name, names).write(folder / "Annotations" / f"{stem}.xml", encoding="utf-8")
            losses[DROPPED_SEGMENTATIONS.format(format="VOC")] += sum(
                segmentation is not None for segmentation in image.segmentations
            )
        if dataset.dataset_format == "coco":  # other formats mark difficult annotations
            losses[DROPPED_CROWDS] = int(dataset.eval_ignore.sum())
        losses[DROPPED_IGNORE] = int((dataset.ignore & ~dataset.eval_ignore).sum())
        losses[NEW_IDS.format(format="VOC")] = sum(k != i for i, k in enumerate(dataset.category_ids, 1))
        report[split] = _count(dataset, file_names[split], losses)
    return report


def write_yolo(
    folder: Path, data: dict[str, DetectionDataset], file_names: dict[str, list[str]]
) -> dict[str, dict[str, int]]:
    """Write data.yaml, a list per split, and labels.

    A segmentation is written where it is a single polygon whose bounds are the box.

    Returns:
        Per split the counts of `convert_dataset`.
    """
    names = next(iter(data.values())).names
    _require_one_annotation(data, file_names, "YOLO")
    whole = {**{split: f"{split}.txt" for split in data}, "nc": len(names), "names": dict(enumerate(names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")
    labels = folder / "labels"
    labels.mkdir()
    report = {}
    for split, dataset in data.items():
        _require_annotated_sizes(dataset)
        (folder / f"{split}.txt").write_text(
            "".join(f"./images/{name}\n" for name in file_names[split]), encoding="utf-8"
        )
        losses: Counter[str] = Counter()
        for image, name in zip(dataset, file_names[split], strict=True):
            lines = [_yolo_line(image, j, losses) for j in range(len(image.boxes))]
            if lines:
                (labels / f"{os.path.splitext(name)[0]}.txt").write_text("".join(lines))
        losses[DROPPED_FLAGS] = int(dataset.ignore.sum())
        losses[NEW_IDS.format(format="YOLO")] = sum(k != i for i, k in enumerate(dataset.category_ids))
        report[split] = _count(dataset, file_names[split], losses)
    return report


def _free_name(path: Path, taken: set[str]) -> str:
    """Return the file's own name, else with its folder's, else with a number; without line breaks and not hidden."""
    stem, extension = os.path.splitext(_BREAKS.sub("_", path.name))
    stem = stem.strip().lstrip(".") or "_"
    numbered = (f"{stem}_{n}" for n in count(2))
    free = next(
        s for s in chain([stem, f"{_BREAKS.sub('_', path.parent.name)}_{stem}"], numbered) if s.casefold() not in taken
    )
    return free + extension


def _count(dataset: DetectionDataset, names: list[str], losses: Counter[str]) -> dict[str, int]:
    losses[RENAMED] = sum(name != dataset.path(i).name for i, name in enumerate(names))
    counts = {text: n for text, n in {**dataset.problems, **losses}.items() if n}
    return {"images": len(dataset), "annotations": len(dataset.labels), **counts}


def _require_valid_names(names: tuple[str, ...], dataset_format: str) -> None:
    for name in names:
        if name != name.strip() or not name or not name.isprintable():
            raise InputError(f"the class name {name!r} cannot be written in {dataset_format} format: rename it")
        if names.count(name) > 1:
            raise InputError(
                f"the class name {name!r} belongs to two classes, but {dataset_format} needs unique names: rename one"
            )


def _require_one_annotation(
    data: dict[str, DetectionDataset], file_names: dict[str, list[str]], dataset_format: str
) -> None:
    """Refuse two entries of one image with different annotations: VOC and YOLO have one annotation file per image."""
    seen: dict[str, tuple[bytes, ...]] = {}
    for split, dataset in data.items():
        for image, name in zip(dataset, file_names[split], strict=True):
            annotations = tuple(column.tobytes() for column in (image.boxes, image.labels, image.ignore))
            if seen.setdefault(name, annotations) != annotations:
                raise InputError(
                    f"the image {image.path} has different annotations in image {image.image_id} of the split "
                    f"'{split}' and in another entry, but {dataset_format} has one annotation file per image: "
                    "convert the splits one by one"
                )


def _require_annotated_sizes(dataset: DetectionDataset) -> None:
    """Refuse images that are not of the annotated size: YOLO's boxes are fractions of the image."""
    actual = read_image_sizes([str(dataset.path(i)) for i in range(len(dataset))], exif=dataset.exif)
    wrong = (actual != dataset.sizes.numpy()).any(axis=1)
    if wrong.any():
        i = int(wrong.argmax())
        (h, w), (height, width) = actual[i].tolist(), dataset.sizes[i].tolist()
        raise InputError(
            f"the image {dataset.path(i)} is {w}x{h} pixels (EXIF rotation applied), but its annotations say "
            f"{width}x{height}: YOLO's boxes are fractions of the image and would move"
        )


def _voc_xml(image: ImageAnnotations, name: str, names: tuple[str, ...]) -> Any:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "folder").text = "JPEGImages"
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    ElementTree.SubElement(size, "width").text = str(image.width)
    ElementTree.SubElement(size, "height").text = str(image.height)
    for box, label, ignore in zip(image.boxes.tolist(), image.labels.tolist(), image.ignore.tolist(), strict=True):
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = names[label]
        ElementTree.SubElement(node, "difficult").text = str(int(ignore))
        place = ElementTree.SubElement(node, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True):
            # whole pixels as VOC writes them, else all digits
            ElementTree.SubElement(place, side).text = str(int(value)) if value.is_integer() else repr(value)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _yolo_line(image: ImageAnnotations, j: int, losses: Counter[str]) -> str:
    width, height, box, segmentation = image.width, image.height, image.boxes[j].tolist(), image.segmentations[j]
    if isinstance(segmentation, list) and len(segmentation) == 1:
        points = np.reshape(segmentation[0], (-1, 2))
        bounds = np.concatenate([points.min(axis=0), points.max(axis=0)])
        if np.abs(bounds - box).max() <= TOLERANCE:
            return f"{image.labels[j]} {' '.join(map(repr, (points / [width, height]).ravel().tolist()))}\n"
    if segmentation is not None:
        losses[DROPPED_SEGMENTATIONS.format(format="YOLO")] += 1
    x1, y1, x2, y2 = box
    values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    return f"{image.labels[j]} {' '.join(map(repr, values))}\n"
