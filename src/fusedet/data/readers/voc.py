"""Reader of VOC datasets: an xml per image, with lists of images in ImageSets/Main or a folder per split."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_files import (
    is_image_name,
    is_unread_image_name,
    list_files,
    normalize_split_name,
    read_bytes,
    read_image_sizes,
    read_text,
    require_any_image,
    require_valid_unicode,
    resolve_inside,
    select_split,
)
from fusedet.data.readers.left_out_files import Problems, add_unread_images
from fusedet.errors import InputError, unknown

_CLASS_FILES = ("labels.txt", "classes.txt")
_NO_CLASS = {"__ignore__", "_background_", "__background__"}  # labelling tools put these into labels.txt


def read_voc(root: str | Path, split: str | Path | Sequence[str], *, need_images: bool = True) -> DetectionDataset:
    """Read a split of a VOC dataset.

    - Boxes become x1 - 1, y1 - 1, x2, y2: VOC counts pixels from 1 and includes the last.
    - Difficult annotations set `ImageAnnotations.ignore` and `eval_ignore`.
    - Class names come from labels.txt or classes.txt, else sorted from the annotations of all splits, so that the
      splits agree.
    - Category ids are 1..K, image ids 1..N in the order of the list.

    Args:
        root: The dataset's folder.
        split: The name of the split, a list file, or the names of its images without extension.
        need_images: Whether to refuse a folder where none of the first 100 images exists.

    Raises:
        InputError: The split or an annotation cannot be read; the sentence names the file.
    """
    root = Path(root)
    folders, listed, source = _find_split(root, split)
    names = list(dict.fromkeys(listed))
    if not names:
        raise InputError(f"{source} lists no images")
    parsed = {stem: parse_voc_xml(file) for stem, file in _list_annotations(root).items()}
    classes = _read_class_names(root, parsed)
    paths: list[str] = []
    rows: list[VocAnnotation] = []
    images: dict[str, dict[str, str]] = {}
    problems = Problems()
    problems.counts[annotation_cleaning.LISTED_TWICE] = len(listed) - len(names)
    for name in names:
        file = resolve_inside(folders.annotations, name + ".xml", root, source=source)
        if os.path.normpath(file) not in parsed:
            raise InputError(f"{source} lists {name}, but its annotation {file} does not exist")
        rows.append(parsed[os.path.normpath(file)])
        stem = resolve_inside(folders.images, name, root, source=source)
        folder = os.path.dirname(stem)
        if folder not in images:
            images[folder] = _list_images_by_stem(folder, problems)
        extension = os.path.splitext(rows[-1].file_name)[1] if is_image_name(rows[-1].file_name) else ".jpg"
        paths.append(
            os.path.join(folder, images[folder].get(os.path.basename(stem), os.path.basename(stem) + extension))
        )
    if need_images:
        require_any_image(paths, folders.images, source)
    _find_left_out_images(problems, folders, images.get(str(folders.images), {}), parsed)
    label_of = {name: k for k, name in enumerate(classes)}
    for row in rows:
        if foreign := next((name for name in row.names if name not in label_of), None):
            raise InputError(f"{row.file}: {unknown('class', foreign, classes)}")
    labels = np.array([label_of[name] for row in rows for name in row.names], dtype=np.int64)
    difficult = np.concatenate([row.difficult for row in rows])
    return annotation_cleaning.build_clean_dataset(
        classes,
        range(1, len(classes) + 1),
        image_ids=np.arange(1, len(paths) + 1),
        sizes=_get_sizes(rows, paths),
        paths=paths,
        image_indices=np.repeat(np.arange(len(rows)), [len(row.names) for row in rows]),
        boxes=np.concatenate([row.boxes for row in rows]) - [1, 1, 0, 0],
        labels=labels,
        ignore=difficult,
        eval_ignore=difficult,
        segmentations=[b""] * len(labels),
        source=source,
        dataset_format="voc",
        problems=problems.counts,
        examples=problems.examples,
    )


def list_voc_splits(root: str | Path) -> dict[str, str]:
    """Return the splits of a VOC folder and the list file or folder of each."""
    root = Path(root)
    lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    stems = {file.stem for file in lists}
    # VOC's own folders also hold a list per class, like dog_train.txt
    listed = {f.stem: str(f) for f in lists if not any(f.stem.endswith(f"_{stem}") for stem in stems)}
    return {normalize_split_name(name): file for name, file in listed.items()} | {
        normalize_split_name(f.name): str(f) for f in find_split_folders(root)
    }


def find_split_folders(root: Path) -> list[Path]:
    """Return the subfolders (train, val, ...) that hold xml files beside their images."""
    skipped = {"Annotations", "ImageSets", "JPEGImages"}
    folders = [f for f in sorted(root.iterdir()) if f.is_dir() and f.name not in skipped] if root.is_dir() else []
    return [f for f in folders if any(e.name.endswith(".xml") for e in os.scandir(f))]


@dataclass(frozen=True, slots=True)
class VocAnnotation:
    """The content of one xml file.

    Attributes:
        file: The xml file.
        file_name: The `filename` of the image.
        height: Height in pixels; 0 where absent.
        width: Width in pixels; 0 where absent.
        names: The class names of the G annotations.
        boxes: (G, 4) x1, y1, x2, y2 as written, counted from 1.
        difficult: (G,) bool.
    """

    file: str
    file_name: str
    height: int
    width: int
    names: tuple[str, ...]
    boxes: np.ndarray
    difficult: np.ndarray


class _Builder(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        """Refuse entities: they can expand without end, and no annotation needs them."""
        raise InputError("has a DOCTYPE, which an annotation must not have")


def parse_voc_xml(file: str) -> VocAnnotation:
    """Parse a VOC xml file; raises InputError that names it."""
    content = read_bytes(file)
    try:
        tree = ElementTree.fromstring(content, ElementTree.XMLParser(target=_Builder()))
    except InputError as error:
        raise InputError(f"{file} {error}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{file} is not valid xml: {error}") from error
    if tree.tag != "annotation":
        raise InputError(f"{file} is not a VOC annotation: its root is <{tree.tag}>, not <annotation>")
    size = tree.find("size")
    height, width = (0.0 if size is None else _parse_float(size, side, file, 0.0) for side in ("height", "width"))
    is_known = 0 < height < 2**31 and 0 < width < 2**31
    nodes = tree.findall("object")
    names = tuple(_get_class_name(node, file) for node in nodes)
    boxes = np.array([_parse_box(node, name, file) for node, name in zip(nodes, names)], dtype=np.float64).reshape(
        -1, 4
    )
    difficult = np.array([_parse_float(node, "difficult", file, 0.0) != 0 for node in nodes], dtype=bool)
    return VocAnnotation(
        file,
        _get_text(tree, "filename"),
        int(height) if is_known else 0,
        int(width) if is_known else 0,
        names,
        boxes,
        difficult,
    )


def _get_class_name(node: ElementTree.Element, file: str) -> str:
    name = _get_text(node, "name")
    if not name:
        raise InputError(f"{file}: an <object> has no <name>")
    return sys.intern(name)  # millions of annotations have few classes


def _parse_box(node: ElementTree.Element, name: str, file: str) -> list[float]:
    box = node.find("bndbox")
    if box is None:
        raise InputError(f"{file}: the <object> '{name}' has no <bndbox>")
    return [_parse_float(box, side, file) for side in ("xmin", "ymin", "xmax", "ymax")]


def _get_text(node: ElementTree.Element, tag: str) -> str:
    return (node.findtext(tag) or "").strip()


def _parse_float(node: ElementTree.Element, tag: str, file: str, default: float | None = None) -> float:
    text = node.findtext(tag) or ""
    try:
        return float(text)
    except ValueError as error:
        if default is not None and not text.strip():
            return default
        raise InputError(f"{file}: <{tag}> must be a number, not '{text.strip()[:40]}'") from error


@dataclass(frozen=True)
class _Folders:
    annotations: Path
    images: Path


def _find_split(root: Path, split: str | Path | Sequence[str]) -> tuple[_Folders, list[str], str]:
    """The folders of a split, the names of its images without extension, and its list file or folder."""
    folders = _Folders(root / "Annotations", root / "JPEGImages")
    if not isinstance(split, str | Path):
        return folders, list(split), str(root)
    if str(split).endswith(".txt"):
        file = Path(split)
    else:
        splits = list_voc_splits(root)
        main = root / "ImageSets" / "Main"
        if not splits and not any(main.glob("*.txt")):
            raise InputError(
                f"{root} has no lists of images: VOC needs {main}/{split}.txt with an image's name in each line"
            )
        file = main / f"{split}.txt"
        file = file if file.is_file() else Path(select_split(splits, str(split), root))
    if file.is_dir():
        return _Folders(file, file), sorted(e.name[:-4] for e in os.scandir(file) if e.name.endswith(".xml")), str(file)
    for folder in (folders.annotations, folders.images):
        if not folder.is_dir():
            raise InputError(f"{root} is not a complete VOC dataset: the folder {folder.name} is missing")
    lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    require_valid_unicode(lines, file)
    return folders, [_parse_list_line(line, folders.annotations) for line in lines], str(file)


def _parse_list_line(line: str, annotations: Path) -> str:
    """The image name in a line of a list; a flag (1, 0 or -1) or an extension may follow it."""
    if os.path.exists(os.path.join(annotations, line + ".xml")):
        return line
    name = re.sub(r"\s+(-1|0|1)$", "", line)
    return os.path.splitext(name)[0] if is_image_name(name) else name


def _list_annotations(root: Path) -> dict[str, str]:
    """All xml files of the dataset, by normalised path."""
    folder = root / "Annotations"
    files = [file for file in list_files(folder) if file.endswith(".xml")] if folder.is_dir() else []
    for folder in find_split_folders(root):
        files += [e.path for e in os.scandir(folder) if e.name.endswith(".xml")]
    return {os.path.normpath(file): file for file in sorted(files)}


def _read_class_names(root: Path, parsed: dict[str, VocAnnotation]) -> list[str]:
    for name in _CLASS_FILES:
        if (root / name).is_file():
            lines = [line.strip() for line in read_text(root / name).splitlines()]
            classes = list(dict.fromkeys(line for line in lines if line and line not in _NO_CLASS))
            if not classes:
                raise InputError(f"{root / name} lists no classes")
            return classes
    classes = sorted({name for row in parsed.values() for name in row.names})
    if not classes:
        raise InputError(
            f"no annotation file in {root} has an <object>, so there are no class names: list them in "
            f"{root / 'labels.txt'}"
        )
    return classes


def _list_images_by_stem(folder: str, problems: Problems) -> dict[str, str]:
    """The images of a folder, by their names without extension; a format that is read goes before one that is not."""
    if not os.path.isdir(folder):
        return {}
    images: dict[str, str] = {}
    names = sorted(entry.name for entry in os.scandir(folder))
    for name in filter(is_image_name, names):
        stem = os.path.splitext(name)[0]
        if stem in images:
            problems.add(annotation_cleaning.SAME_STEM, [os.path.join(folder, name)])
        images[stem] = name
    for name in filter(is_unread_image_name, names):
        images.setdefault(os.path.splitext(name)[0], name)
    return images


def _find_left_out_images(
    problems: Problems, folders: _Folders, images: dict[str, str], parsed: dict[str, VocAnnotation]
) -> None:
    """Count the images of the split's folder that have no annotation file."""
    for stem, name in images.items():
        if os.path.normpath(folders.annotations / f"{stem}.xml") not in parsed:
            if is_image_name(name):
                problems.add(annotation_cleaning.NO_ANNOTATION_FILE, [str(folders.images / name)])
            add_unread_images(problems, str(folders.images), [name])


def _get_sizes(rows: list[VocAnnotation], paths: list[str]) -> np.ndarray:
    """(N, 2) heights and widths; where the xml has none, from the image."""
    sizes = np.array([(row.height, row.width) for row in rows], dtype=np.int64).reshape(-1, 2)
    missing = np.flatnonzero((sizes == 0).any(axis=1))
    sizes[missing] = read_image_sizes([paths[i] for i in missing.tolist()])
    return sizes
