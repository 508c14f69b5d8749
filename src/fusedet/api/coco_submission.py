"""COCO's test server: results in the json and zip that it takes, every field checked before anything is written.

Source: cocodataset.org, "Results Format", "Upload" and "Detection Evaluation".
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError, plural
from fusedet.evaluation.mask_iou import compute_mask_area, validate_masks
from fusedet.evaluation.results import build_detection_table

SETS = ("test-dev2017", "test-challenge2017", "val2017")
"""What the server scores; val2017 to try it."""

IMAGES = {"test-dev2017": 20288, "val2017": 5000}
"""How many images COCO's own splits have."""

CATEGORIES = frozenset(range(1, 91)) - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
"""The ids of COCO's 80 categories."""

MOST = 100
"""Detections of an image, over all classes, that COCO's rules allow."""

DECIMALS = {"bbox": 2, "score": 6}
"""COCO advises a tenth of a pixel; for a box of ten pixels that is one in a hundred, so one digit more is kept."""

Result = dict[str, Any]


def of_server(dataset: DetectionDataset, max_det: int) -> str:
    """The server's name of a split. Raises InputError for a split that it does not score, one with other categories than COCO's, and
    for a detector that gives more detections of an image than COCO's rules allow."""
    name = re.sub(r"^(instances|image_info)_", "", Path(dataset.source).stem)
    if dataset.dataset_format != "coco" or name not in SETS:
        raise InputError(f"{dataset.source} is no split that COCO's server scores: give that of {', '.join(SETS)}")
    if set(dataset.category_ids) != CATEGORIES:
        strange = sorted(CATEGORIES ^ set(dataset.category_ids))
        raise InputError(
            f"{dataset.source} has {len(dataset.names)} categories, but COCO's server wants COCO's 80: the ids differ in {_some(strange)}"
        )
    if max_det > MOST:
        raise InputError(f"test.max_det={max_det}: COCO's rules allow {MOST} detections of an image")
    return name


def incomplete(dataset: DetectionDataset, name: str) -> str | None:
    """What to warn of where a split has another number of images than COCO's of that name."""
    if len(dataset) == (whole := IMAGES.get(name, len(dataset))):
        return None
    own = plural(len(dataset), "image")
    return f"warning: {dataset.source} has {own}, COCO's {name}, which the server scores as a whole, has {whole}"


def checked(dataset: DetectionDataset, results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results as the server wants them, by kind: "bbox" where they have boxes, "segm" where they have masks.

    Raises InputError for the first field that is missing or wrong, for an image or a category that the split lacks, for more than 100
    detections of one image, and for no results at all.
    """
    if not results:
        raise InputError("there is not one detection, and COCO's server takes no empty list: lower test.score")
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


def write(kinds: dict[str, list[Result]], split: str, name: str, folder: Path) -> dict[str, Path]:
    """Write what `checked` gave as folder/KIND/detections_SPLIT_NAME_results.json and .zip; gives the zips by what they are.

    name: the algorithm's; all but letters, digits and "-" becomes "-", as underlines divide the parts of a file's name.
    """
    stem = f"detections_{split}_{re.sub('[^A-Za-z0-9-]+', '-', name).strip('-') or 'fusedet'}_results"
    files = {}
    for kind, rows in kinds.items():
        file = folder / kind / f"{stem}.json"
        file.parent.mkdir()
        file.write_text(json.dumps(rows, separators=(",", ":")))
        # the server takes one file at the top of the archive, and no folders
        with zipfile.ZipFile(file.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
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


def _some(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
