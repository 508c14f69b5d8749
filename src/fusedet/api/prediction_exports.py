"""What a prediction writes beside COCO's json: a CSV file, YOLO labels and crops of the detections."""

import codecs
import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fusedet.api.prediction import Prediction
from fusedet.atomic_io import open_atomically, write_atomically
from fusedet.data.large_images import LargeImage, crop_image
from fusedet.errors import StorageError, split_names

FORMATS = ("coco", "csv", "yolo")
_JPEG_SIDE = 65_500  # the limit of libjpeg, in pixels
COLUMNS = ("file", "width", "height", "class", "category_id", "score", "x1", "y1", "x2", "y2")


def parse_formats(names: Iterable[str]) -> tuple[str, ...]:
    """Return formats, given by name or as names joined by commas, each once; COCO's json is always among them.

    Raises:
        InputError: A format is unknown.
    """
    return tuple(split_names("format", ["coco", *names], FORMATS, of="--save"))


@dataclass(frozen=True)
class Exports:
    """What a prediction writes beside COCO's json.

    Attributes:
        score: The least score of what is drawn, cropped, labeled and counted as shown.
        drawn: Whether copies of the images with boxes are written.
        save: The `FORMATS` that are written.
        crops: Whether the parts of the images in the boxes are written.
    """

    score: float
    drawn: bool
    save: tuple[str, ...]
    crops: bool

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON holds them."""
        return vars(self) | {"save": list(self.save)}

    def create_folders(self, target: Path) -> None:
        """Create the folders of the files per image."""
        for folder in self.list_folders():
            (target / folder).mkdir(exist_ok=True)

    def write_image_files(self, prediction: Prediction, name: str, target: Path) -> None:
        """Write the files of one image.

        Raises:
            InputError: The image is a `LargeImage` and cannot be read.
            StorageError: A file cannot be written.
        """
        if self.drawn:
            _save_jpeg(prediction.plot(score=self.score), target / "images" / f"{name}.jpg")
        if "yolo" in self.save:
            write_yolo_labels(prediction, target / "labels" / f"{name}.txt", self.score)
        if self.crops:
            write_crops(prediction, target / "crops", name, self.score)

    def write_summary_files(
        self, target: Path, records: Iterable[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]
    ) -> dict[str, str]:
        """Write the files that concern all images; return all files and folders by what they show."""
        written = {folder: str(target / folder) for folder in self.list_folders()}
        if "csv" in self.save:
            write_csv(target / "predictions.csv", records, categories)
            written = {"table": str(target / "predictions.csv")} | written
        if "yolo" in self.save:
            write_class_names(target / "classes.txt", categories)
        return written

    def list_folders(self) -> list[str]:
        """List the names of these folders."""
        folders = {"images": self.drawn, "labels": "yolo" in self.save, "crops": self.crops}
        return [folder for folder, is_written in folders.items() if is_written]


def write_class_names(file: Path, categories: Sequence[Mapping[str, Any]]) -> None:
    """Write the name of a class per line."""
    write_atomically(file, "".join(f"{category['name']}\n" for category in categories).encode())


def write_yolo_labels(prediction: Prediction, file: Path, score: float) -> None:
    """Write the boxes of at least `score` as `class cx cy w h`, shares of the image, with class numbers from 0."""
    assert prediction.image is not None
    height, width = prediction.image.shape[1:]
    lines = []
    for (x1, y1, x2, y2), value, label in zip(
        prediction.boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist(), strict=True
    ):
        if value >= score:
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(f"{label} {' '.join(f'{v:.6f}' for v in box)}\n")
    write_atomically(file, "".join(lines).encode())


def write_crops(prediction: Prediction, folder: Path, name: str, score: float) -> None:
    """Write the part of the image in each box to FOLDER/CLASS/NAME-NUMBER.jpg.

    The number is that of the detection, from 1.

    Args:
        prediction: With its image.
        folder: Where the directories of the classes are made.
        name: Beginning of the file names.
        score: Least score of a box that is written, in 0..1.
    """
    assert prediction.image is not None
    image = prediction.image
    height, width = image.shape[1:]
    rows = zip(prediction.boxes.tolist(), prediction.scores.tolist(), prediction.labels.tolist(), strict=True)
    for number, ((x1, y1, x2, y2), value, label) in enumerate(rows, 1):
        if value < score:
            continue
        left, top = max(0, int(x1)), max(0, int(y1))
        right, bottom = min(width, -int(-x2 // 1)), min(height, -int(-y2 // 1))
        if right > left and bottom > top:
            # a class name may hold characters that no folder's name can
            own = folder / (re.sub(r"[^\w .()+-]", "_", prediction.names[label]).strip(" .") or f"class {label}")
            own.mkdir(parents=True, exist_ok=True)
            part = crop_image(image, (left, top, right, bottom))
            pixels = part.read() if isinstance(part, LargeImage) else part
            crop = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
            _save_jpeg(crop, own / f"{name}-{number}.jpg", quality=95)


def _save_jpeg(image: Image.Image, file: Path, **options: Any) -> None:
    """Write an image as JPEG, reduced if it has more pixels per side than the format allows."""
    image.thumbnail((_JPEG_SIDE, _JPEG_SIDE))
    try:
        image.save(file, **options)
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error


def write_csv(
    file: Path,
    records: Iterable[Mapping[str, Any]],
    categories: Sequence[Mapping[str, Any]],
    keys: Sequence[str] = (),
    own_keys: Sequence[str] = (),
) -> None:
    """Write a row per detection, with corners in pixels.

    Args:
        file: The file, which is written as a whole or not at all.
        records: Per image `file_name`, `width`, `height` and `annotations` in COCO's form.
        categories: `id` and `name` of each class.
        keys: Further keys of a record that have a column.
        own_keys: Further keys of a detection that have a column, empty where it lacks them.

    Raises:
        StorageError: The file cannot be written.
    """
    names = {category["id"]: category["name"] for category in categories}
    with open_atomically(file) as opened:
        writer = csv.writer(codecs.getwriter("utf-8")(opened, "surrogateescape"))
        writer.writerow((*COLUMNS, *keys, *own_keys))
        for record in records:
            for annotation in record.get("annotations", ()):
                x, y, w, h = annotation["bbox"]
                category = annotation["category_id"]
                image = (record["file_name"], record["width"], record["height"])
                further = (*(record[key] for key in keys), *(annotation.get(key, "") for key in own_keys))
                corners = (x, y, x + w, y + h)
                writer.writerow((*image, names[category], category, annotation["score"], *corners, *further))
