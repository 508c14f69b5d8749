"""DetectionDataset written as COCO, VOC or YOLO files."""

from __future__ import annotations

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

DROPPED_SEGMENTATIONS = "segmentations that {form} cannot carry: boxes only"
DROPPED_FLAGS = "crowd or difficult objects that became plain objects: YOLO has no flag for them"
DROPPED_CROWDS = "crowds that became difficult objects: VOC has no crowds"
NEW_IDS = "classes whose category id changed: {form} numbers classes by itself"
RENAMED = "images renamed: two had the same name, or a list could not hold it"

_BREAKS = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]")
SAME = 1e-6  # pixels by which a segmentation's bounds may miss its box to stand for it
FOLDERS = {"coco": "images", "voc": "JPEGImages", "yolo": "images"}  # where a form keeps the images of all splits


def assign_file_names(data: dict[str, DetectionDataset]) -> dict[str, list[str]]:
    """A file name per image, by split: an image of two splits has one name, and no two images have the same stem."""
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
    folder: Path, data: dict[str, DetectionDataset], image_entries: dict[str, list[str]]
) -> dict[str, dict[str, int]]:
    """annotations/instances_SPLIT.json; category ids, image ids and segmentations are kept; what evaluation ignores is a crowd."""
    (folder / "annotations").mkdir()
    report = {}
    for split, dataset in data.items():
        annotations: list[dict[str, Any]] = []
        for record in dataset:
            for j, box in enumerate(record.boxes.tolist()):
                annotation = {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": dataset.category_ids[record.labels[j]],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": float(record.area[j]),
                    "iscrowd": int(record.eval_ignore[j]),
                }
                if record.ignore[j] and not record.eval_ignore[j]:
                    annotation["ignore"] = 1
                segmentation = record.segmentations[j]
                annotations.append(annotation if segmentation is None else annotation | {"segmentation": segmentation})
        sizes = dataset.sizes.tolist()
        images = [
            {"id": int(image_id), "file_name": name, "height": height, "width": width}
            for image_id, name, (height, width) in zip(dataset.image_ids, image_entries[split], sizes, strict=True)
        ]
        categories = [{"id": k, "name": name} for k, name in zip(dataset.category_ids, dataset.names, strict=True)]
        whole = {"images": images, "annotations": annotations, "categories": categories}
        with open(folder / "annotations" / f"instances_{split}.json", "w", encoding="utf-8") as file:
            json.dump(whole, file)
        report[split] = _report(dataset, image_entries[split], Counter())
    return report


