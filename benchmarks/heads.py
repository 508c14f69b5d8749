"""Training step and prediction of every one-stage detector beside RetinaNet's, CPU, float32, interleaved in one run.

A step computes the losses of one image with 20 boxes, their gradients, and one SGD step. Times are seconds of the
processor, so that other work on the machine matters little. Memory is the peak of a separate process that makes two
steps.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from common import measure_peak_memory, print_report, summarize_times
from train_step import step

from fusedet import create_model
from fusedet.api.timing import interleave, read_peak_memory, time_call
from fusedet.models.detectors import prepare_for_inference
from fusedet.types import Batch, Target

REFERENCE = "retinanet"
CONFIGS = (
    REFERENCE,
    "fcos",
    "vfnet",
    "reppoints",
    "atss",
    "gfl",
    "gflv2",
    "paa",
    "tood",
    "ddod",
    "freeanchor",
    "foveabox",
    "fsaf",
    "autoassign",
    "yolof",
    "ota",
    "dw",
    "borderdet",
)


def make_batch(size: tuple[int, int]) -> Batch:
    """Draw one image of this height and width with 20 boxes; the same numbers in every call."""
    torch.manual_seed(0)
    image = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
    corner = torch.rand(20, 2) * (torch.tensor(size[::-1]) * 0.75)
    boxes = torch.cat([corner, corner + 16 + torch.rand(20, 2) * 0.2 * torch.tensor(size[::-1])], dim=1)
    target = Target(boxes, torch.randint(0, 80, (20,)))
    return Batch(image, torch.tensor([size]), (0,), torch.ones(1, 2), (target,))


def training(config: str, batch: Batch) -> Callable[[], None]:
    """Return a call that makes a training step."""
    model = create_model(config, "model.backbone.pretrained=false").train()
    return step(lambda: model.loss(batch), [p for p in model.parameters() if p.requires_grad])


def prediction(config: str, batch: Batch) -> Callable[[], object]:
    """Return a call that predicts; no score is below the threshold, so that NMS has as many boxes in all detectors."""
    model = prepare_for_inference(create_model(config, "model.backbone.pretrained=false", "test.score=0"))
    return lambda: model.predict(batch)


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the processor seconds of each call, the calls in turn."""
    spans = interleave({name: partial(time_call, call) for name, call in calls.items()}, repeats)
    return {name: [span.processor for _, span in results] for name, results in spans.items()}


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--backbone", default="r50")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1216), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--only", choices=CONFIGS)
    options = parser.parse_args()
    batch = make_batch(tuple(options.size))
    if options.only:
        run = training(f"{options.only}_{options.backbone}", batch)
        run(), run()
        print(read_peak_memory())
        return
    sides = {
        kind: {name: make(f"{name}_{options.backbone}", batch) for name in CONFIGS}
        for kind, make in (("train_step", training), ("prediction", prediction))
    }
    times = {kind: measure(calls, options.repeats) for kind, calls in sides.items()}
    rows = {kind: summarize_times(measured, REFERENCE) for kind, measured in times.items()}
    given = ("--backbone", options.backbone, "--size", *map(str, options.size))
    memory = {name: round(measure_peak_memory(__file__, name, *given)) for name in CONFIGS}
    print_report(benchmark="heads", backbone=options.backbone, image=options.size, peak_MiB=memory, **rows)


if __name__ == "__main__":
    main()
