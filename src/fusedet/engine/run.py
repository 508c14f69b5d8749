"""The things of one training and where it stands: made, saved, and brought back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from torch import nn

from fusedet.engine import checkpoint, rng
from fusedet.engine.ema import Average
from fusedet.engine.interrupt import Interrupts
from fusedet.engine.logs import Meter, Table
from fusedet.engine.optim import optimizer
from fusedet.engine.progress import Display, Pace
from fusedet.engine.recipe import Recipe
from fusedet.engine.watch import Watch
from fusedet.errors import InputError
from fusedet.types import Batch, Losses

Validate = Callable[[nn.Module, int], Mapping[str, float]]
"""(detector in eval mode, the epoch's number from 1) -> metrics. Every process calls it; the first one's figures count."""


class Loader(Protocol):
    """Batches of one process, the same ones for the same epoch and start."""

    def __len__(self) -> int:
        """Batches per epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch (from 0), from number `start` on."""
        ...


class Objective(nn.Module):
    """A detector's losses as a forward pass: only there do DDP and Fabric's precision reach.

    The batch comes wrapped in a function, or Fabric would cast its boxes to half precision.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Callable[[], Batch]) -> Losses:
        """The unweighted loss terms of one batch."""
        return self.detector.loss(batch())  # type: ignore[operator]


@dataclass
class Run:
    """The things of one training; `state` holds the plain values that say where it stands.

    step: updates done; epoch: epochs finished with their validation; position: batches of the present epoch that are done;
    best: the monitored metric's highest value; stale: validations since then; metrics: of the last validation.
    """

    fabric: Fabric
    detector: nn.Module
    model: Any
    optimizer: Any
    average: Average | None
    loader: Loader
    recipe: Recipe
    validate: Validate | None
    out: Path
    meta: dict[str, str]
    display: Display
    watch: Watch
    interrupts: Interrupts
    loggers: list[Logger]
    table: Table | None = None
    meter: Meter = field(default_factory=Meter)
    pace: Pace = field(default_factory=Pace)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> Path:
        """The checkpoint to go on from."""
        return self.out / "last.ckpt"

    @property
    def best(self) -> Path:
        """The weights of the best validation."""
        return self.out / "best.safetensors"

    @property
    def done(self) -> int:
        """Updates done in the present epoch."""
        return math.ceil(self.state["position"] / self.recipe.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch; the last one may accumulate fewer batches."""
        return math.ceil(len(self.loader) / self.recipe.accumulate)

    @property
    def evaluated(self) -> nn.Module:
        """The module to validate and to keep: the averaged one where there is one."""
        return self.average.module if self.average else self.detector


def setup(
    fabric: Fabric,
    detector: nn.Module,
    loader: Loader,
    recipe: Recipe,
    *,
    out: Path,
    validate: Validate | None,
    resume: bool,
    loggers: Sequence[Logger],
    meta: Mapping[str, Any],
    quiet: bool,
) -> Run:
    """A run at its start, or where last.ckpt says. Raises InputError where that is impossible; nothing is then changed."""
    if not len(loader):
        raise InputError("there is nothing to train on: the loader has no batch")
    first = fabric.is_global_zero
    detector.to(fabric.device).train()
    average = Average(detector, recipe.ema_decay) if recipe.ema_decay else None
    model, optimiser = fabric.setup(
        Objective(detector),
        optimizer(detector, recipe.optim),
    )
    run = Run(
        fabric=fabric,
        detector=detector,
        model=model,
        optimizer=optimiser,
        average=average,
        loader=loader,
        recipe=recipe,
        validate=validate,
        out=out,
        meta={key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()},
        display=Display(recipe.epochs, math.ceil(len(loader) / recipe.accumulate), quiet=quiet or not first),
        watch=Watch(fabric.device),
        interrupts=Interrupts(agreed=fabric.world_size > 1),
        loggers=list(loggers) if first else [],
        state={"step": 0, "epoch": 0, "position": 0, "best": None, "stale": 0, "metrics": {}},
    )
    if resume:
        restore(run)
    elif run.last.exists():
        raise InputError(f"{out} already holds a training: resume it, or choose another folder")
    if first:
        run.table = Table(out / "metrics.csv", run.state["step"] if resume else None)
    return run


def save(run: Run) -> None:
    """Write last.ckpt: everything that the rest of the training depends on. All processes call it, the first one writes.

    Raises NonFinite where a weight is not finite, InputError where the file cannot be written; the previous one then stays.
    """
    run.watch.healthy(run.detector)
    own = {"random": rng.capture(), "meter": run.meter.state()}
    everyone = [own]
    if run.fabric.world_size > 1:
        everyone = [{} for _ in range(run.fabric.world_size)]
        torch.distributed.all_gather_object(everyone, own)
    if run.fabric.is_global_zero:
        content = run.state | {
            "model": run.detector.state_dict(),
            "ema": run.average.module.state_dict() if run.average else None,
            "ema_updates": run.average.updates if run.average else 0,
            "optimizer": run.optimizer.state_dict(),
            "scaler": run.fabric.strategy.precision.state_dict(),
            "processes": everyone,
            "plan": _plan(run),
            "meta": run.meta,
        }
        checkpoint.save(run.last, content)


def restore(run: Run) -> None:
    """Bring a run to where its last.ckpt says."""
    saved = checkpoint.load(run.last)
    if lacking := {"optimizer", "scaler", "processes", "plan", *run.state} - saved.keys():
        raise InputError(f"{run.last} cannot be resumed: it holds no {', '.join(sorted(lacking))}")
    for key, value in _plan(run).items():
        if saved["plan"].get(key) != value:
            raise InputError(
                f"{run.last} cannot be resumed: {key} was {saved['plan'].get(key)} and is now {value}; "
                "use the same data, batch size, options and number of processes"
            )
    checkpoint.load_into(run.detector, saved["model"], run.last)
    if run.average:
        checkpoint.load_into(run.average.module, saved["ema"], run.last)
        run.average.updates = saved["ema_updates"]
    run.optimizer.load_state_dict(saved["optimizer"])
    run.fabric.strategy.precision.load_state_dict(saved["scaler"])
    run.state = {key: saved[key] for key in run.state}
    mine = saved["processes"][run.fabric.global_rank]
    run.meter.restore(mine["meter"], run.fabric.device)
    rng.restore(mine["random"])


def _plan(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on as if nothing had happened."""
    return {
        "batches per epoch": len(run.loader),
        "accumulated batches": run.recipe.accumulate,
        "processes": run.fabric.world_size,
        "precision": run.fabric.strategy.precision.precision,
        "optimizer": run.recipe.optim.name,
        "decay of norms and biases": run.recipe.optim.decay_norm_and_bias,
        "groups of parameters": len(run.optimizer.param_groups),
        "averaging": run.average is not None,
    }
