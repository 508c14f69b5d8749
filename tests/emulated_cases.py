"""Detectors, a training and planted faults on the emulated CUDA device, in a process of its own.

    python tests/emulated_cases.py retinanet mask_rcnn+modules trainer commands faults

prints a JSON object per case: where the host waited, what CUDA would have refused, and the difference to the CPU.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from torch import Tensor, nn

import fusedet
from conftest import save_unrendered
from emulated_device import EmulatedDevice
from fusedet.api.predict import find
from fusedet.config import Train
from fusedet.data.synthetic import generate_dataset
from fusedet.engine import checkpoint, trainer
from fusedet.models.detectors import create_model
from fusedet.types import Batch, Detections, Losses, Target

ROOT = Path(fusedet.__file__).parent
BACKBONE = "model.backbone.name=resnet10t"
MODULES = (
    "model.plugin={type: msfm, scales: [0.5, 1, 2], conv_num: 1}",
    "model.neck=[mse_fpn,smsl]",
)
SMALL = ("model.backbone.name=lcnet_050", "model.pyramid.channels=16", "model.head.convs=1", "model.head.norm=false")
COUNTS = (3, 5, 2, 4)
"""Instances of the images of a batch."""


def make_batch(images: int, height: int = 64, width: int = 96, seed: int = 0) -> Batch:
    """Return random images with instances and masks, each image smaller than the one before."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [(height - 8 * i, width - 8 * i) for i in range(images)]
    targets = []
    for count, (h, w) in zip(COUNTS, sizes):
        corners = torch.rand(count, 2, generator=draw) * torch.tensor([w / 2, h / 2])
        boxes = torch.cat([corners, corners + 12 + torch.rand(count, 2, generator=draw) * 24], dim=1)
        masks = torch.rand(count, height, width, generator=draw) > 0.5
        targets.append(Target(boxes, torch.arange(count) % 3, masks))
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=draw)
    return Batch(pixels, torch.tensor(sizes), tuple(range(images)), torch.ones(images, 2), tuple(targets))


def make_detector(name: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    fixed = ("model.backbone.pretrained=false", "test.score=0.001")
    return create_model(f"{name}_tiny", *fixed, *overrides, num_classes=3)


def difference(values: Any, expected: Any) -> float:
    """Return the largest difference of two collections of tensors, relative to the larger of 1 and the value."""
    largest = 0.0
    for value, reference in zip(values, expected, strict=True):
        value, reference = value.detach().cpu().float(), reference.detach().float()
        assert value.shape == reference.shape, (value.shape, reference.shape)
        if value.numel():
            largest = max(largest, float(((value - reference).abs() / reference.abs().clamp(min=1)).max()))
    return largest


def listed(detections: list[Detections]) -> list[Tensor]:
    """Return the tensors of detections, masks too."""
    return [
        tensor for one in detections for tensor in (one.boxes, one.scores, one.labels, one.masks) if tensor is not None
    ]


def compute_losses(detector: Any, batch: Batch) -> Losses:
    torch.manual_seed(1)  # samplers draw
    return detector.loss(batch)


def run_detector(name: str, *overrides: str) -> dict[str, Any]:
    """Compare a detector with itself on the CPU, and count the waits of a training step and a prediction.

    The first step is in float32 and of 2 images, the second one in bf16 and of 3, with AdamW and clipping.
    """
    detector = make_detector(name, BACKBONE, *overrides)
    batches = {n: make_batch(n) for n in (2, 3)}
    on_cpu = copy.deepcopy(detector)
    detections = on_cpu.eval().predict(batches[2])
    losses = compute_losses(on_cpu.train(), batches[2])
    waits: dict[str, dict[int, Counter[tuple[str, str]]]] = {"step": {}, "predict": {}}
    differences = {}
    with EmulatedDevice(ROOT, strict=False) as device:
        batches = {n: batch.pin_memory().to("cuda", non_blocking=True) for n, batch in batches.items()}
        for n, batch in batches.items():
            module = copy.deepcopy(detector).to("cuda")
            device.occurrences.clear()
            found = module.eval().predict(batch)
            waits["predict"][n] = device.waits()
            optimizer = torch.optim.AdamW(module.train().parameters())
            device.occurrences.clear()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=n == 3):
                terms = compute_losses(module, batch)
            sum(terms.values()).backward()  # type: ignore[union-attr]
            if n == 3:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
                optimizer.step()
            waits["step"][n] = device.waits()
            notes = device.waits("note")
            if n == 2:
                differences = {
                    "detections": difference(listed(found), listed(detections)),
                    "losses": difference(terms.values(), losses.values()),
                }
    return {
        "waits": {kind: {n: sum(c.values()) for n, c in rows.items()} for kind, rows in waits.items()},
        "lines": {kind: describe(rows[3]) for kind, rows in waits.items()},
        "notes": describe(notes),
        "detected": sum(map(len, detections)),
        "difference": differences,
        "faults": dict(device.faults),
    }


