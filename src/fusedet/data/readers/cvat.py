"""Reader of CVAT's xml for images: all images in one file, with boxes, polygons, ellipses and masks."""

import math
from collections import defaultdict
from collections.abc import Iterator
from xml.etree import ElementTree

from fusedet.data import annotation_cleaning
from fusedet.data.image_files import normalize_split_names
from fusedet.data.readers.data_folder import DataFolder, file_mentions
from fusedet.data.readers.left_out_files import Problems
from fusedet.data.readers.number_text import parse_number
from fusedet.data.readers.records import ImageRecord, ImageShapes, RecordSet
from fusedet.data.readers.voc import parse_xml
from fusedet.errors import InputError

_SHAPES = {"box", "polygon", "polyline", "points", "ellipse", "mask", "cuboid", "skeleton"}


def list_cvat_files(folder: DataFolder) -> list[str]:
    """List the xml files of CVAT, for images or for video."""
    return [file for file in folder.list_annotations(".xml") if file_mentions(file, r"<annotations[\s>]")]


def read_cvat(folder: DataFolder, split: str | None = None) -> RecordSet:
    """Read CVAT's "CVAT for images 1.1"; a project's subsets are the splits, and `default` is `train`.

    Raises:
        InputError: A file is malformed, or is CVAT's format for video.
    """
    files = list_cvat_files(folder)
    by_folder = {file: name for name, group in folder.group_by_split(files, by_file=True).items() for file in group}
    groups: dict[str, list[ImageRecord]] = defaultdict(list)
    classes: dict[str, None] = {}
    problems = Problems()
    for file in files:
        root = parse_xml(file, "annotations", "an export of CVAT")
        if root.find("track") is not None and root.find("image") is None:
            raise InputError(
                f"{file} is CVAT's format for video, which names no images: export it as 'CVAT for images 1.1' or COCO"
            )
        labels = (label for label in root.iterfind("meta//labels/label") if label.find("parent") is None)
        classes |= dict.fromkeys(filter(None, (label.findtext("name") for label in labels)))  # no parts of skeletons
        for subset, record in _parse_images(folder, file, root, problems):
            groups[subset or by_folder[file]].append(record)
    if not groups:
        raise InputError(f"{folder.path}: none of the images of {', '.join(files)} is there")
    splits = dict(zip(normalize_split_names(list(groups)), groups.values(), strict=True))
    return RecordSet("cvat", splits, list(classes), problems)


def _parse_images(
    folder: DataFolder, file: str, root: ElementTree.Element, problems: Problems
) -> Iterator[tuple[str, ImageRecord]]:
    """Yield the subset and the record of each image."""
    for image in root.iterfind("image"):
        name, subset = image.get("name", ""), image.get("subset", "")
        names = [f"{subset}/{name}"] * bool(subset) + [name] * bool(name)
        path = folder.find_image(file, *names)
        nodes = [node for node in image if node.tag in _SHAPES]
        if path is None:
            problems.add(annotation_cleaning.NO_IMAGE, [file] * len(nodes))
            continue
        shapes = ImageShapes()
        for node in nodes:
            _add_shape(shapes, node, path, f"{file}, image '{name}'", problems)
        height, width = (int(_number(image, side, file, "0")) for side in ("height", "width"))
        yield subset, shapes.to_record(file, path, height, width)


def _add_shape(shapes: ImageShapes, node: ElementTree.Element, path: str, where: str, problems: Problems) -> None:
    label = node.get("label")
    if not label:
        raise InputError(f"{where}: a <{node.tag}> has no label")

    def number(key: str, default: str | None = None) -> float:
        return _number(node, key, where, default)

    if node.tag == "box":
        x1, y1, x2, y2 = (number(key) for key in ("xtl", "ytl", "xbr", "ybr"))
        w, h = _rotated((x2 - x1) / 2, (y2 - y1) / 2, number("rotation", "0"))
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        shapes.add_box(label, *((x - w, y - h, x + w, y + h) if node.get("rotation") else (x1, y1, x2, y2)))
    elif node.tag == "ellipse":
        x, y, rx, ry = (number(key) for key in ("cx", "cy", "rx", "ry"))
        shapes.add_ellipse(label, x, y, rx, ry, math.radians(number("rotation", "0")))
    elif node.tag == "mask":
        x, y = number("left"), number("top")
        shapes.add_box(label, x, y, x + number("width"), y + number("height"))
    elif node.tag == "polygon":
        try:
            points = [tuple(map(float, point.split(","))) for point in node.get("points", "").split(";")]
            if len(points) < 3 or {len(point) for point in points} != {2}:
                raise ValueError
        except ValueError:
            raise InputError(f"{where}: the points of a <polygon> must be 'x,y;x,y;x,y...'") from None
        shapes.add_polygons(label, points)
    else:
        problems.add(annotation_cleaning.NO_REGION, [path])


def _rotated(w: float, h: float, degrees: float) -> tuple[float, float]:
    """Compute half the width and height that a rotated box of half sizes w, h takes up."""
    cos, sin = abs(math.cos(math.radians(degrees))), abs(math.sin(math.radians(degrees)))
    return w * cos + h * sin, w * sin + h * cos


def _number(node: ElementTree.Element, key: str, where: str, default: str | None = None) -> float:
    try:
        value = parse_number(node.get(key, default or ""))
        if not math.isfinite(value):
            raise ValueError
        return value
    except ValueError:
        raise InputError(f"{where}: '{key}' of <{node.tag}> must be a number, not '{node.get(key, '')[:40]}'") from None
