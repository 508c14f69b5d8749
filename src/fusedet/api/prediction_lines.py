"""The JSON-lines files of a prediction, one per process and a line per image, and what they are joined to."""

import heapq
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from fusedet.api.prediction import Prediction
from fusedet.atomic_io import open_atomically
from fusedet.errors import InputError

Info = dict[str, Any]


def describe_prediction(prediction: Prediction, number: int, score: float) -> Info:
    """Return what a line holds of an image's prediction: its size, COCO results and the number of at least `score`.

    Args:
        prediction: The prediction, with its image.
        number: The image's id.
        score: The least score of detections that are counted as shown.
    """
    boxes, masks = prediction.boxes, prediction.masks
    areas = (boxes[:, 2:] - boxes[:, :2]).double().prod(dim=1) if masks is None else masks.sum(dim=(1, 2))
    assert prediction.image is not None
    height, width = prediction.image.shape[1:]
    return {
        "height": height,
        "width": width,
        "shown": int((prediction.scores >= score).sum()),
        "annotations": [
            {**result, "area": area, "iscrowd": 0} for result, area in zip(prediction.to_coco(number), areas.tolist())
        ],
    }


def join_lines(lines: Sequence[BinaryIO], target: Path, categories: list[Info]) -> None:
    """Write predictions.json from the lines of all files, one line in memory at a time."""
    images = annotations = 0
    skipped: list[Info] = []
    with open_atomically(target / "predictions.json") as file, tempfile.TemporaryFile(dir=target) as rest:
        file.write(b'{"images": [')
        for record in read_lines(lines):
            about: Info = {key: record[key] for key in ("id", "file_name", "height", "width") if key in record}
            if "skipped" in record:
                skipped.append({**about, "reason": record["skipped"]})
                continue
            file.write((", " * bool(images) + json.dumps(about)).encode())
            images += 1
            for annotation in record["annotations"]:
                rest.write((", " * bool(annotations) + json.dumps({"id": annotations + 1, **annotation})).encode())
                annotations += 1
        file.write(f'], "categories": {json.dumps(categories)}, "annotations": ['.encode())
        rest.seek(0)
        shutil.copyfileobj(rest, file)
        file.write(b"]" + (f', "skipped": {json.dumps(skipped)}' if skipped else "").encode() + b"}")


def list_line_files(target: Path) -> list[Path]:
    """List the files of all processes."""
    return sorted(target.glob("predictions-*-of-*.jsonl"))


def open_lines(target: Path, stack: ExitStack) -> list[BinaryIO]:
    """Open the files of all processes, which may be removed meanwhile."""
    return [stack.enter_context(file.open("rb")) for file in list_line_files(target)]


def read_lines(files: Sequence[BinaryIO]) -> Iterator[Info]:
    """Yield the records of all files by rising id, each once."""
    last = 0
    for record in heapq.merge(*map(_read_file, files), key=itemgetter("id")):
        if record["id"] > last:
            yield record
            last = record["id"]


def _read_file(file: BinaryIO) -> Iterator[Info]:
    file.seek(0)
    last = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            return  # torn when its process was killed, or being written
        try:
            record = json.loads(line)
            is_whole = type(record["id"]) is int and record["id"] > last and isinstance(record["file_name"], str)
            if "skipped" not in record:
                sizes = (record["height"], record["width"], record["shown"])
                is_whole &= all(type(size) is int for size in sizes) and isinstance(record["annotations"], list)
        except (ValueError, TypeError, LookupError, RecursionError):
            is_whole = False
        if not is_whole:
            raise InputError(f"{file.name}, line {number} is damaged: remove the file, and continue with --resume")
        last = record["id"]
        yield record