def describe(counter: Counter[tuple[str, str]]) -> list[str]:
    """Return a line of text per place."""
    return [f"{count} x {what} in {where}" for (what, where), count in counter.most_common()]


# -- training


class Batches:
    """A loader of a few fixed batches."""

    def __init__(self, *batches: Batch) -> None:
        self.batches, self.batch = batches, len(batches[0])

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for batch in self.batches[start:]:
            yield batch.pin_memory() if torch.cuda.is_available() else batch


def run_trainer() -> dict[str, Any]:
    """Do one step of the trainer in fp16: 2 accumulated batches, GradScaler, clipping, EMA, and a checkpoint."""
    options = {"epochs": 1, "batch": 4, "accumulate": 2, "ema": 0.99, "clip_norm": 1.0, "warmup_steps": 0}
    with tempfile.TemporaryDirectory() as folder, EmulatedDevice(ROOT, strict=False) as device:
        fabric = Fabric(accelerator="cuda", devices=1, precision="16-mixed")
        detector = make_detector("retinanet", *SMALL)  # fp16 is slow on a CPU
        loader = Batches(make_batch(2, seed=0), make_batch(2, seed=1))
        settings = Train(**options)  # type: ignore[arg-type]
        run = trainer.setup(fabric, detector, loader, settings, out=Path(folder), quiet=True)
        device.occurrences.clear()
        norm, *_ = trainer._train_step(run, list(loader.epoch(0)))
        step, copies = device.waits(), device.waits("copy")
        gradient = norm.item()
        device.occurrences.clear()
        run.state |= {"step": 1, "position": 2}
        trainer.save(run)
        saved = device.waits()
        device.occurrences.clear()
        weights = detector.state_dict()
        checkpoint.save_weights(run.best, weights, {})
        best = device.waits()
        stored = {**checkpoint.load_weights(run.best)[0], **{f"last.{k}": v for k, v in load_last(run.last).items()}}
        expected = {**weights, **{f"last.{key}": value for key, value in weights.items()}}
        is_equal = stored.keys() == expected.keys() and all(
            torch.equal(stored[key], expected[key].cpu()) for key in stored
        )
    return {
        "waits": {"step": sum(step.values()), "checkpoint": sum(saved.values()), "weights": sum(best.values())},
        "lines": {"step": describe(step), "checkpoint": describe(saved), "copies": describe(copies)},
        "stored weights are equal": is_equal,
        "gradient norm": gradient,
        "faults": dict(device.faults),
    }


def load_last(path: Path) -> dict[str, Tensor]:
    return checkpoint.load(path)["model"]


