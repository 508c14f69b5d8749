"""The things of one training and where it stands: made, saved, and brought back."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from torch import nn

from fusedet.atomic_io import remove_leftovers
from fusedet.engine import checkpoint, checkpoint_validation, rng, shards
from fusedet.engine.ema import Average
from fusedet.engine.logging import Meter, Table
from fusedet.engine.nan_guard import Watch
from fusedet.engine.optim import optimizer
from fusedet.engine.progress import Display, Pace
from fusedet.engine.recipe import Recipe
from fusedet.engine.signals import Interrupts
from fusedet.errors import InputError
from fusedet.types import Batch, Losses

TABLES = ("metrics.csv", "speed.csv")
SEED = "seed"  # of the plan; checkpoints from before it was noted say nothing of it
Validate = Callable[[nn.Module, int], Mapping[str, float]]
"""(detector in eval mode, the epoch's number from 1) -> metrics. Every process calls it; the first one's figures count."""


class Loader(Protocol):
    """Batches of one process, the same ones for the same epoch and start; the same images in all processes together, however many.

    batch: images of one batch, over all processes. It may have a `seed`, which the order of the images follows from.
    """

    batch: int

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
    parts: during a validation, what each process has to say in a checkpoint, so that the first one can save without the others.
    tables: the files of figures by name, in the first process.
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
    say: Callable[[str], None]
    tables: dict[str, Table] = field(default_factory=dict)
    parts: list[dict[str, Any]] | None = None
    weights: dict[str, Any] | None = None
    saved: float = field(default_factory=time.monotonic)
    after_save: Callable[[], None] | None = None
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
    def late(self) -> bool:
        """Whether a checkpoint is due by the first process's clock."""
        every = self.recipe.checkpoint_every
        due = every is not None and every.seconds is not None and time.monotonic() - self.saved >= every.seconds
        return due and self.fabric.is_global_zero

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
    say: Callable[[str], None] | None = None,
) -> Run:
    """A run at its start, or where last.ckpt says. Raises InputError where that is impossible; nothing is then changed."""
    if not len(loader):
        raise InputError("there is nothing to train on: the loader has no batch")
    first = fabric.is_global_zero
    detector.to(fabric.device).train()
    average = Average(detector, recipe.ema_decay) if recipe.ema_decay else None
    model = fabric.setup_module(Objective(detector))
    optimiser = fabric.setup_optimizers(
        optimizer(detector, recipe.optim)
    )  # of the weights as they are then, shared out or not
    display = Display(recipe.epochs, math.ceil(len(loader) / recipe.accumulate), quiet=quiet or not first)
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
        display=display,
        watch=Watch(fabric.device),
        interrupts=Interrupts(agreed=fabric.world_size > 1),
        loggers=list(loggers) if first else [],
        say=(say or display.say) if first else lambda text: None,
        state={"step": 0, "epoch": 0, "position": 0, "best": None, "stale": 0, "metrics": {}},
    )
    if not resume and run.last.exists():
        raise InputError(f"{out} already holds a training: resume it, or choose another folder")
    known = restore(run) if resume else {}
    if first:
        remove_leftovers(out)
        if not resume:
            run.best.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        run.tables = {name: Table(out / name, known.get(name)) for name in TABLES}
        for table in run.tables.values():
            if table.lost:
                run.say(f"{table.path} has lost {table.lost} of its rows: the training goes on, they do not come back")
    return run


def part(run: Run) -> list[dict[str, Any]]:
    """What each process has to say in a checkpoint. All processes call it."""
    own = {"random": rng.capture(), "meter": run.meter.state()}
    if run.fabric.world_size == 1:
        return [own]
    everyone: list[dict[str, Any]] = [{} for _ in range(run.fabric.world_size)]
    torch.distributed.all_gather_object(everyone, own)
    return everyone


def save(run: Run) -> None:
    """Write last.ckpt: everything that the rest of the training depends on. All processes call it, the first one writes.

    During a validation, when `parts` and shared `weights` are known, none waits for another one. Raises NonFinite where a weight is
    not finite, InputError where the file cannot be written; the previous one then stays.
    """
    weights = run.weights or shards.weights(run.detector, run.optimizer)
    run.watch.healthy(weights["model"])
    everyone = part(run) if run.parts is None else run.parts
    if run.fabric.is_global_zero:
        content = run.state | {
            **weights,
            "ema": run.average.module.state_dict() if run.average else None,
            "ema_updates": run.average.updates if run.average else 0,
            "scaler": run.fabric.strategy.precision.state_dict(),
            "processes": everyone,
            "tables": {name: table.state() for name, table in run.tables.items()},
            "plan": _plan(run),
            "made with": _surroundings(run),
            "meta": run.meta,
        }
        checkpoint.save(run.last, content)
        if run.after_save:
            run.after_save()
            run.after_save = None
    run.saved = time.monotonic()


