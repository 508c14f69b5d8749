"""Predictions and training steps on a GPU: fusedet and torchvision in one run, with memory and waits of the host.

Each detector runs in float32, bf16 and compiled bf16, at batch 1 and 16, beside torchvision's eager float32 and bf16.
RetinaNet also runs with each module. Weights are random, and nothing is downloaded. The sides of a case take turns. A
one-epoch training compares bf16 with float32; two seeds show the noise.

    python benchmarks/gpu.py --table gpu.md
    python benchmarks/gpu.py --tiny

Prints JSON. With `--tiny` everything runs on the CPU at small sizes, as a test of the script; its times mean nothing.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import interleave, print_report, summarize_times
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fusedet
from fusedet.data.synthetic import generate_dataset
from fusedet.models.detectors import create_model, prepare_for_inference
from fusedet.types import Batch, Target

CLASSES = 80
DETECTORS = ("retinanet", "fcos", "faster_rcnn", "mask_rcnn")
MODULES = {
    "mse_fpn": "model.neck=mse_fpn",
    "smsl": "model.neck=[fpn,smsl]",
    "msil": "model.interact=msil",
    "msfm": "model.plugin=msfm",
}
REFERENCE = "torchvision bf16"
GOALS = {"predict": 3.0, "step": 2.0}
"""How many times as fast as torchvision's eager bf16 the fastest side of fusedet shall be."""


@dataclass(frozen=True)
class Setup:
    """What is measured and at which size; `budget` is in seconds, and cases after it are left out."""

    device: torch.device
    size: tuple[int, int]
    batches: tuple[int, ...]
    repeats: int
    budget: float
    backbone: str
    compiler: str
    tiny: bool


FULL = Setup(torch.device("cuda"), (800, 1216), (1, 16), 10, 360.0, "r50", "inductor", False)
TINY = Setup(torch.device("cpu"), (64, 96), (2,), 1, float("inf"), "tiny", "aot_eager", True)


def make_batch(setup: Setup, images: int) -> Batch:
    """Return random images with ten instances each, with masks, on the device."""
    height, width = setup.size
    targets = []
    for _ in range(images):
        corners = torch.rand(10, 2) * torch.tensor([width, height]) * 0.7
        boxes = torch.cat([corners, corners + 8 + torch.rand(10, 2) * torch.tensor([width, height]) * 0.2], dim=1)
        masks = torch.zeros(10, height, width, dtype=torch.bool)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.long().tolist()):
            mask[y1:y2, x1:x2] = True
        targets.append(Target(boxes, torch.randint(0, CLASSES, (10,)), masks))
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8)
    sizes = torch.tensor([setup.size] * images)
    return Batch(pixels, sizes, tuple(range(images)), torch.ones(images, 2), tuple(targets)).to(setup.device)


# -- sides


def build_fusedet(setup: Setup, name: str, *overrides: str) -> Any:
    config = f"{name}_{setup.backbone}"
    small = ("model.backbone.name=resnet10t",) if setup.tiny else ()
    detector = create_model(config, "model.backbone.pretrained=false", *small, *overrides, num_classes=CLASSES)
    return detector.to(setup.device)


def build_torchvision(setup: Setup, name: str) -> Any:
    """Return torchvision's detector, with frozen BatchNorm and three trainable stages as in fusedet."""
    options: dict[str, Any] = {"backbone_name": "resnet18" if setup.tiny else "resnet50", "weights": None}
    options["trainable_layers"] = 3
    sizes: dict[str, Any] = {"min_size": setup.size[0], "max_size": setup.size[1]}
    if name in ("retinanet", "fcos"):
        channels = 256 if name == "fcos" else (512 if setup.tiny else 2048)
        backbone = resnet_fpn_backbone(**options, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(channels, 256))
        model: Any = {"retinanet": RetinaNet, "fcos": FCOS}[name](backbone, num_classes=CLASSES, **sizes)
    else:
        kind = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}[name]
        if setup.tiny:
            sizes |= {"rpn_post_nms_top_n_train": 50, "rpn_post_nms_top_n_test": 50, "box_batch_size_per_image": 32}
        model = kind(resnet_fpn_backbone(**options), num_classes=CLASSES + 1, **sizes)
    return model.to(setup.device)