def run_evaluation() -> dict[str, Any]:
    """Find the detections of batches of 2 and 3 images as an evaluation does, without and with a flipped view."""
    waits: dict[str, dict[int, int]] = {}
    differences: dict[str, float] = {}
    lines: dict[str, list[str]] = {}
    for case, name, flips in (("plain", "retinanet", 0), ("masks", "mask_rcnn", 0), ("flipped", "retinanet", 1)):
        detector = make_detector(name, BACKBONE).eval()
        batches = {n: make_batch(n) for n in (2, 3)}
        for n, batch in batches.items() if flips else ():
            mirrored = replace(batch, images=batch.images.flip(-1), targets=None, flipped=True)
            batches[n] = replace(batch, views=(mirrored,))
        expected = find(detector, batches[2], torch.device("cpu"))
        waits[case] = {}
        with EmulatedDevice(ROOT) as device:
            detector.to("cuda")
            for n, batch in batches.items():
                pinned = batch.pin_memory()
                device.occurrences.clear()
                detections = find(detector, pinned, torch.device("cuda"))
                waits[case][n], lines[case] = sum(device.waits().values()), describe(device.waits())
                assert not [what for what, _ in device.waits("copy") if "pageable" in what]
                if n == 2:
                    differences[case] = difference(listed(detections), listed(expected))
    return {"waits": waits, "lines": lines, "difference": differences}


def run_commands() -> dict[str, Any]:
    """Train, resume, validate and predict on 16 generated images, on the CPU and on the emulated device."""
    with tempfile.TemporaryDirectory() as name, mock.patch.object(Figure, "savefig", save_unrendered):
        folder = Path(name)
        data = generate_dataset(folder / "data", images=16, seed=0, size=(64, 96), splits={"train": 0.5, "val": 0.5})
        expected = train_and_predict(folder / "cpu", data, "cpu")
        with EmulatedDevice(ROOT, strict=False) as device:
            values = train_and_predict(folder / "cuda", data, "cuda")
    losses, metrics, detections = (
        difference(torch.tensor(list(a)), torch.tensor(list(b))) for a, b in zip(values, expected)
    )
    return {
        "difference": {"losses": losses, "metrics": metrics, "detections": detections},
        "compared": {"losses": len(values[0]), "metrics": len(values[1]), "detections": len(values[2])},
        "faults": dict(device.faults),
    }


def train_and_predict(out: Path, data: Path, device: str) -> tuple[list[float], list[float], list[float]]:
    """Return losses, metrics, and the scores of detections, of a training in two parts."""
    settings = ("data.size=[64,96]", "data.workers=0", "train.batch=4", "train.base_batch=4", "train.warmup_steps=0")
    rest = ("test.score=0.001", "train.precision=fp32", f"device={device}", f"data={data}", f"out={out}")
    overrides = ("model.backbone.pretrained=false", *SMALL, *settings, *rest)
    fusedet.train("retinanet_tiny", *overrides, "train.epochs=1", say=lambda text: None, quiet=True)
    fusedet.train(str(out), "train.epochs=2", f"device={device}", resume=True, say=lambda text: None, quiet=True)
    rows = list(csv.DictReader((out / "metrics.csv").read_text().splitlines()))
    losses = [float(row["loss"]) for row in rows if row["loss"]]
    metrics = fusedet.validate(str(out), f"device={device}").metrics
    images = sorted((data / "val").rglob("*.jpg"))[:2]
    predictions = fusedet.load(out, device=device).predict(images, batch=2)
    scores = [float(score) for prediction in predictions for score in prediction.scores]
    return losses, [value for value in metrics.values() if isinstance(value, float) and math.isfinite(value)], scores


# -- planted faults


def read_too_soon(x: Tensor) -> Tensor:
    """Read a copy before its event."""
    early = x.mean().to("cpu", non_blocking=True)
    return x * torch.full_like(x, early.item())


def run_in_float64(x: Tensor) -> Tensor:
    return (x.double() * 2).float() / 2


def use_cpu_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x * 1


