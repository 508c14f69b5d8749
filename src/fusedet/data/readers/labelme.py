"""Reader of LabelMe datasets: a json per image, with rectangles, polygons and circles."""

import math
from collections import defaultdict

from fusedet.data import annotation_cleaning
from fusedet.data.readers.data_folder import DataFolder
from fusedet.data.readers.json_values import Entry, load_json
from fusedet.data.readers.left_out_files import Problems
from fusedet.data.readers.records import ImageRecord, ImageShapes, RecordSet, image_name_of, read_annotation_files
from fusedet.errors import InputError

_POLYGONS = ("polygon", "rotation", "quadrilateral", None)  # old files have no `shape_type`


def list_labelme_files(folder: DataFolder) -> list[str]:
    """List the json files of LabelMe."""
    return folder.list_json("labelme")


def read_labelme(folder: DataFolder, split: str | None = None) -> RecordSet:
    """Read a folder that LabelMe annotated; shapes with a common label and `group_id` are one object.

    Raises:
        InputError: A file is malformed; the sentence names it.
    """
    return read_annotation_files(folder, "labelme", list_labelme_files(folder), _parse_file, split)


def _parse_file(folder: DataFolder, file: str, problems: Problems) -> ImageRecord | None:
    entry = Entry(load_json(file), file)
    path = folder.find_image(file, *filter(None, [entry.text("imagePath", "")]), image_name_of(file))
    if path is None:
        return None
    shapes, objects = ImageShapes(), defaultdict(list)
    for i, shape in enumerate(entry.entries("shapes")):
        group = shape.values.get("group_id")
        objects[(shape.text("label"), i if group is None else f"group {group}")].append(shape)
    for (name, _), members in objects.items():
        polygons = [polygon for shape in members if (polygon := _to_polygon(shape)) is not None]
        if not polygons:
            problems.add(annotation_cleaning.NO_REGION, [path])
        elif len(members) == 1 and members[0].values.get("shape_type") in ("rectangle", "circle", "mask"):
            shapes.add_box(name, *polygons[0][0], *polygons[0][2])
        else:
            shapes.add_polygons(name, *polygons)
    return shapes.to_record(file, path, entry.integer("imageHeight"), entry.integer("imageWidth"))


def _to_polygon(shape: Entry) -> list[list[float]] | None:
    """Return the points of a shape that has an area; None for a point or a line."""
    kind, points = shape.values.get("shape_type"), shape.points("points")
    if kind in _POLYGONS:
        return points if len(points) > 2 else None
    if kind == "rectangle" and len(points) == 4:  # the corners in turn, as recent versions write them
        points = [points[0], points[2]]
    if kind in ("rectangle", "mask", "circle"):
        if len(points) != 2:
            raise InputError(f"{shape.where}: a {kind} has 2 points, not {len(points)}")
        (x1, y1), (x2, y2) = points
        if kind == "circle":  # its center and a point of its edge
            radius = math.hypot(x2 - x1, y2 - y1)
            x1, y1, x2, y2 = x1 - radius, y1 - radius, x1 + radius, y1 + radius
        return [[x1, y1], [x2, y1], [x2, y2], [x1, y2]]
    return None
