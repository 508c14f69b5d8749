"""Submission to COCO's test server: results in the json and zip that it takes, validated before they are written.

Source: cocodataset.org, "Results Format", "Upload" and "Detection Evaluation".
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedet.atomic_io import open_atomically, write_atomically
from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError, format_count, shorten_list
from fusedet.evaluation.mask_iou import compute_mask_area, validate_masks
from fusedet.evaluation.results import Result, build_detection_table

SETS = ("test-dev2017", "test-challenge2017", "val2017")
"""Splits that the server evaluates; val2017 is for trying it."""

IMAGES = {"test-dev2017": 20288, "val2017": 5000}
"""Numbers of images of COCO's splits."""

CATEGORIES = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""The ids of COCO's 80 categories."""

MOST = 100
"""Detections of an image, over all classes, that COCO's rules allow."""

DECIMALS = {"bbox": 2, "score": 6}
"""COCO recommends a tenth of a pixel; for a box of ten pixels that is 1 %, so one more digit is kept."""


def server_split(dataset: DetectionDataset, max_det: int) -> str:
    """Return the server's name of a split.

    Args:
        dataset: The split.
        max_det: Detections per image of the detector.

    Raises:
        InputError: The server does not evaluate the split, its categories are not COCO's, or `max_det` is above `MOST`.
    """
    name = re.sub(r"^(instances|image_info)_", "", Path(dataset.source).stem)
    if dataset.dataset_format != "coco" or name not in SETS:
        raise InputError(f"{dataset.source} is no split that COCO's server scores: give that of {', '.join(SETS)}")
    if set(dataset.category_ids) != CATEGORIES:
        different = sorted(CATEGORIES ^ set(dataset.category_ids))
        raise InputError(
            f"{dataset.source} has {len(dataset.names)} categories, but COCO's server wants COCO's 80: the ids differ "
            f"in {shorten_list(different)}"
        )
    if max_det > MOST:
        raise InputError(f"test.max_det={max_det}: COCO's rules allow {MOST} detections of an image")
    return name


def warn_if_incomplete(dataset: DetectionDataset, name: str) -> str | None:
    """Return a warning if a split has another number of images than COCO's split of that name."""
    if len(dataset) == (whole := IMAGES.get(name, len(dataset))):
        return None
    own = format_count(len(dataset), "image")
    return f"warning: {dataset.source} has {own}, but COCO's {name}, which the server evaluates as a whole, has {whole}"


def format_results(dataset: DetectionDataset, results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the results as the server takes them, by kind: "bbox" if they have boxes, "segm" if they have masks.

    Raises:
        InputError: There are no results, a field is missing or wrong, an image or a category is not in the split, or an
            image has more than `MOST` detections.
    """
    if not results:
        raise InputError("there are no detections, and COCO's server takes no empty list: lower test.score")
    boxed, masked = (any(isinstance(r, dict) and key in r for r in results) for key in ("bbox", "segmentation"))
    build_detection_table(dataset, results, boxes=boxed or not masked)
    image, most = Counter(result["image_id"] for result in results).most_common(1)[0]
    if most > MOST:
        raise InputError(
            f"image {image} has {most} detections, COCO's rules allow {MOST}: set test.max_det={MOST} or less"
        )
    kinds = {}
    if boxed:
        kinds["bbox"] = [_row(r) | {"bbox": [round(float(x), DECIMALS["bbox"]) for x in r["bbox"]]} for r in results]
    if masked:
        validate_masks(dataset, results)
        kinds["segm"] = [_row(r) | {"segmentation": _mask(r["segmentation"], i)} for i, r in enumerate(results)]
    return kinds


def write_submission(kinds: dict[str, list[Result]], split: str, name: str, folder: Path) -> dict[str, Path]:
    """Write results as folder/KIND/detections_SPLIT_NAME_results.json and .zip; return the zips by what they are.

    Args:
        kinds: What `format_results` returns.
        split: The server's name of the split.
        name: Name of the algorithm. All but letters, digits and "-" becomes "-", because underscores separate the parts
            of the file name.
        folder: The output directory.

    Raises:
        StorageError: A file cannot be written.
    """
    stem = f"detections_{split}_{re.sub('[^A-Za-z0-9-]+', '-', name).strip('-') or 'fusedet'}_results"
    files = {}
    for kind, rows in kinds.items():
        file = folder / kind / f"{stem}.json"
        file.parent.mkdir()
        write_atomically(file, json.dumps(rows, separators=(",", ":")).encode())
        # the server takes one file at the top of the archive, and no folders
        with (
            open_atomically(file.with_suffix(".zip")) as opened,
            zipfile.ZipFile(opened, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            archive.write(file, file.name)
        files[f"submission ({kind})"] = file.with_suffix(".zip")
    return files


def _row(result: Result) -> Result:
    ids = {key: int(result[key]) for key in ("image_id", "category_id")}
    return ids | {"score": round(float(result["score"]), DECIMALS["score"])}


def _mask(code: dict[str, Any], i: int) -> dict[str, Any]:
    if not isinstance(code["counts"], str):
        raise InputError(f"results: 'counts' of the mask of result {i} must be a text, compressed run-length code")
    try:
        compute_mask_area(code)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"results: the mask of result {i} is no run-length code ({error})") from error
    return {"size": [int(side) for side in code["size"]], "counts": code["counts"]}
