"""Write the table of MMDetection's published weights that can be converted, which is part of the wheel.

    python tests/zoo/write_table.py ../shared/zoo/zoo.jsonl.gz

writes `src/fusedet/interop/mmdetection/published.jsonl.gz` from the same list that `run.py` converts: one JSON per
line with name, family, address, box and mask AP as MMDetection publishes them, dataset, backbone, megabytes of the
weights, parameters, multiply-adds of an image of `SIZE`, MMDetection's config of the model and the resizing of its test
pipeline.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from run import run

from fusedet.config import Config
from fusedet.errors import InputError
from fusedet.models.detectors import build_meta_detector
from fusedet.models.profiling import count_cost

SIZE = (800, 1280)
"""Height and width for which MMDetection counts multiply-adds."""
TABLE = Path(__file__).resolve().parents[2] / "src/fusedet/interop/mmdetection/published.jsonl.gz"
DATASETS = r"(coco|lvis-v[\d.]+|objects365v\d|openimages(_challenge)?)$"


def make_row(model: dict[str, Any], options: Config, classes: int) -> dict[str, Any]:
    """Make the table's row of a converted model."""
    cost = count_cost(build_meta_detector(options, classes), *SIZE)
    dataset = re.search(DATASETS, model["name"])
    return {
        "name": model["name"],
        "family": model["family"],
        "address": model["weights"],
        "box_ap": model["box"],
        "mask_ap": model["mask"],
        "dataset": dataset[0] if dataset else "coco",
        "backbone": options.model.backbone["name"].partition(".")[0],
        "megabytes": round(sum(4 * math.prod(shape) for shape in model["keys"].values()) / 1e6, 1),
        "parameters": cost["parameters"],
        "multiply_adds": cost["multiply_adds"],
        "model": model["model"],
        "resize": model["resize"],
    }


def make_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the row of every model that converts; of two with one name the first."""
    seen = set()
    for model, made in run(file):
        if model["name"] not in seen and not isinstance(made, InputError):
            seen.add(model["name"])
            yield make_row(model, *made)


def write(rows: Iterator[dict[str, Any]], file: Path) -> int:
    """Write the table, the same bytes for the same rows, and return the number of rows."""
    lines = [json.dumps(row, separators=(",", ":")) + "\n" for row in rows]
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed:
        packed.write("".join(lines).encode())
    file.write_bytes(buffer.getvalue())
    return len(lines)


if __name__ == "__main__":
    print(f"{write(make_rows(Path(sys.argv[1])), TABLE)} models in {TABLE}")
