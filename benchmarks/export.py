"""The export of every detector, with fixed and dynamic sizes, compared with PyTorch: a table for docs/export.md.

    python benchmarks/export.py [--size 64,96] [NAME ...]

A name is a config, such as retinanet_tiny or faster_rcnn_r50; by default every *_tiny config with a small backbone, the
modules together and deformable stages. Weights are random. A row says for each format whether all detections of eight
inputs have a partner in PyTorch's (docs/export.md), the largest difference of a box in pixels, the seconds of writing,
and the size in MB.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import fusedet
from fusedet import config
from fusedet.errors import InputError
from fusedet.exporters import FORMATS

SMALL = ("model.backbone.name=test_resnet", "model.pyramid.channels=32")
"""Fewer operators: the detectors are compared, not their backbones."""
TOGETHER = ("model.plugin=msfm", "model.neck=[mse_fpn,smsl]", "model.interact=msil", "model.backbone.name=resnet18")
DEFORMABLE = (
    "model.backbone.name=resnet18",
    "model.backbone.deformable_stages=[2,3,4]",
    "model.backbone.modulated=true",
)
ROWS: dict[str, tuple[str, ...]] = {
    **{name: (name, *SMALL) for name in config.names() if name.endswith("_tiny")},
    "retinanet_tiny, all four modules": ("retinanet_tiny", *TOGETHER),
    "faster_rcnn_tiny, MSE-FPN and SMSL": ("faster_rcnn_tiny", "model.neck=[mse_fpn,smsl]"),
    "retinanet_tiny, AugFPN": ("retinanet_tiny", "model.neck=aug_fpn"),
    "retinanet_tiny, BiFPN": ("retinanet_tiny", "model.neck=bifpn"),
    "retinanet_tiny, deformable stages": ("retinanet_tiny", *DEFORMABLE),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--size", default="64,96", help="short and long side of data.size, and the fixed input")
    options = parser.parse_args()
    size = [int(side) for side in options.size.split(",")]
    rows = {name: ROWS.get(name, (name,)) for name in options.names} or ROWS
    print("| model | sizes | format | equal | largest box difference | undecided | seconds | MB |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name, (model, *overrides) in rows.items():
        for sizes in ("fixed", "dynamic"):
            for cells in measure(
                model, [f"data.size=[{options.size}]", *overrides], size if sizes == "fixed" else None
            ):
                print("|", " | ".join([name, sizes, *cells]), "|", flush=True)


def measure(model: str, overrides: list[str], size: list[int] | None) -> list[list[str]]:
    """Export a model to every format; a row per format."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            words = ["test.score=0.005", *overrides, f"out={out}"]
            report = fusedet.export(model, *words, formats=list(FORMATS), size=size).report
        except InputError as error:
            return [["all", "no", str(error), "", "", ""]]
        return [[name, "yes", *describe(row)] for name, row in report["formats"].items()]


def describe(row: dict[str, Any]) -> list[str]:
    cases = row["cases"]
    counts = f"{sum(case['undecided'] for case in cases)} of {sum(case['detections'] for case in cases)}"
    return [f"{max(case['box'] for case in cases):.4f}", counts, f"{row['seconds']:.1f}", f"{row['megabytes']:.1f}"]


if __name__ == "__main__":
    main()