def autocast(setup: Setup, precision: str) -> AbstractContextManager[Any]:
    return torch.autocast(setup.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def compile_forward(setup: Setup, detector: Any) -> Any:
    """Compile the forward pass as `train.compile` does."""
    detector.forward = torch.compile(detector.forward, backend=setup.compiler)
    return detector


def make_prediction(setup: Setup, side: str, name: str, batch: Batch, *overrides: str) -> Callable[[], Any]:
    library, precision = side.split()[:2]
    if library == "torchvision":
        model = build_torchvision(setup, name).eval()
        images = [image.float() / 255 for image in batch.images]

        def run() -> Any:
            with torch.no_grad(), autocast(setup, precision):
                return model(images)

        return run
    detector = build_fusedet(setup, name, *overrides).eval()
    ready = prepare_for_inference(detector, "bf16" if precision == "bf16" else "fp32")
    if "compiled" in side:
        compile_forward(setup, ready)
    return lambda: ready.predict(batch)


def make_step(setup: Setup, side: str, name: str, batch: Batch, *overrides: str) -> Callable[[], Any]:
    library, precision = side.split()[:2]
    if library == "torchvision":
        model = build_torchvision(setup, name).train()
        images = [image.float() / 255 for image in batch.images]
        offset = int("rcnn" in name)  # background is class 0 of two-stage detectors
        targets = [{"boxes": t.boxes, "labels": t.labels + offset, "masks": t.masks} for t in batch.targets or ()]
        losses: Callable[[], dict[str, torch.Tensor]] = lambda: model(images, targets)  # noqa: E731
    else:
        model = build_fusedet(setup, name, *overrides).train()
        if "compiled" in side:
            compile_forward(setup, model)
        losses = lambda: model.loss(batch)  # noqa: E731
    parameters = [p for p in model.parameters() if p.requires_grad]
    fused = True if setup.device.type == "cuda" and library == "fusedet" else None
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=fused)

    def run() -> None:
        optimizer.zero_grad()
        with autocast(setup, precision):
            terms = losses()
        sum(terms.values()).backward()  # type: ignore[union-attr]
        optimizer.step()

    return run


# -- measurement


def measure_case(setup: Setup, kind: str, name: str, images: int, sides: tuple[str, ...], *overrides: str) -> dict:
    """Measure the sides of a case in turn: median time, peak memory of a call, and waits of a call."""
    make = {"predict": make_prediction, "step": make_step}[kind]
    batch = make_batch(setup, images)
    calls: dict[str, Callable[[], Any]] = {}
    row: dict[str, Any] = {"kind": kind, "detector": name, "overrides": list(overrides), "batch": images}
    errors = {}
    for side in sides:
        try:
            call = make(setup, side, name, batch, *overrides)
            finish(setup, call)()  # compiles, chooses kernels
            calls[side] = call
        except torch.OutOfMemoryError:
            errors[side] = "out of memory"
    details = {side: measure_call(setup, call) for side, call in calls.items()}
    times = interleave({side: finish(setup, call) for side, call in calls.items()}, setup.repeats, 0)
    reference = REFERENCE if REFERENCE in calls else next(iter(calls), "")
    row["sides"] = {
        side: measured | details[side]
        for side, measured in (summarize_times(times, reference) if times else {}).items()
    }
    return row | ({"errors": errors} if errors else {})


def finish(setup: Setup, call: Callable[[], Any]) -> Callable[[], None]:
    """Return a call that ends when the device has finished."""

    def run() -> None:
        call()
        if setup.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def measure_call(setup: Setup, call: Callable[[], Any]) -> dict[str, Any]:
    """Return the peak memory in MiB and the number of waits of one call; both are None on a CPU."""
    if setup.device.type != "cuda":
        call()
        return {"peak_MiB": None, "waits": None}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchroniz" in str(warning.message) for warning in caught)
    return {"peak_MiB": round(torch.cuda.max_memory_allocated() / 2**20), "waits": waits}


