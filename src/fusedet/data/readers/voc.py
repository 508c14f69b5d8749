"""Reader of VOC datasets: an xml per image, with lists of images in ImageSets/Main or in folders of any name."""

import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from fusedet.data import annotation_cleaning
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_files import (
    SPLIT_NAMES,
    is_image_name,
    is_system_file,
    is_unread_image_name,
    list_files,
    normalize_split_names,
    read_bytes,
    read_text,
    require_any_image,
    require_valid_unicode,
    resolve_inside,
    select_split,
)
from fusedet.data.readers.data_folder import DataFolder
from fusedet.data.readers.left_out_files import Problems, add_unread_images
from fusedet.data.readers.number_text import parse_number
from fusedet.data.readers.records import (
    ImageRecord,
    build_dataset,
    build_split,
    image_name_of,
    read_annotation_files,
    read_class_names,
)
from fusedet.errors import InputError

_OFFSET = np.array([1.0, 1.0, 0.0, 0.0])  # VOC counts pixels from 1 and includes the last


def read_voc(
    root: str | Path, split: str | Path | Sequence[str], *, need_images: bool = True, exif: bool = True
) -> DetectionDataset:
    """Read a split of a VOC dataset.

    - Boxes become x1 - 1, y1 - 1, x2, y2: VOC counts pixels from 1 and includes the last.
    - Difficult annotations set `ImageAnnotations.ignore` and `eval_ignore`.
    - Class names come from labels.txt or classes.txt, else sorted from the annotations of all splits, so that the
      splits agree.
    - Category ids are 1..K, image ids 1..N in the order of the list.
    - Without lists of images, xml files and images may lie in folders of any name. A folder train, val or test is a
      split; without such folders all are `train`.

    Args:
        root: The dataset's folder.
        split: The name of the split, a list file, or the names of its images without extension.
        need_images: Whether to refuse a folder where none of the first 100 images exists.
        exif: Whether a missing size is that after EXIF rotation.

    Raises:
        InputError: The split or an annotation cannot be read; the sentence names the file.
    """
    folder = DataFolder(root)
    lists = _list_splits_of_lists(folder.root)
    if isinstance(split, str | Path) and not str(split).endswith(".txt") and not lists:
        files = folder.list_annotations(".xml")
        records = read_annotation_files(folder, "voc", files, _parse_record, str(split))
        return build_split(folder, records, str(split), exif=exif)
    listed, source = _read_names(folder.root, split, lists)
    names = list(dict.fromkeys(listed))
    if not names:
        raise InputError(f"{source} lists no images")
    annotations, image_folder = folder.root / "Annotations", folder.root / "JPEGImages"
    files = sorted(os.path.normpath(file) for file in list_files(annotations) if file.endswith(".xml"))
    parsed = {file: parse_voc_xml(file) for file in files}
    rows: list[ImageRecord] = []
    images: dict[str, dict[str, str]] = {}
    problems = Problems()
    problems.counts[annotation_cleaning.LISTED_TWICE] = len(listed) - len(names)
    for name in names:
        file = os.path.normpath(resolve_inside(annotations, name + ".xml", folder.root, source=source))
        if file not in parsed:
            raise InputError(f"{source} lists {name}, but its annotation {file} does not exist")
        annotation = parsed[file]
        stem = resolve_inside(image_folder, name, folder.root, source=source)
        directory = os.path.dirname(stem)
        if directory not in images:
            images[directory] = _list_images_by_stem(directory, problems)
        extension = os.path.splitext(annotation.file_name)[1] if is_image_name(annotation.file_name) else ".jpg"
        path = os.path.join(
            directory, images[directory].get(os.path.basename(stem), os.path.basename(stem) + extension)
        )
        rows.append(_to_record(annotation, path))
    if need_images:
        require_any_image([record.path for record in rows], image_folder, source)
    _find_left_out_images(problems, image_folder, annotations, images.get(str(image_folder), {}), parsed)
    return build_dataset(
        rows,
        read_class_names(folder.root, (annotation.names for annotation in parsed.values())),
        source=source,
        dataset_format="voc",
        problems=problems,
        exif=exif,
    )


def list_voc_splits(root: str | Path) -> dict[str, str]:
    """Return the splits of a VOC folder and the list files or the first folder of each.

    Raises:
        InputError: An annotation file cannot be read.
    """
    folder = DataFolder(root)
    if lists := _list_splits_of_lists(folder.root):
        return {name: ", ".join(map(str, files)) for name, files in lists.items()}
    records = read_annotation_files(folder, "voc", folder.list_annotations(".xml"), _parse_record)
    return {name: os.path.dirname(group[0].file) for name, group in records.splits.items()}


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


