"""The state of one training, saved as last.ckpt and restored from it."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from torch.optim import Optimizer

from fusedet.collectives import gather_objects
from fusedet.config import Interval, Train
from fusedet.engine import checkpoint, checkpoint_validation, rng
from fusedet.engine.checkpoint_validation import Checkpoint, ProcessState
from fusedet.engine.ema import EMA
from fusedet.engine.logging import Meter, MetricsTable
from fusedet.engine.nan_guard import NanGuard
from fusedet.engine.progress import Display, Pace
from fusedet.engine.signals import Interrupts
from fusedet.errors import InputError
from fusedet.models.detectors import DetectorModule
from fusedet.types import Batch

if TYPE_CHECKING:
    from lightning_fabric.wrappers import _FabricModule

TABLES = ("metrics.csv", "speed.csv")
Validate = Callable[[DetectorModule, int], Mapping[str, float]]
"""(detector in eval mode, the epoch's number from 1) -> metrics. Every process calls it; the first one's count."""


class Loader(Protocol):
    """Batches of one process, the same for the same epoch and start.

    All processes together see the same images, whatever their number. A loader may have a `seed`, which the order of
    the images follows from.

    Attributes:
        batch: Images of one batch, over all processes.
    """

    batch: int

    def __len__(self) -> int:
        """Return the batches per epoch."""
        ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch (from 0), from number `start` on."""
        ...


@dataclass
class TrainingRun:
    """The objects of one training, and in `state` the plain values that say how far it is.

    Attributes:
        model: The detector's `LossModule`, as Fabric wraps it.
        optimizer: As Fabric wraps it; the wrapper is a subclass of the optimizer's own class.
        lr: The learning rate after the warm-up, scaled to the total batch.
        state: `step` (updates done), `epoch` (epochs finished with their validation), `position` (batches done of the
            present epoch), `best` (the monitored metric's highest value), `stale` (validations since then) and
            `metrics` (of the last validation).
        tables: The csv files by name, in the first process only.
        process_states: During a validation, the states of all processes, so that the first one can save without the
            others.
        saved: When the last checkpoint was written, by `time.monotonic`.
    """

    fabric: Fabric
    detector: DetectorModule
    model: "_FabricModule"
    optimizer: Optimizer
    ema: EMA | None
    loader: Loader
    settings: Train
    lr: float
    log_every: int
    validate: Validate | None
    out: Path
    meta: dict[str, str]
    display: Display
    guard: NanGuard
    interrupts: Interrupts
    loggers: list[Logger]
    say: Callable[[str], None]
    checkpoint_every: Interval
    tables: dict[str, MetricsTable] = field(default_factory=dict)
    process_states: list[ProcessState] | None = None
    saved: float = field(default_factory=time.monotonic)
    meter: Meter = field(default_factory=Meter)
    pace: Pace = field(default_factory=Pace)
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> Path:
        """The checkpoint to resume from."""
        return self.out / "last.ckpt"

    @property
    def best(self) -> Path:
        """The weights of the best validation."""
        return self.out / "best.safetensors"

    @property
    def done(self) -> int:
        """Updates done in the present epoch."""
        return math.ceil(self.state["position"] / self.settings.accumulate)

    @property
    def steps_per_epoch(self) -> int:
        """Updates per epoch; the last one may accumulate fewer batches."""
        return math.ceil(len(self.loader) / self.settings.accumulate)

    @property
    def is_finished(self) -> bool:
        """Whether all epochs are done, or `train.patience` has run out."""
        patience = self.settings.patience
        return self.state["epoch"] >= self.settings.epochs or (patience is not None and self.state["stale"] >= patience)

    @property
    def is_checkpoint_due(self) -> bool:
        """Whether a checkpoint is due by the first process's clock."""
        seconds = self.checkpoint_every.seconds
        return bool(seconds and time.monotonic() - self.saved >= seconds and self.fabric.is_global_zero)

    @property
    def eval_module(self) -> DetectorModule:
        """The module to validate and to keep: the averaged one where there is one."""
        return self.ema.module if self.ema else self.detector


def gather_process_states(run: TrainingRun) -> list[ProcessState]:
    """Return the random states and running losses of every process. All processes call it."""
    own: Any = {"random": rng.capture_states(), "meter": run.meter.state()}
    return gather_objects(own)


def save(run: TrainingRun) -> None:
    """Write last.ckpt: everything that the rest of the training depends on.

    All processes call it, and the first one writes. During a validation, when `process_states` are known, none waits
    for another.

    Raises:
        DivergenceError: A weight is not finite; the previous file stays.
        StorageError: The file cannot be written; the previous one stays.
    """
    weights = run.detector.state_dict()
    run.guard.check_weights(weights)
    processes = gather_process_states(run) if run.process_states is None else run.process_states
    if run.fabric.is_global_zero:
        content = run.state | {
            "model": weights,
            "optimizer": run.optimizer.state_dict(),
            "ema": run.ema.module.state_dict() if run.ema else None,
            "ema_updates": run.ema.updates if run.ema else 0,
            "scaler": run.fabric.strategy.precision.state_dict(),
            "processes": processes,
            "tables": {name: table.state() for name, table in run.tables.items()},
            "plan": _plan(run),
            "made with": _versions(run),
            "meta": run.meta,
        }
        checkpoint.save(run.last, content)
    run.saved = time.monotonic()


def restore(run: TrainingRun) -> dict[str, Any]:
    """Restore a run from its last.ckpt, and say what has changed since.

    Returns:
        The states of the tables.

    Raises:
        InputError: The checkpoint does not fit this run, or is not as `save` writes it.
    """
    saved = checkpoint_validation.validate_checkpoint(checkpoint.load(run.last), run.last)
    for key, value in _plan(run).items():
        if (then := saved.plan.get(key)) != value:
            raise InputError(
                f"{run.last} cannot be resumed: {key} was {then} and is now {value}; "
                "use the same data, batch size and options"
            )
    checkpoint_validation.check_position(saved, len(run.loader), run.settings.accumulate, run.last)
    checkpoint.refuse_misfit(run.detector, saved.model, run.last)  # before the moments: another model is no damage
    checkpoint_validation.check_moments(saved, run.settings.optimizer, run.optimizer, run.last)
    precision = run.fabric.strategy.precision
    if (saved.ema is None) != (run.ema is None):
        raise checkpoint_validation.make_damage_error(run.last, "ema")
    if saved.scaler.keys() != precision.state_dict().keys():
        raise checkpoint_validation.make_damage_error(run.last, "scaler")
    checkpoint.load_into(run.detector, saved.model, run.last)
    if run.ema and saved.ema is not None:
        checkpoint.load_into(run.ema.module, saved.ema, run.last)
        run.ema.updates = saved.ema_updates
    run.optimizer.load_state_dict(checkpoint_validation.merged_optimizer_state(saved, run.optimizer))
    precision.load_state_dict(saved.scaler)
    run.state = {key: getattr(saved, key) for key in run.state}
    for name, now in _versions(run).items():
        if (then := saved.made_with.get(name)) != now:
            run.say(f"{run.out} goes on with another {name}: {then} until step {run.state['step']}, {now} from now on")
    _restore_process(run, saved)
    return dict(saved.tables)


def _restore_process(run: TrainingRun, saved: Checkpoint) -> None:
    """Restore this process's random states and losses; with another number of processes, what comes nearest."""
    processes = saved.processes
    rank, world, step = run.fabric.global_rank, run.fabric.world_size, run.state["step"]
    if world == len(processes):
        run.meter.restore(processes[rank]["meter"], run.fabric.device)
    else:
        run.meter.restore(Meter.mean([process["meter"] for process in processes]), run.fabric.device)
        run.say(
            f"{run.out} goes on in another number of processes: {len(processes)} until step {step}, {world} from now "
            f"on; the batches stay the same {run.loader.batch} images in the same order, but some random numbers differ"
        )
    if rank < len(processes):
        try:
            rng.restore_states(processes[rank]["random"])
        except checkpoint.DAMAGE as error:  # only the generators know whether a state is one of theirs
            raise checkpoint_validation.make_damage_error(run.last, f"processes.{rank}.random") from error
    else:
        rng.seed_from(torch.initial_seed() % 2**32, step, rank)


def _versions(run: TrainingRun) -> dict[str, str]:
    """Return what may differ when a run goes on, and may change the last digits."""
    names = ("fusedet", "torch", "torchvision", "timm")
    return {name: version(name) for name in names} | {"device": run.fabric.device.type}


def _plan(run: TrainingRun) -> dict[str, Any]:
    """Return what must be the same for a run to go on as if nothing had happened."""
    return {
        "batches per epoch": len(run.loader),
        "images per batch": run.loader.batch,
        "accumulated batches": run.settings.accumulate,
        "precision": run.fabric.strategy.precision.precision,
        "optimizer": run.settings.optimizer,
        "decay of norms and biases": run.settings.decay_norm_and_bias,
        "groups of parameters": len(run.optimizer.param_groups),
        "averaging": run.ema is not None,
        "seed": getattr(run.loader, "seed", None),
    }