def write_voc(
    folder: Path, data: dict[str, DetectionDataset], image_entries: dict[str, list[str]]
) -> dict[str, dict[str, int]]:
    """Annotations, ImageSets/Main and labels.txt, which keeps the order of the classes; ignored objects are difficult."""
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (folder / "Annotations").mkdir()
    names = _one_of(data).names
    _require_plain(names, "VOC")
    _require_one_annotation(data, image_entries, "VOC")
    (folder / "labels.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    report = {}
    for split, dataset in data.items():
        notes: Counter[str] = Counter()
        stems = [os.path.splitext(name)[0] for name in image_entries[split]]
        (lists / f"{split}.txt").write_text("".join(f"{stem}\n" for stem in stems), encoding="utf-8")
        for record, name, stem in zip(dataset, image_entries[split], stems, strict=True):
            _voc_xml(record, name, names).write(folder / "Annotations" / f"{stem}.xml", encoding="utf-8")
            notes[DROPPED_SEGMENTATIONS.format(form="VOC")] += sum(
                segmentation is not None for segmentation in record.segmentations
            )
            notes[DROPPED_CROWDS] += sum(
                isinstance(s, dict) and bool(i) for s, i in zip(record.segmentations, record.ignore, strict=True)
            )
        notes[NEW_IDS.format(form="VOC")] = sum(k != i for i, k in enumerate(dataset.category_ids, 1))
        report[split] = _report(dataset, image_entries[split], notes)
    return report


def write_yolo(
    folder: Path, data: dict[str, DetectionDataset], image_entries: dict[str, list[str]]
) -> dict[str, dict[str, int]]:
    """data.yaml, a list per split and labels; a segmentation is written where it is one polygon whose bounds are the box."""
    names = _one_of(data).names
    _require_one_annotation(data, image_entries, "YOLO")
    whole = {**{split: f"{split}.txt" for split in data}, "nc": len(names), "names": dict(enumerate(names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(whole, sort_keys=False, allow_unicode=True), encoding="utf-8")
    labels = folder / "labels"
    labels.mkdir()
    report = {}
    for split, dataset in data.items():
        _require_true_sizes(dataset)
        (folder / f"{split}.txt").write_text(
            "".join(f"./images/{name}\n" for name in image_entries[split]), encoding="utf-8"
        )
        notes: Counter[str] = Counter()
        for record, name in zip(dataset, image_entries[split], strict=True):
            lines = [_yolo_line(record, j, notes) for j in range(len(record.boxes))]
            if lines:
                (labels / f"{os.path.splitext(name)[0]}.txt").write_text("".join(lines))
        notes[DROPPED_FLAGS] = int(dataset.ignore.sum())
        notes[NEW_IDS.format(form="YOLO")] = sum(k != i for i, k in enumerate(dataset.category_ids))
        report[split] = _report(dataset, image_entries[split], notes)
    return report


def _free_name(path: Path, taken: set[str]) -> str:
    """The file's own name, else with its folder's, else with a number; without what breaks a line of a list, and not hidden."""
    stem, extension = os.path.splitext(_BREAKS.sub("_", path.name))
    stem = stem.strip().lstrip(".") or "_"
    numbered = (f"{stem}_{n}" for n in count(2))
    free = next(
        s for s in chain([stem, f"{_BREAKS.sub('_', path.parent.name)}_{stem}"], numbered) if s.casefold() not in taken
    )
    return free + extension


def _one_of(data: dict[str, DetectionDataset]) -> DetectionDataset:
    return next(iter(data.values()))


def _report(dataset: DetectionDataset, names: list[str], notes: Counter[str]) -> dict[str, int]:
    notes[RENAMED] = sum(name != dataset.path(i).name for i, name in enumerate(names))
    told = {text: n for text, n in {**dataset.problems, **notes}.items() if n}
    return {"images": len(dataset), "objects": len(dataset.labels), **told}


def _require_plain(names: tuple[str, ...], form: str) -> None:
    for name in names:
        if name != name.strip() or not name or not name.isprintable():
            raise InputError(f"the class name {name!r} cannot be written in {form} form: rename it")
        if names.count(name) > 1:
            raise InputError(
                f"the class name {name!r} is given to two classes, which {form} cannot tell apart: rename one"
            )


def _require_one_annotation(data: dict[str, DetectionDataset], image_entries: dict[str, list[str]], form: str) -> None:
    """VOC and YOLO have one annotation per image: one that two entries annotate differently would lose objects."""
    seen: dict[str, tuple[bytes, ...]] = {}
    for split, dataset in data.items():
        for record, name in zip(dataset, image_entries[split], strict=True):
            objects = tuple(column.tobytes() for column in (record.boxes, record.labels, record.ignore))
            if seen.setdefault(name, objects) != objects:
                raise InputError(
                    f"the image {record.path} has other objects in another entry than in image {record.image_id} of the split '{split}', "
                    f"but {form} holds one annotation per image: convert the splits one by one"
                )


def _require_true_sizes(dataset: DetectionDataset) -> None:
    """YOLO's boxes are fractions of the real image: annotations of another size would move."""
    real = read_image_sizes([str(dataset.path(i)) for i in range(len(dataset))])
    wrong = (real != dataset.sizes.numpy()).any(axis=1)
    if wrong.any():
        i = int(wrong.argmax())
        (h, w), (height, width) = real[i].tolist(), dataset.sizes[i].tolist()
        raise InputError(
            f"the image {dataset.path(i)} is {w}x{h} pixels (EXIF rotation applied), but its annotations say {width}x{height}: "
            "YOLO's boxes are fractions of the image and would move"
        )


def _voc_xml(record: ImageAnnotations, name: str, names: tuple[str, ...]) -> Any:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "folder").text = "JPEGImages"
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    ElementTree.SubElement(size, "width").text = str(record.width)
    ElementTree.SubElement(size, "height").text = str(record.height)
    for box, label, ignore in zip(record.boxes.tolist(), record.labels.tolist(), record.ignore.tolist(), strict=True):
        node = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(node, "name").text = names[label]
        ElementTree.SubElement(node, "difficult").text = str(int(ignore))
        place = ElementTree.SubElement(node, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True):
            # whole pixels as VOC writes them, all else to the last bit
            ElementTree.SubElement(place, side).text = str(int(value)) if value.is_integer() else repr(value)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _yolo_line(record: ImageAnnotations, j: int, notes: Counter[str]) -> str:
    width, height, box, segmentation = record.width, record.height, record.boxes[j].tolist(), record.segmentations[j]
    if isinstance(segmentation, list) and len(segmentation) == 1:
        points = np.reshape(segmentation[0], (-1, 2))
        bounds = np.concatenate([points.min(axis=0), points.max(axis=0)])
        if np.abs(bounds - box).max() <= SAME:
            return f"{record.labels[j]} {' '.join(map(repr, (points / [width, height]).ravel().tolist()))}\n"
    if segmentation is not None:
        notes[DROPPED_SEGMENTATIONS.format(form="YOLO")] += 1
    x1, y1, x2, y2 = box
    values = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    return f"{record.labels[j]} {' '.join(map(repr, values))}\n"