def restore(run: Run) -> dict[str, Any]:
    """Bring a run to where its last.ckpt says, and say what is not as it was; gives the states of the tables.

    Raises InputError where it does not fit this run, and where it is not as `save` writes it.
    """
    saved = checkpoint.load(run.last)
    checkpoint_validation.check(saved, run.last)
    for key, value in _plan(run).items():
        then = saved["plan"].get(key, value if key == SEED else None)
        if then != value:
            raise InputError(
                f"{run.last} cannot be resumed: {key} was {then} and is now {value}; use the same data, batch size and options"
            )
    checkpoint_validation.check_place(saved, len(run.loader), run.recipe.accumulate, run.last)
    checkpoint.refuse_misfit(run.detector, saved["model"], run.last)  # before the moments: another model is no damage
    checkpoint_validation.check_moments(saved, run.recipe.optim.name, run.optimizer, run.last)
    precision = run.fabric.strategy.precision
    if (saved["ema"] is None) != (run.average is None):
        raise checkpoint_validation.damaged(run.last, "ema")
    if saved["scaler"].keys() != precision.state_dict().keys():
        raise checkpoint_validation.damaged(run.last, "scaler")
    checkpoint.load_into(run.detector, shards.share_weights(saved["model"], run.detector), run.last)
    if run.average:
        checkpoint.load_into(run.average.module, saved["ema"], run.last)
        run.average.updates = saved["ema_updates"]
    run.optimizer.load_state_dict(
        shards.share_optimizer(checkpoint_validation.moved(saved, run.optimizer), run.optimizer)
    )
    precision.load_state_dict(saved["scaler"])
    run.state = {key: saved[key] for key in run.state}
    for name, now in _surroundings(run).items():
        if (then := saved["made with"].get(name)) != now:
            run.say(f"{run.out} goes on with another {name}: {then} until step {run.state['step']}, {now} from now on")
    _share(run, saved["processes"])
    return saved["tables"]


def _share(run: Run, everyone: list[dict[str, Any]]) -> None:
    """Take up what this process said, or where there were more or fewer of them, what comes nearest."""
    rank, world, step = run.fabric.global_rank, run.fabric.world_size, run.state["step"]
    if world == len(everyone):
        run.meter.restore(everyone[rank]["meter"], run.fabric.device)
    else:
        run.meter.restore(Meter.mean([one["meter"] for one in everyone]), run.fabric.device)
        chance = (
            "some random numbers differ"
            if world < len(everyone)
            else f"process {len(everyone)} and later begin new random numbers"
        )
        run.say(
            f"{run.out} goes on in another number of processes: {len(everyone)} until step {step}, {world} from now on; "
            f"the batches stay the same {run.loader.batch} images in the same order, but {chance}"
        )
    if rank < len(everyone):
        try:
            rng.restore(everyone[rank]["random"])
        except checkpoint.DAMAGE as error:  # the generators know best what a state of theirs is
            raise checkpoint_validation.damaged(run.last, f"processes.{rank}.random") from error
    else:
        rng.begin(torch.initial_seed() % 2**32, step, rank)


def _surroundings(run: Run) -> dict[str, str]:
    """What may be another one when a run goes on, and may change the last digits."""
    names = ("fusedet", "torch", "torchvision", "timm")
    return {name: version(name) for name in names} | {"device": run.fabric.device.type}


def _plan(run: Run) -> dict[str, Any]:
    """What must be the same for a run to go on as if nothing had happened."""
    return {
        "batches per epoch": len(run.loader),
        "images per batch": run.loader.batch,
        "accumulated batches": run.recipe.accumulate,
        "precision": run.fabric.strategy.precision.precision,
        "optimizer": run.recipe.optim.name,
        "decay of norms and biases": run.recipe.optim.decay_norm_and_bias,
        "groups of parameters": len(run.optimizer.param_groups),
        "averaging": run.average is not None,
        SEED: getattr(run.loader, "seed", None),
    }
