"""Cost of each module: the same detector with and without it, one image, CPU, fp32, interleaved in one run.

Time is that of a whole prediction from the uint8 image to the final boxes, as `fusedet.load` prepares it. Memory is
the peak of a separate process. Parameters are trainable ones for 80 classes, multiply-adds those of convolutions and
matrix products. The papers' values are shown too: only SMSL's paper publishes times, on a Tesla P100.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import interleave, measure_peak_memory, print_report

from fusedet import create_model
from fusedet.api.timing import read_peak_memory
from fusedet.models.detectors import DetectorModule, prepare_for_inference
from fusedet.models.profiling import count_cost
from fusedet.types import Batch

FULL, SQUARE = (800, 1216), (640, 640)
PAFPN = "{type: pafpn, form: smsl}"


@dataclass(frozen=True)
class Side:
    """A detector; base: name of the detector without the module; paper: published milliseconds without and with it."""

    config: str
    overrides: list[str] = field(default_factory=list)
    base: str | None = None
    paper: tuple[float, float] | None = None
    size: tuple[int, int] = FULL


SIDES = {
    "RetinaNet": Side("retinanet_r50"),
    "RetinaNet + SMSL": Side("retinanet_r50", ["model.neck=[fpn,smsl]"], "RetinaNet", (96.8, 99.0)),
    "RetinaNet PANet*": Side("retinanet_r50", [f"model.neck={PAFPN}"]),
    "RetinaNet PANet* + SMSL": Side(
        "retinanet_r50", [f"model.neck=[{PAFPN},smsl]"], "RetinaNet PANet*", (100.6, 101.6)
    ),
    "RetinaNet + MSFM": Side("retinanet_r50", ["model.plugin=msfm"], "RetinaNet"),
    "RetinaNet, MSE-FPN": Side("retinanet_r50", ["model.neck=mse_fpn"], "RetinaNet"),
    "FCOS": Side("fcos_r50"),
    "FCOS + MSIL": Side("fcos_r50", ["model.interact=msil"], "FCOS"),
    "Mask R-CNN": Side("mask_rcnn_r50", size=SQUARE),
    "Mask R-CNN + SMSL": Side("mask_rcnn_r50", ["model.neck=[fpn,smsl]"], "Mask R-CNN", (92.6, 97.2), SQUARE),
    "Cascade R-CNN": Side("cascade_rcnn_r50", size=SQUARE),
    "Cascade R-CNN + SMSL": Side("cascade_rcnn_r50", ["model.neck=[fpn,smsl]"], "Cascade R-CNN", (84.0, 88.0), SQUARE),
}


def make(name: str) -> DetectorModule:
    """Build the detector of a side, with random weights."""
    return create_model(SIDES[name].config, "model.backbone.pretrained=false", *SIDES[name].overrides).eval()


def predictor(name: str) -> Callable[[], Any]:
    """Return a call that predicts the same image every time."""
    torch.manual_seed(0)
    height, width = SIDES[name].size
    image = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8)
    batch = Batch(image, torch.tensor([[height, width]]), (0,), torch.ones(1, 2))
    return functools.partial(prepare_for_inference(make(name)).predict, batch)


def summarize_module(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Return a side's measurements and the difference to the detector without the module."""
    side = SIDES[name]
    total = count_cost(make(name), *side.size)
    results = {
        "image": side.size,
        "median_ms": round(1000 * statistics.median(seconds[name]), 1),
        "peak_MiB": round(measure_peak_memory(__file__, name)),
        "trainable": total["trainable"],
        "multiply_adds_G": round(total["multiply_adds"] / 1e9, 2),
    }
    if side.base:
        plain = count_cost(make(side.base), *side.size)
        # in each turn both sides have about the same load
        turns = [a / b for a, b in zip(seconds[name], seconds[side.base])]
        results["added"] = {
            "to": side.base,
            "time_percent": round(
                100 * (statistics.median(seconds[name]) / statistics.median(seconds[side.base]) - 1), 2
            ),
            "time_percent_median_of_turns": round(100 * (statistics.median(turns) - 1), 2),
            "trainable": total["trainable"] - plain["trainable"],
            "multiply_adds_G": round((total["multiply_adds"] - plain["multiply_adds"]) / 1e9, 2),
        }
        if side.paper:
            results["paper"] = {
                "gpu": "Tesla P100",
                "ms": side.paper,
                "time_percent": round(100 * (side.paper[1] / side.paper[0] - 1), 2),
            }
    return results


def table(sides: dict[str, dict[str, Any]]) -> str:
    """Format the sides that add a module as Markdown."""
    lines = [
        "| | time | added | peak memory with, without | trainable, added | multiply-adds, added "
        "| in the paper, one P100 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, results in sides.items():
        if "added" in results:
            added, plain = results["added"], sides[results["added"]["to"]]
            printed = results.get("paper")
            paper = f"{printed['ms'][0]} to {printed['ms'][1]} ms, {printed['time_percent']:+} %" if printed else ""
            lines.append(
                f"| {name} | {plain['median_ms']:.0f} to {results['median_ms']:.0f} ms | {added['time_percent']:+} % | "
                f"{results['peak_MiB']}, {plain['peak_MiB']} MiB | {results['trainable']:,}, {added['trainable']:+,} | "
                f"{results['multiply_adds_G']} G, {added['multiply_adds_G']:+} G | {paper} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Measure and print JSON or the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--sides", nargs="*", default=list(SIDES), choices=list(SIDES), help="some of the sides, with what they add to"
    )
    parser.add_argument("--table", action="store_true", help="Markdown instead of JSON")
    parser.add_argument("--only", choices=list(SIDES), help="the peak memory of one side")
    options = parser.parse_args()
    if options.only:
        call = predictor(options.only)
        call(), call()
        print(read_peak_memory())
        return
    bases = [SIDES[name].base for name in options.sides]
    names = [name for name in SIDES if name in options.sides or name in bases]
    # by detector, so that a few are in memory at a time
    seconds: dict[str, list[float]] = {}
    for config in dict.fromkeys(SIDES[name].config for name in names):
        seconds |= interleave(
            {name: predictor(name) for name in names if SIDES[name].config == config}, options.repeats
        )
    results = {name: summarize_module(name, seconds) for name in names}
    if options.table:
        print(table(results))
    else:
        print_report(benchmark="modules", sides=results)


if __name__ == "__main__":
    main()
