"""Foreign readers as oracles: pycocotools, supervision and globox read the same boxes and classes as fusedet."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusedet.data.conversion import convert_dataset
from fusedet.data.dataset import DetectionDataset
from fusedet.data.readers.auto import list_splits, read_dataset
from layouts import IMAGES, LAYOUTS, put_images, put_xml, write_json

Rows = dict[str, list[tuple[Any, ...]]]
"""Class and corners of each object, sorted, by the image's name."""


def rows_of(objects: Iterable[tuple[str, str, Iterable[float]]]) -> Rows:
    rows: Rows = {}
    for name, label, box in objects:
        rows.setdefault(Path(name).stem, []).append((label, *np.round(np.asarray(list(box), float), 2).tolist()))
    return {name: sorted(own) for name, own in rows.items()}


def ours(dataset: DetectionDataset, offset: Iterable[float] = (0, 0, 0, 0)) -> Rows:
    return rows_of(
        (r.path.name, dataset.names[k], box + np.asarray(list(offset), float))
        for r in dataset
        for k, box in zip(r.labels, r.boxes, strict=True)
    )


def read_with_pycocotools(file: Path) -> Rows:
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(file))
    names = {k: category["name"] for k, category in coco.cats.items()}
    return rows_of(
        (coco.imgs[a["image_id"]]["file_name"], names[a["category_id"]], (x, y, x + w, y + h))
        for a in coco.loadAnns(coco.getAnnIds())
        for x, y, w, h in [a["bbox"]]
    )


def read_with_supervision(load: Callable[..., Any], **files: str) -> Rows:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = load(**files)
        entries = [(path, detections) for path, _, detections in dataset]
    return rows_of(
        (path, dataset.classes[k], box)
        for path, detections in entries
        for k, box in zip(detections.class_id, detections.xyxy, strict=True)
    )


def read_with_globox(annotations: Any, names: list[str] | None = None) -> Rows:
    return rows_of(
        (annotation.image_id, names[int(box.label)] if names else box.label, (box.xmin, box.ymin, box.xmax, box.ymax))
        for annotation in annotations
        for box in annotation.boxes
    )


