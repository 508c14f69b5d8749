"""Trainings of a small detector in two processes; test_distributed.py compares them with those of one."""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import nn

from fakes import FakeDetector, FakeLoader, make_batch
from fusedet.config import Train
from fusedet.engine.setup import LossModule
from fusedet.engine.trainer import Interrupted, fit, setup
from fusedet.errors import DivergenceError
from fusedet.types import Batch, Target


def make_detector() -> FakeDetector:
    torch.manual_seed(0)
    detector = FakeDetector()
    detector.body[1] = nn.Identity()  # the statistics of a batch are those of its process
    return detector


class Loader(FakeLoader):
    """Another number of images in each process; `fault` happens in the second one at the third batch."""

    def __init__(self, rank: int, fault: str = "") -> None:
        super().__init__()
        self.rank, self.fault = rank, fault

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for number in range(start, self.length):
            batch = make_batch(1000 * self.rank + 100 * epoch + number, 2 + self.rank)
            if self.rank == 1 and number == 3 and self.fault == "nan":
                bad = Target(torch.full((1, 4), float("nan")), torch.zeros(1, dtype=torch.int64))
                batch = replace(batch, targets=(bad, *batch.targets[1:]))
            if self.rank == 1 and number == 3 and self.fault == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


class SharedLoader(Loader):
    """The process's half of a joint batch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        for number in range(start, self.length):
            if self.rank == 1 and number == 3 and self.fault == "stop":
                os.kill(os.getpid(), signal.SIGINT)
            yield take_images(make_batch(100 * epoch + number, 4), slice(2 * self.rank, 2 * self.rank + 2))


def take_images(batch: Batch, own: slice) -> Batch:
    """Some of a batch's images."""
    assert batch.targets is not None
    return Batch(batch.images[own], batch.sizes[own], batch.ids[own], batch.scales[own], batch.targets[own])


def run_rank(top: str, environment: dict[str, str]) -> None:
    """Run all trainings of one of two processes; its output goes to RANK.log, its weights to NAME/RANK.pt."""
    os.environ.update(environment)
    rank = int(environment["RANK"])
    log = os.open(Path(top) / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()

    def train(folder: str, loader: Loader, resume: bool = False, every: str | None = None) -> None:
        out, detector = Path(top) / folder, make_detector()
        out.mkdir(exist_ok=True)
        settings = Train(epochs=2, warmup_steps=0, accumulate=2, ema=0.9, checkpoint_every=every)

        def validate(module: Any, epoch: int) -> dict[str, int]:
            if loader.fault == "stop in the validation":
                os.kill(os.getpid(), signal.SIGTERM)
            return {"AP": rank + epoch}

        try:
            fit(setup(fabric, detector, loader, settings, out=out, validate=validate, resume=resume, log_every=3))
        except (Interrupted, DivergenceError) as error:
            (out / f"{rank}.txt").write_text(f"{type(error).__name__}: {error} {getattr(error, 'code', '')}")
        torch.save(detector.state_dict(), out / f"{rank}.pt")

    detector = make_detector()
    model = fabric.setup(LossModule(detector))
    for seed in (0, 5):
        terms = model(partial(make_batch(seed + rank, 2 + rank).to, "cpu"))
        fabric.backward(torch.stack(list(terms.values())).sum())
    torch.save({k: p.grad for k, p in detector.named_parameters()}, Path(top) / f"{rank}.pt")
    train("whole", Loader(rank))
    train("nan", Loader(rank, "nan"))
    train("stop", Loader(rank, "stop"))
    train("stopped in the validation", Loader(rank, "stop in the validation"))
    train("timed", Loader(rank), every="0.000000001s")
    train("two_to_one", SharedLoader(rank, "stop"))
    fabric.barrier()
    train("stop", Loader(rank), resume=True)
    train("stopped in the validation", Loader(rank), resume=True)
    train("one_to_two", SharedLoader(rank), resume=True)
    fabric.barrier()
    torch.distributed.destroy_process_group()
