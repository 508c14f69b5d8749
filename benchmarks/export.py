"""The export of every detector, with fixed and dynamic sizes, compared with PyTorch: a table for docs/export.md.

    python benchmarks/export.py [--size 64,96] [--results FILE] [NAME ...]

A name is a config, such as retinanet_tiny or faster_rcnn_r50, or a row of the table; by default a config of every
detector with a small backbone, the modules together and deformable stages. Weights are random. A row says for torch,
ONNX and OpenVINO whether all detections of eight inputs have a partner in PyTorch's (docs/export.md), the largest
difference of a box in pixels, how many detections rounding decides, the processor seconds of writing, and the size in
MB. The seconds of each format include those of torch.export, and those of OpenVINO the conversion of the ONNX file, not
its making.

With --results, finished rows are kept in a file, from which a stopped measurement continues.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import fusedet
from fusedet import config
from fusedet.errors import InputError
from fusedet.exporters import FORMATS

SMALL = ("model.backbone.name=test_resnet", "model.pyramid.channels=32")
"""Fewer operators: the detectors are compared, not their backbones."""
LEVELS = ("model.pyramid.finest=5", "model.pyramid.coarsest=6")
"""Two levels, the backbone's last and one above, unless a detector has one."""
MODULES = ("model.pyramid.finest=4", "model.pyramid.coarsest=6")
"""Three levels for necks, which combine them."""
OWN = {"foveabox_tiny": ("model.head.ranges=[[1,256],[64,512]]",)}
"""Options that have a value per level."""
TOGETHER = ("model.plugin=msfm", "model.neck=[mse_fpn,smsl]", "model.interact=msil", "model.backbone.name=resnet18")
DEFORMABLE = (
    "model.backbone.name=resnet18",
    "model.backbone.deformable_stages=[2,3,4]",
    "model.backbone.modulated=true",
)


def list_rows() -> dict[str, tuple[str, ...]]:
    """Return the overrides of each row: every *_tiny config, and an *_r18 config of all other detectors."""
    tiny = [name for name in config.names() if name.endswith("_tiny")]
    covered = {name.removesuffix("_tiny") for name in tiny}
    others = [name for name in config.names() if name.endswith("_r18") and name.removesuffix("_r18") not in covered]
    rows = {name: (name, *SMALL) for name in tiny}
    rows |= {
        "retinanet_tiny, all four modules": ("retinanet_tiny", *TOGETHER),
        "faster_rcnn_tiny, MSE-FPN and SMSL": ("faster_rcnn_tiny", "model.neck=[mse_fpn,smsl]"),
        "retinanet_tiny, AugFPN": ("retinanet_tiny", "model.neck=aug_fpn"),
        "retinanet_tiny, BiFPN": ("retinanet_tiny", "model.neck=bifpn"),
        "retinanet_tiny, deformable stages": ("retinanet_tiny", *DEFORMABLE),
    }
    rows |= {name: (name, *SMALL) for name in [*others, "faster_rcnn_r18_c4"]}
    for name, overrides in rows.items():
        model = config.load(overrides[0]).model
        necks = "," in name or name == "libra_rcnn_tiny"
        levels = MODULES if necks else LEVELS if model.pyramid.finest < model.pyramid.coarsest else ()
        convs = () if model.roi or name not in others else ("model.head.convs=2",)
        rows[name] = (*overrides, *levels, *convs, *OWN.get(name, ()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--size", default="64,96", help="short and long side of data.size, and the fixed input")
    parser.add_argument("--results", type=Path, help="a file of finished rows, which are not measured again")
    options = parser.parse_args()
    rows = list_rows()
    if options.names:
        rows = {name: rows.get(name, (name,)) for name in options.names}
    finished: dict[str, list[list[str]]] = {}
    if options.results and options.results.is_file():
        finished = {
            key: cells for line in options.results.read_text().splitlines() for key, cells in [json.loads(line)]
        }
    print("| model | sizes | equal | largest box difference | undecided | seconds | MB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name, (model, *overrides) in rows.items():
        for sizes in ("fixed", "dynamic"):
            key = f"{name}, {sizes}, {options.size}"
            if key not in finished:
                size = [int(side) for side in options.size.split(",")] if sizes == "fixed" else None
                finished[key] = measure(model, [f"data.size=[{options.size}]", *overrides], size)
                if options.results:
                    with options.results.open("a") as file:
                        file.write(json.dumps([key, finished[key]]) + "\n")
            print("|", " | ".join([name, sizes, *join_formats(finished[key])]), "|", flush=True)


def measure(model: str, overrides: list[str], size: list[int] | None) -> list[list[str]]:
    """Export a model to every format; a row per format."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            arguments = ["test.score=0.005", *overrides, f"out={out}"]
            report = fusedet.export(model, *arguments, formats=list(FORMATS), size=size).report
        except InputError as error:
            return [["all", "no", str(error), "", "", ""]]
        return [[name, "yes", *describe(row)] for name, row in report["formats"].items()]


def join_formats(rows: list[list[str]]) -> list[str]:
    """Return the cells of a row: those of all formats side by side, or the error."""
    if rows[0][1] == "no":
        return [f"no: {rows[0][2]}", "", "", "", ""]
    return ["yes", *(" / ".join(cells) for cells in list(zip(*rows, strict=True))[2:])]


def describe(row: dict[str, Any]) -> list[str]:
    cases, seconds = row["cases"], row["processor_seconds"]
    counts = f"{sum(case['undecided'] for case in cases)} of {sum(case['detections'] for case in cases)}"
    return [f"{max(case['box'] for case in cases):.4f}", counts, f"{seconds:.1f}", f"{row['megabytes']:.1f}"]


if __name__ == "__main__":
    main()
