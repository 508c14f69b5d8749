"""A training, an evaluation and the commands on the emulated CUDA device; emulated_cases.py runs them."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning_fabric import Fabric
from matplotlib.figure import Figure
from torch import Tensor

import fusedet
from emulated_cases import BACKBONE, ROOT, SMALL, describe, difference, listed, make_batch, make_detector
from emulated_device import EmulatedDevice
from fusedet.api.detection import detect_batch
from fusedet.config import Train
from fusedet.data.synthetic import generate_dataset
from fusedet.engine import checkpoint, trainer
from fusedet.types import Batch
from shared_fixtures import save_unrendered


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
    """Find the detections of batches of 2 and 3 images as an evaluation does, without and with a flipped copy."""
    waits: dict[str, dict[int, int]] = {}
    differences: dict[str, float] = {}
    lines: dict[str, list[str]] = {}
    for case, name, flips in (("plain", "retinanet", 0), ("masks", "mask_rcnn", 0), ("flipped", "retinanet", 1)):
        detector = make_detector(name, BACKBONE).eval()
        batches = {n: make_batch(n) for n in (2, 3)}
        for n, batch in batches.items() if flips else ():
            mirrored = replace(batch, images=batch.images.flip(-1), targets=None, flipped=True)
            batches[n] = replace(batch, tta_batches=(mirrored,))
        expected = detect_batch(detector, batches[2], torch.device("cpu"))
        waits[case] = {}
        with EmulatedDevice(ROOT) as device:
            detector.to("cuda")
            for n, batch in batches.items():
                pinned = batch.pin_memory()
                device.occurrences.clear()
                detections = detect_batch(detector, pinned, torch.device("cuda"))
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


CASES = {"trainer": run_trainer, "evaluation": run_evaluation, "commands": run_commands}
