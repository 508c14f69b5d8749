"""What each module costs: the same detector with and without it, one 800x1216 picture, CPU, fp32, interleaved in one run.

Time is that of a whole prediction, from the uint8 picture to the final boxes, as `fusedet.load` prepares it; memory the peak of a
process of its own; parameters are trainable ones, 80 classes; multiply-adds those of convolutions and matrix products of the forward.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import interleave, own_peak, peak_memory, report

from fusedet import create_model
from fusedet.detectors import OneStage, for_inference
from fusedet.measure import cost
from fusedet.types import Batch

HEIGHT, WIDTH = 800, 1216
PAFPN = "{type: pafpn, form: smsl}"

# name: (config, overrides, what it is compared with, milliseconds of both that the paper prints, on a Tesla P100)
SIDES: dict[str, tuple[str, list[str], str | None, tuple[float, float] | None]] = {
    "retinanet": ("retinanet_r50", [], None, None),
    "retinanet + smsl": ("retinanet_r50", ["model.neck=[fpn,smsl]"], "retinanet", (96.8, 99.0)),
    "retinanet, panet*": ("retinanet_r50", [f"model.neck={PAFPN}"], None, None),
    "retinanet, panet* + smsl": ("retinanet_r50", [f"model.neck=[{PAFPN},smsl]"], "retinanet, panet*", (100.6, 101.6)),
    "retinanet + msfm": ("retinanet_r50", ["model.plugin=msfm"], "retinanet", None),
    "retinanet, mse_fpn": ("retinanet_r50", ["model.neck=mse_fpn"], "retinanet", None),
    "fcos": ("fcos_r50", [], None, None),
    "fcos + msil": ("fcos_r50", ["model.interact=msil"], "fcos", None),
}


def make(name: str) -> OneStage:
    """The detector of a side, with random weights."""
    config, overrides, _, _ = SIDES[name]
    return create_model(config, "model.backbone.pretrained=false", *overrides).eval()


def predictor(name: str) -> Callable[[], Any]:
    """A call that predicts the same picture again and again."""
    torch.manual_seed(0)
    picture = torch.randint(0, 256, (1, 3, HEIGHT, WIDTH), dtype=torch.uint8)
    batch = Batch(picture, torch.tensor([[HEIGHT, WIDTH]]), (0,), torch.ones(1, 2))
    return functools.partial(for_inference(make(name)).predict, batch)


def figures(name: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """A side's own figures and, beside the detector without the module, what the module adds."""
    total = cost(make(name), HEIGHT, WIDTH)
    found = {
        "median_ms": round(1000 * statistics.median(seconds[name]), 1),
        "peak_MiB": round(peak_memory(__file__, name)),
        "trainable": total["trainable"],
        "multiply_adds_G": round(total["multiply_adds"] / 1e9, 2),
    }
    _, _, base, printed = SIDES[name]
    if base:
        plain = cost(make(base), HEIGHT, WIDTH)
        # each turn has both sides under the same load: the median of their ratios moves less than the ratio of medians
        ratios = [a / b for a, b in zip(seconds[name], seconds[base])]
        found["added"] = {
            "to": base,
            "time_percent": round(100 * (statistics.median(seconds[name]) / statistics.median(seconds[base]) - 1), 2),
            "time_percent_by_turn": round(100 * (statistics.median(ratios) - 1), 2),
            "trainable": total["trainable"] - plain["trainable"],
            "multiply_adds_G": round((total["multiply_adds"] - plain["multiply_adds"]) / 1e9, 2),
        }
        if printed:
            found["paper"] = {"gpu": "Tesla P100", "ms": printed, "time_percent": round(100 * (printed[1] / printed[0] - 1), 2)}
    return found


def main() -> None:
    """Measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES), help="some of the sides only")
    parser.add_argument("--only", choices=list(SIDES))
    options = parser.parse_args()
    if options.only:
        call = predictor(options.only)
        call(), call()
        print(own_peak())
        return
    missing = {base for name in options.sides if (base := SIDES[name][2])} - set(options.sides)
    names = [*missing, *options.sides]
    seconds = interleave({name: predictor(name) for name in names}, options.repeats)
    report(benchmark="modules", picture=[HEIGHT, WIDTH], sides={name: figures(name, seconds) for name in names})


if __name__ == "__main__":
    main()
