"""The start of a training: a run is made, or restored from its last.ckpt."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from torch import nn
from torch.optim import Optimizer

from fusedet.atomic_io import remove_leftovers
from fusedet.config import Train, parse_interval
from fusedet.engine.ema import EMA
from fusedet.engine.logging import MetricsTable
from fusedet.engine.nan_guard import NanGuard
from fusedet.engine.optim import build_optimizer
from fusedet.engine.progress import Display
from fusedet.engine.signals import Interrupts
from fusedet.engine.train_state import TABLES, Loader, TrainingRun, Validate, restore
from fusedet.errors import InputError, format_count
from fusedet.models.detectors import DetectorModule
from fusedet.models.protocols import Detector
from fusedet.types import Batch, Losses


class LossModule(nn.Module):
    """A detector's losses as a forward pass, because DDP and Fabric's precision reach nothing else.

    The batch comes wrapped in a function, or Fabric would cast its boxes to half precision.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, batch: Callable[[], Batch]) -> Losses:
        """Return the unweighted loss terms of one batch."""
        return self.detector.loss(batch())


def setup(
    fabric: Fabric,
    detector: DetectorModule,
    loader: Loader,
    settings: Train,
    *,
    out: Path,
    lr: float | None = None,
    validate: Validate | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    meta: Mapping[str, Any] | None = None,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
    log_every: int = 10,
) -> TrainingRun:
    """Make a run at its start or, with `resume`, where its last.ckpt says. Every process calls it.

    Args:
        fabric: Launched; its devices and precision are used.
        detector: A module with `loss(Batch) -> dict of scalar tensors` and `loss_weights`.
        loader: The training batches.
        settings: The config's section `train`.
        out: The run directory, which exists.
        lr: The learning rate, scaled to the total batch; `settings.lr` by default.
        validate: Returns the metrics of a validation.
        resume: Whether to go on from last.ckpt.
        loggers: Take every row of metrics.
        meta: What the checkpoints say about the model; values that are not strings become JSON.
        quiet: Show no progress.
        say: Takes lines for the user, such as what has changed since the run was stopped.
        log_every: Steps between two rows of metrics; an epoch's last step is always logged.

    Raises:
        InputError: The directory already holds a training, or has none to resume, or its last.ckpt is damaged or does
            not fit. Nothing in the directory is changed then.
    """
    if not len(loader):
        raise InputError("there is nothing to train on: the loader has no batch")
    is_first = fabric.is_global_zero
    detector.to(fabric.device).train()
    ema = EMA(detector, settings.ema) if settings.ema else None
    display = Display(settings.epochs, math.ceil(len(loader) / settings.accumulate), quiet=quiet or not is_first)
    lr = settings.lr if lr is None else lr
    # A fused optimizer unscales fp16's gradients by itself, and Fabric then refuses to clip them.
    fused = fabric.device.type == "cuda" and getattr(fabric.strategy.precision, "scaler", None) is None
    optimizer = fabric.setup_optimizers(build_optimizer(detector, settings, lr, fused=fused))
    run = TrainingRun(
        fabric=fabric,
        detector=detector,
        model=fabric.setup_module(LossModule(detector)),
        optimizer=cast("Optimizer", optimizer),
        ema=ema,
        loader=loader,
        settings=settings,
        lr=lr,
        log_every=log_every,
        validate=validate,
        out=out,
        meta={key: value if isinstance(value, str) else json.dumps(value) for key, value in (meta or {}).items()},
        display=display,
        guard=NanGuard(fabric.device),
        interrupts=Interrupts(agreed=fabric.world_size > 1),
        loggers=list(loggers) if is_first else [],
        say=(say or display.say) if is_first else lambda text: None,
        checkpoint_every=parse_interval(settings.checkpoint_every, "train.checkpoint_every"),
        state={"step": 0, "epoch": 0, "position": 0, "best": None, "stale": 0, "metrics": {}},
    )
    if not resume and run.last.exists():
        raise InputError(f"{out} already holds a training: resume it, or choose another directory")
    tables = restore(run) if resume else {}
    if is_first:
        remove_leftovers(out)
        if not resume:
            run.best.unlink(missing_ok=True)  # of a run that was killed before its first checkpoint
        run.tables = {name: MetricsTable(out / name, tables.get(name)) for name in TABLES}
        for table in run.tables.values():
            if table.lost:
                run.say(f"{table.path} has lost {table.lost} of its rows: the training goes on, they do not come back")
    if resume:
        _say_progress(run)
    return run


def _say_progress(run: TrainingRun) -> None:
    epoch, epochs = run.state["epoch"], run.settings.epochs
    if run.is_finished:
        run.say(
            f"{run.out} has trained {format_count(epoch, 'epoch')}, train.epochs={epochs}: nothing is left to train, "
            "a larger train.epochs continues"
        )
    else:
        run.say(f"{run.out} goes on after step {run.state['step']}, in epoch {epoch + 1} of {epochs}")