@pytest.fixture(params=["layout", "bccd"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A dataset of this test, and a real one."""
    if request.param == "bccd":
        root = request.getfixturevalue("shared") / "data" / "bccd"
        names = (root / "ImageSets" / "Main" / "test.txt").read_text().split()[:12]
        for folder, ending in (("JPEGImages", ".jpg"), ("Annotations", ".xml")):
            (tmp_path / "source" / folder).mkdir(parents=True)
            for name in names:
                (tmp_path / "source" / folder / f"{name}{ending}").symlink_to(
                    root.resolve() / folder / f"{name}{ending}"
                )
        return tmp_path / "source"
    put_images(tmp_path / "source" / "images")
    put_xml(tmp_path / "source" / "annotations")
    return tmp_path / "source"


def test_converted_to_coco(source: Path, tmp_path: Path) -> None:
    sv = pytest.importorskip("supervision")
    convert_dataset(source, tmp_path / "coco", "coco")
    file, images = tmp_path / "coco" / "annotations" / "instances_train.json", tmp_path / "coco" / "images"
    expected = ours(read_dataset(source, "train"))
    assert ours(read_dataset(tmp_path / "coco", "train")) == expected
    assert read_with_pycocotools(file) == expected
    load = sv.DetectionDataset.from_coco
    assert read_with_supervision(load, images_directory_path=str(images), annotations_path=str(file)) == expected


def test_converted_to_voc(source: Path, tmp_path: Path) -> None:
    sv = pytest.importorskip("supervision")
    convert_dataset(source, tmp_path / "voc", "voc")
    folders = {
        "images_directory_path": str(tmp_path / "voc" / "JPEGImages"),
        "annotations_directory_path": str(tmp_path / "voc" / "Annotations"),
    }
    loaded = read_with_supervision(sv.DetectionDataset.from_pascal_voc, **folders)
    assert loaded == ours(read_dataset(tmp_path / "voc", "train")) == ours(read_dataset(source, "train"))


def test_converted_to_yolo(source: Path, tmp_path: Path) -> None:
    sv = pytest.importorskip("supervision")
    convert_dataset(source, tmp_path / "yolo", "yolo")
    files = {
        "images_directory_path": str(tmp_path / "yolo" / "images"),
        "annotations_directory_path": str(tmp_path / "yolo" / "labels"),
        "data_yaml_path": str(tmp_path / "yolo" / "data.yaml"),
    }
    expected = ours(read_dataset(source, "train"))
    assert ours(read_dataset(tmp_path / "yolo", "train")) == expected
    assert read_with_supervision(sv.DetectionDataset.from_yolo, **files) == expected


def test_written_by_supervision(source: Path, tmp_path: Path) -> None:
    """The other way: what supervision writes is read with the same boxes."""
    sv = pytest.importorskip("supervision")
    convert_dataset(source, tmp_path / "coco", "coco")
    file, images = tmp_path / "coco" / "annotations" / "instances_train.json", tmp_path / "coco" / "images"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = sv.DetectionDataset.from_coco(images_directory_path=str(images), annotations_path=str(file))
        dataset.as_pascal_voc(str(tmp_path / "voc" / "images"), str(tmp_path / "voc" / "annotations"))
        dataset.as_yolo(
            str(tmp_path / "yolo" / "images"), str(tmp_path / "yolo" / "labels"), str(tmp_path / "yolo" / "data.yaml")
        )
        dataset.as_coco(str(tmp_path / "c" / "images"), str(tmp_path / "c" / "annotations.json"))
    for written in ("c", "voc", "yolo"):
        assert ours(read_dataset(tmp_path / written, "train")) == ours(read_dataset(source, "train"))


@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name.split()[0] not in ("YOLO", "Darknet's", "imagefolder,")]
)
def test_globox_reads_the_layouts_alike(tmp_path: Path, layout: str) -> None:
    globox = pytest.importorskip("globox").AnnotationSet
    dataset_format, write = LAYOUTS[layout]
    write(tmp_path)
    dataset = read_dataset(tmp_path, "train")
    if dataset_format == "voc":
        folder = next(tmp_path.rglob("*.xml")).parent
        # globox takes the pixels' numbers, which count from 1, as they are
        assert read_with_globox(globox.from_pascal_voc(folder)) == ours(dataset, (1, 1, 0, 0))
    elif dataset_format == "labelme":
        for file in tmp_path.rglob("*.json"):
            content = json.loads(file.read_text())
            for shape in content["shapes"]:
                if shape["shape_type"] == "rectangle":
                    shape["points"].sort()  # globox reads upper left and lower right only
            write_json(file, content | {"imagePath": content["imagePath"].replace("\\", "/")})
        folder = next(tmp_path.rglob("*.json")).parent
        assert read_with_globox(globox.from_labelme(folder, include_poly=True)) == ours(dataset)
    elif dataset_format == "cvat" and "polygons" not in layout:
        assert read_with_globox(globox.from_cvat(tmp_path / "annotations.xml")) == ours(dataset)
    elif dataset_format == "via" and layout == "VIA, rectangles":
        read = globox.from_via_json(next(tmp_path.glob("*.json")), label_key="label", image_folder=tmp_path)
        assert read_with_globox(read) == ours(dataset)
    elif dataset_format == "coco":
        assert read_with_globox(globox.from_coco(Path(next(iter(list_splits(tmp_path).values()))))) == ours(dataset)
    else:
        pytest.skip("globox reads no polygons of CVAT and VIA, and no projects")


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith(("YOLO", "Darknet"))])
def test_globox_reads_yolo_labels_alike(tmp_path: Path, layout: str) -> None:
    globox = pytest.importorskip("globox").AnnotationSet
    LAYOUTS[layout][1](tmp_path)
    dataset = read_dataset(tmp_path, "train")
    labels, images = (next(tmp_path.rglob(f"a{ending}")).parent for ending in (".txt", ".jpg"))
    for file in labels.glob("*.txt"):
        if file.stem not in IMAGES:  # globox takes every text file for labels
            file.unlink()
    assert read_with_globox(globox.from_yolo_v5(labels, image_folder=images), list(dataset.names)) == ours(dataset)
