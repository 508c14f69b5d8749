"""Reader of the VGG Image Annotator's json: all images of a folder in one file, with rectangles, polygons and ellipses.

Its regions have any number of attributes; the class is that of the name `label`, `class`, ..., or the only one.
"""

from collections import Counter
from collections.abc import Iterator

from fusedet.data import annotation_cleaning
from fusedet.data.readers.data_folder import DataFolder
from fusedet.data.readers.json_values import Entry, load_json
from fusedet.data.readers.left_out_files import Problems
from fusedet.data.readers.records import ImageRecord, ImageShapes, RecordSet
from fusedet.errors import InputError

_CLASS_ATTRIBUTES = ("label", "class", "name", "category", "type", "object")
_NO_CLASS = "object"  # of regions without any attribute


def list_via_files(folder: DataFolder) -> list[str]:
    """List the json files of VIA: annotations and projects."""
    return folder.list_json("via")


def read_via(folder: DataFolder, split: str | None = None) -> RecordSet:
    """Read a folder that VIA annotated; images that are absent are counted.

    Raises:
        InputError: A file is malformed, or it is unclear which attribute is the class.
    """
    files, problems = list_via_files(folder), Problems()
    groups = folder.group_by_split(files, split, by_file=True)
    parsed = {file: list(_parse_images(folder, file, problems)) for file in files}
    if not any(parsed.values()):
        raise InputError(f"{folder.path}: none of the images of {', '.join(files)} is there")
    splits = {name: [record for file in group for record in parsed[file]] for name, group in groups.items()}
    return RecordSet("via", {name: records for name, records in splits.items() if records}, (), problems)


def _parse_images(folder: DataFolder, file: str, problems: Problems) -> Iterator[ImageRecord]:
    whole = Entry(load_json(file), file)
    key = "_via_img_metadata"
    images = list((whole if key in whole.values else Entry({key: whole.values}, file)).entries(key))
    attribute = _find_class_attribute(images, file)
    for image in images:
        path = folder.find_image(file, image.text("filename"))
        if path is None:
            problems.add(annotation_cleaning.NO_IMAGE, [file] * len(list(image.entries("regions"))))
            continue
        shapes = ImageShapes()
        for region in image.entries("regions"):
            _add_region(shapes, region, attribute, path, problems)
        yield shapes.to_record(file, path, 0, 0)  # VIA stores no sizes in pixels


def _find_class_attribute(images: list[Entry], file: str) -> str | None:
    counts = Counter(
        key
        for image in images
        for region in image.entries("regions")
        for key, value in region.entry("region_attributes").values.items()
        if value not in ("", {}, None)
    )
    by_name = {key.lower(): key for key in counts}
    named = next((by_name[name] for name in _CLASS_ATTRIBUTES if name in by_name), None)
    if named is None and len(counts) > 1:
        raise InputError(
            f"{file}: the regions have the attributes {', '.join(sorted(counts))}, and none is called "
            f"{' or '.join(_CLASS_ATTRIBUTES[:2])}: rename the one that is the class"
        )
    return named or next(iter(counts), None)


def _class_name(region: Entry, attribute: str | None) -> str:
    if attribute is None:
        return _NO_CLASS
    attributes = region.entry("region_attributes")
    value = attributes.values.get(attribute)
    if isinstance(value, dict):  # a checkbox: {"cat": true}
        chosen = [key for key, is_set in value.items() if is_set]
        if len(chosen) == 1:
            return chosen[0]
        raise InputError(f"{attributes.where}: '{attribute}' must name one class, not {value!r:.60}")
    return attributes.text(attribute).strip()


def _add_region(shapes: ImageShapes, region: Entry, attribute: str | None, path: str, problems: Problems) -> None:
    shape = region.entry("shape_attributes")
    kind = shape.text("name")
    if kind in ("rect", "polygon", "polyline", "circle", "ellipse"):
        name = _class_name(region, attribute)
    if kind == "rect":
        x, y, width, height = (shape.number(key) for key in ("x", "y", "width", "height"))
        shapes.add_box(name, x, y, x + width, y + height)
    elif kind in ("circle", "ellipse"):
        x, y = shape.number("cx"), shape.number("cy")
        rx, ry = (shape.number(key) for key in (("r", "r") if kind == "circle" else ("rx", "ry")))
        shapes.add_ellipse(name, x, y, rx, ry, shape.number("theta") if shape.values.get("theta") else 0.0)
    elif kind in ("polygon", "polyline") and len(xs := shape.numbers("all_points_x")) > 2:
        ys = shape.numbers("all_points_y")
        if len(xs) != len(ys):
            raise InputError(f"{shape.where}: {len(xs)} values of x and {len(ys)} of y")
        shapes.add_polygons(name, list(zip(xs, ys, strict=True)))
    else:
        problems.add(annotation_cleaning.NO_REGION, [path])