FAULTS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "a tensor of the CPU in a sum": ("refused", lambda x: x + torch.ones(x.shape[-1])),
    "a tensor of the CPU in a concatenation": ("refused", lambda x: torch.cat([x, torch.ones(x.shape)])),
    "an index on the CPU in gather": ("refused", lambda x: x.flatten().gather(0, torch.zeros(1, dtype=torch.int64))),
    "a generator of the CPU": (
        "refused",
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator().manual_seed(0)),
    ),
    "a product of integers": ("refused", lambda x: x.flatten(0, 2).long() @ x.flatten(0, 2).long().mT),
    "a conversion to numpy": ("refused", lambda x: x.detach().numpy()),
    "an index on the CPU": ("wait", lambda x: x[torch.zeros(1, dtype=torch.int64)]),
    "item": ("wait", lambda x: x.sum().item()),
    "a condition on a tensor": ("wait", lambda x: 1 if x.sum() > 0 else 0),
    "tolist": ("wait", lambda x: x[0, 0, 0].tolist()),
    "a boolean index": ("wait", lambda x: x[x > 0]),
    "an assignment to a boolean index": ("wait", lambda x: x.detach().clone().__setitem__(x > 0, x.detach()[x > 0])),
    "nonzero": ("wait", lambda x: x.nonzero()),
    "a tensor from a list": ("wait", lambda x: x.new_tensor([1.0, 2.0])),
    "a blocking download": ("wait", lambda x: x.cpu()),
    "repeat_interleave without a size": ("wait", lambda x: x[0, 0, 0].repeat_interleave((x[0, 0, 0] > 0).long())),
    "unique": ("wait", lambda x: x.unique()),
    "a pageable upload": ("copy", lambda x: torch.ones(3).to(x.device, non_blocking=True)),
    "float64": ("note", run_in_float64),
    "autocast of the CPU": ("note", use_cpu_autocast),
    "a copy that is read before its event": ("wrong", read_too_soon),
}
"""Kind of notice and the faulty code, by name. The code runs on the finest feature map of a detector."""


class Faulty(nn.Module):
    """A neck with a planted fault."""

    def __init__(self, neck: nn.Module, fault: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.neck, self.fault = neck, fault
        self.levels = neck.levels

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        first, *rest = self.neck(features)
        changed = self.fault(first)
        is_map = isinstance(changed, Tensor) and changed.shape == first.shape and changed.device == first.device
        return [changed if is_map else first, *rest]


def run_faults() -> dict[str, Any]:
    """Plant each fault into a detector's neck, and return how it was noticed; the first entry has no fault."""
    detector = make_detector("retinanet", *SMALL)
    noticed: dict[str, list[str]] = {}
    with EmulatedDevice(ROOT) as device:
        batch = make_batch(1, 64, 64).pin_memory().to("cuda", non_blocking=True)
        detector.to("cuda").train()
        neck = detector.neck
        usual: dict[str, Counter[tuple[str, str]]] = {}
        for name, (_, fault) in {"none": ("", lambda x: x), **FAULTS}.items():
            detector.neck = Faulty(neck, fault)
            device.occurrences.clear()
            signs = []
            try:
                with torch.no_grad():
                    loss = torch.stack(list(detector.loss(batch).values())).sum()
            except (RuntimeError, TypeError) as error:
                signs.append(f"refused: {error}")
                loss = None
            found = {kind: device.waits(kind) for kind in ("wait", "note", "copy")}
            if name == "none":
                usual = found
            for kind, counter in found.items():
                signs += [f"{kind}: {what}" for what, _ in counter - usual.get(kind, Counter())]
            if loss is not None and not math.isfinite(loss.item()):
                signs.append("wrong: the loss is not finite")
            noticed[name] = [sign for sign in signs if not sign.startswith("copy") or "pageable" in sign]
    return {"noticed": noticed, "expected": {name: kind for name, (kind, _) in FAULTS.items()}}


def run_case(name: str) -> dict[str, Any]:
    others = {"trainer": run_trainer, "evaluation": run_evaluation, "commands": run_commands, "faults": run_faults}
    if name in others:
        return others[name]()
    name, _, modules = name.partition("+")
    interaction = () if "rcnn" in name else ("model.interact=msil",)
    return run_detector(name, *(MODULES + interaction if modules else ()))


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        warnings.simplefilter("ignore")
        started = time.process_time()
        row = {"case": name, **run_case(name)}
        print(json.dumps(row | {"seconds": round(time.process_time() - started, 2)}), flush=True)


if __name__ == "__main__":
    main()