def parse_xml(file: str, root: str, kind: str) -> ElementTree.Element:
    """Parse an xml file of a kind, with a given root; raises InputError that names it."""
    content = read_bytes(file)
    try:
        tree = ElementTree.fromstring(content, ElementTree.XMLParser(target=_Builder()))
    except InputError as error:
        raise InputError(f"{file} {error}") from error
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise InputError(f"{file} is not valid xml: {error}") from error
    if tree.tag != root:
        raise InputError(f"{file} is not {kind}: its root is <{tree.tag}>, not <{root}>")
    return tree


def parse_voc_xml(file: str) -> VocAnnotation:
    """Parse a VOC xml file; raises InputError that names it."""
    tree = parse_xml(file, "annotation", "a VOC annotation")
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
        return parse_number(text)
    except ValueError as error:
        if default is not None and not text.strip():
            return default
        raise InputError(f"{file}: <{tag}> must be a number, not '{text.strip()[:40]}'") from error


def _to_record(annotation: VocAnnotation, path: str) -> ImageRecord:
    return ImageRecord(
        annotation.file,
        path,
        annotation.names,
        annotation.boxes - _OFFSET,
        annotation.height,
        annotation.width,
        annotation.difficult,
    )


def _parse_record(folder: DataFolder, file: str, problems: Problems) -> ImageRecord | None:
    """Read the record of an xml file: its image has the file's name, else the name that the file holds."""
    annotation, own = parse_voc_xml(file), image_name_of(file)
    written = [annotation.file_name] if annotation.file_name else []
    is_own = written and image_name_of(annotation.file_name) == own  # then it tells a.jpg from a.png
    path = folder.find_image(file, *([*written, own] if is_own else [own, *written]))
    return _to_record(annotation, path) if path else None


def _list_splits_of_lists(root: Path) -> dict[str, list[Path]]:
    """Find the splits of ImageSets/Main and their list files.

    VOC's own folders also hold a list per class, like dog_train.txt, beside train.txt. Other tools write these lists
    only: those of all classes together are the split.
    """
    files = [file for file in sorted((root / "ImageSets" / "Main").glob("*.txt")) if not is_system_file(file.name)]
    stems = {file.stem for file in files}
    splits: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        _, is_of_class, ending = file.stem.rpartition("_")
        if is_of_class and ending in stems:
            continue
        splits[ending if is_of_class and ending in SPLIT_NAMES else file.stem].append(file)
    return dict(zip(normalize_split_names(list(splits)), splits.values(), strict=True))


def _read_names(root: Path, split: str | Path | Sequence[str], lists: dict[str, list[Path]]) -> tuple[list[str], str]:
    """Read the names of a split's images without extension, and the source of the list."""
    if not isinstance(split, str | Path):
        return list(split), str(root)
    named = root / "ImageSets" / "Main" / f"{split}.txt"
    if str(split).endswith(".txt"):
        files = [Path(split)]
    else:
        files = [named] if named.is_file() else select_split(lists, str(split), root)
    for folder in ("Annotations", "JPEGImages"):
        if not (root / folder).is_dir():
            raise InputError(f"{root} is not a complete VOC dataset: the folder {folder} is missing")
    names: list[str] = []
    for file in files:
        lines = [line.strip() for line in read_text(file).splitlines() if line.strip()]
        require_valid_unicode(lines, file)
        names += [_parse_list_line(line, root / "Annotations") for line in lines]
    # lists per class each name all images
    return list(dict.fromkeys(names)) if len(files) > 1 else names, ", ".join(map(str, files))


def _parse_list_line(line: str, annotations: Path) -> str:
    """Return the image name in a line of a list; a flag (1, 0 or -1) or an extension may follow it."""
    if os.path.exists(os.path.join(annotations, line + ".xml")):
        return line
    name = re.sub(r"\s+(-1|0|1)$", "", line)
    return os.path.splitext(name)[0] if is_image_name(name) else name


def _list_images_by_stem(folder: str, problems: Problems) -> dict[str, str]:
    """Map a folder's images by their names without extension; a format that is read goes before one that is not."""
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
    problems: Problems, folder: Path, annotations: Path, images: dict[str, str], parsed: dict[str, VocAnnotation]
) -> None:
    """Count the images of a folder that have no annotation file."""
    for stem, name in images.items():
        if os.path.normpath(annotations / f"{stem}.xml") not in parsed:
            if is_image_name(name):
                problems.add(annotation_cleaning.NO_ANNOTATION_FILE, [str(folder / name)])
            add_unread_images(problems, str(folder), [name])