def measure_training(setup: Setup) -> dict[str, Any]:
    """Train one epoch on generated images in float32 and bf16, with two seeds, and return loss and AP of each."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Not smaller: in bf16, torch's gradient of a 3x3 convolution of stride 2 is undefined for maps of 1x1 on a CPU.
        images, size = (8, (128, 192)) if setup.tiny else (600, (256, 384))
        data = generate_dataset(folder / "data", images=images, seed=0, size=size, splits={"train": 0.5, "val": 0.5})
        config = "retinanet_tiny" if setup.tiny else "retinanet_r18_small"
        small = ("model.backbone.name=lcnet_050", "model.pyramid.channels=32", "model.head.convs=1")
        common = (
            "model.backbone.pretrained=false",
            "model.backbone.frozen_stages=-1",
            "model.backbone.norm_eval=false",
        )
        sizes = (f"data.size=[{size[0]},{size[1]}]", "train.batch=4", "train.base_batch=4", "train.warmup_steps=0")
        rest = ("train.epochs=1", f"data.workers={0 if setup.tiny else 8}", f"device={setup.device.type}")
        for precision in ("fp32", "bf16"):
            for seed in (0, 1):
                out = folder / f"{precision}-{seed}"
                own = (f"data={data}", f"out={out}", f"train.precision={precision}", f"train.seed={seed}")
                result = fusedet.train(
                    config,
                    *common,
                    *(small if setup.tiny else ()),
                    *sizes,
                    *rest,
                    *own,
                    say=lambda text: None,
                    quiet=True,
                )
                last = (out / "metrics.csv").read_text().splitlines()
                header, losses = last[0].split(","), [line.split(",") for line in last[1:]]
                column = header.index("loss")
                loss = next(float(line[column]) for line in reversed(losses) if line[column])
                rows[f"{precision} seed {seed}"] = {"loss": round(loss, 4), "AP": round(float(result.metrics["AP"]), 4)}
    difference = abs(mean_loss(rows, "bf16") - mean_loss(rows, "fp32"))
    noise = max(abs(rows[f"{p} seed 0"]["loss"] - rows[f"{p} seed 1"]["loss"]) for p in ("fp32", "bf16"))
    return {"runs": rows, "loss_difference": round(difference, 4), "loss_noise": round(noise, 4)}


def mean_loss(rows: dict[str, Any], precision: str) -> float:
    return sum(rows[f"{precision} seed {seed}"]["loss"] for seed in (0, 1)) / 2


def list_cases(setup: Setup) -> list[tuple[str, str, int, tuple[str, ...], tuple[str, ...]]]:
    """Return (kind, detector, batch, sides, overrides) of every case, the most telling ones first."""
    sides = ("torchvision fp32", REFERENCE, "fusedet fp32", "fusedet bf16", "fusedet bf16 compiled")
    cases = []
    for images in reversed(setup.batches):
        for name in DETECTORS:
            for kind in GOALS:
                kept = sides[:-1] if setup.tiny and name != "retinanet" else sides
                cases.append((kind, name, images, kept, ()))
    batch = setup.batches[-1]
    for override in MODULES.values():
        cases += [(kind, "retinanet", batch, ("fusedet bf16",), (override,)) for kind in GOALS]
    return cases


def write_table(rows: list[dict], hardware: str) -> str:
    """Return the rows as a Markdown table."""
    lines = [f"Measured on {hardware}.", "", "| | batch | side | ms | times as fast | peak MiB | waits |"]
    lines.append("|---|---|---|---|---|---|---|")
    for row in rows:
        for side, values in row["sides"].items():
            title = " ".join([row["detector"], *row["overrides"], row["kind"]])
            cells = (values["median_ms"], values["times_as_fast"], values["peak_MiB"], values["waits"])
            text = " | ".join("not measured" if cell is None else str(cell) for cell in cells)
            lines.append(f"| {title} | {row['batch']} | {side} | {text} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print JSON, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run everything on the CPU at small sizes")
    parser.add_argument("--table", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    setup = TINY if options.tiny else FULL
    if not options.tiny and not torch.cuda.is_available():
        parser.error("this machine has no GPU: add --tiny to try the script on the CPU")
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    began = time.perf_counter()
    training = measure_training(setup)
    rows, left_out = [], []
    for case in list_cases(setup):
        kind, name, images, sides, overrides = case
        if time.perf_counter() - began > setup.budget:
            left_out.append(" ".join([kind, name, str(images), *overrides]))
            continue
        rows.append(measure_case(setup, kind, name, images, sides, *overrides))
    hardware = torch.cuda.get_device_name() if setup.device.type == "cuda" else "a CPU, not a GPU, at tiny sizes"
    reached = {
        f"{row['kind']} {row['detector']} {row['batch']}": max(
            (values["times_as_fast"] for side, values in row["sides"].items() if side.startswith("fusedet")), default=0
        )
        for row in rows
        if REFERENCE in row["sides"]
    }
    if options.table:
        options.table.write_text(write_table(rows, hardware))
    print_report(
        benchmark="gpu",
        hardware=hardware,
        image=list(setup.size),
        goals=GOALS,
        times_as_fast_as_torchvision_bf16=reached,
        training=training,
        rows=rows,
        left_out=left_out,
        seconds=round(time.perf_counter() - began, 1),
    )


if __name__ == "__main__":
    main()
