"""The training loop: epochs of steps, each epoch followed by a validation and a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from torch import Tensor, nn

from fusedet.engine import checkpoint, rng
from fusedet.engine.interrupt import Interrupted
from fusedet.engine.optim import schedule
from fusedet.engine.recipe import Recipe, precision
from fusedet.engine.run import Loader, Run, Validate, save, setup
from fusedet.engine.watch import NonFinite
from fusedet.errors import unknown
from fusedet.types import Batch, Losses

__all__ = ["Interrupted", "Loader", "NonFinite", "Recipe", "Validate", "fit", "precision"]


def fit(
    fabric: Fabric,
    detector: nn.Module,
    loader: Loader,
    recipe: Recipe,
    *,
    out: Path,
    validate: Validate | None = None,
    resume: bool = False,
    loggers: Sequence[Logger] = (),
    meta: Mapping[str, Any] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a detector; leave last.ckpt, metrics.csv and (with a validation) best.safetensors in the folder `out`.

    detector: a module with `loss(Batch) -> dict of scalar tensors`; afterwards it holds the trained, not the averaged weights.
    fabric: launched; its devices and precision are used. meta: what the checkpoints say about the model; values that are
    not strings become JSON. The validation runs in full precision and sees the averaged weights where there are any.

    Returns epoch, step, best (the monitored metric's highest value, or None) and metrics (of the last validation).
    Raises Interrupted after Ctrl-C or SIGTERM, with last.ckpt written; NonFinite, with the last checkpoint as it was;
    InputError for a folder that already holds a training (without resume), for nothing to resume, and for a full disk. Any other
    failure in one process is raised again after last.ckpt is written, once a step of the epoch is done.
    """
    run = setup(
        fabric, detector, loader, recipe, out=Path(out), validate=validate, resume=resume, loggers=loggers, meta=meta or {}, quiet=quiet
    )
    status = "failed"
    with run.interrupts, run.display, _compiled(detector, recipe.compile):
        try:
            while not _finished(run):
                _train_epoch(run)
                _end_epoch(run)
            status = "success"
        except NonFinite:
            raise
        except Exception:
            # a picture that cannot be read, or a validation that fails, costs none of the steps before it; of several processes
            # the others may not be here to save with
            if run.fabric.world_size == 1 and run.state["position"]:
                save(run)
            raise
        except KeyboardInterrupt:
            save(run)
            raise Interrupted(f"stopped after step {run.state['step']}, all of it is in {run.last}: resume to go on") from None
        finally:
            for logger in run.loggers:
                logger.finalize(status)
    return {key: run.state[key] for key in ("epoch", "step", "best", "metrics")}


def _finished(run: Run) -> bool:
    patience = run.recipe.patience
    return run.state["epoch"] >= run.recipe.epochs or (patience is not None and run.state["stale"] >= patience)


# -- steps


def _train_epoch(run: Run) -> None:
    """The steps of the epoch that are still to come."""
    run.pace.start()
    for batches in _groups(run):
        with run.interrupts.held():
            norm, stop = _train_step(run, batches)
            run.state["step"] += 1
            run.state["position"] += len(batches)
            run.pace.step(sum(len(batch) for batch in batches) * run.fabric.world_size)
            run.display.step(run.state["epoch"] + 1, run.done)
            if run.state["step"] % run.recipe.log_every == 0 or run.done == run.steps_per_epoch:
                _log(run, norm)
        if stop and run.interrupts.agreed:
            raise KeyboardInterrupt


def _train_step(run: Run, batches: list[Batch]) -> tuple[Tensor, bool]:
    """One update of the weights; gives the gradient's norm and whether the processes shall stop."""
    number, stop, parts = run.state["step"] + 1, False, []
    for group in run.optimizer.param_groups:
        group["lr"] = _rate(run) * group["factor"]
    for i, batch in enumerate(batches):
        with run.fabric.no_backward_sync(run.model, enabled=i < len(batches) - 1):
            terms: Losses = run.model(partial(batch.to, run.fabric.device, non_blocking=True))
            loss = _total(terms, run.detector.loss_weights)  # type: ignore[arg-type]
            names, values = [*terms, "loss"], torch.stack([*terms.values(), loss]).detach().float()
            run.watch.look(names, values, number, batch.ids, stop=run.interrupts.requested)
            run.fabric.backward(loss / len(batches))
        stop = run.watch.verdict()
        parts.append(values)

    # without a limit the norm is measured and nothing clipped; fp16's scaler sees to non-finite gradients itself
    limit = run.recipe.clip_norm or math.inf
    norm = run.fabric.clip_gradients(run.model, run.optimizer, max_norm=limit, error_if_nonfinite=False)
    assert norm is not None
    if getattr(run.fabric.strategy.precision, "scaler", None) is None:
        run.watch.gradient(norm, tuple(one for batch in batches for one in batch.ids))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.average:
        run.average.update(run.detector)
    run.meter.add(names, torch.stack(parts).mean(dim=0))
    return norm, stop


def _total(terms: Losses, weights: Mapping[str, float]) -> Tensor:
    """The sum of the loss terms, each with the detector's weight."""
    return torch.stack([value.float() * weights[name] for name, value in terms.items()]).sum()


def _groups(run: Run) -> Iterator[list[Batch]]:
    """The batches of the epoch that are still to come, in lists of as many as a step accumulates."""
    start = run.state["position"]
    if start >= len(run.loader):
        return
    batches = iter(run.loader.epoch(run.state["epoch"], start=start))
    while True:
        with rng.preserved():
            group = list(itertools.islice(batches, run.recipe.accumulate))
        if not group:
            return
        yield group


def _rate(run: Run) -> float:
    """The learning rate of the step that comes next."""
    options, per_epoch = run.recipe.optim, run.steps_per_epoch
    return options.lr * schedule(
        run.state["step"],
        total_steps=run.recipe.epochs * per_epoch,
        steps_per_epoch=per_epoch,
        warmup_steps=options.warmup_steps,
        warmup_ratio=options.warmup_ratio,
        policy=options.policy,
        milestones=options.milestones,
        gamma=options.gamma,
    )


def _log(run: Run, norm: Tensor) -> None:
    """A row of figures: the mean losses since the last row (over the processes too) and the last step's rate and gradient norm."""
    losses = run.meter.read(lambda values: run.fabric.all_reduce(values, reduce_op="mean"))
    losses = {"loss": losses.pop("loss"), **losses}
    rate, gradient, speed = run.optimizer.param_groups[0]["lr"], norm.item(), run.pace.speed()
    _record(run, {"lr": rate, **losses, "grad_norm": gradient, "images_per_second": speed})
    run.display.figures(run.state["epoch"] + 1, run.done, {**losses, "lr": rate, "images/s": speed}, _remaining(run))


def _record(run: Run, figures: Mapping[str, float]) -> None:
    """Write figures of the present step to metrics.csv and to the loggers."""
    if run.table:
        run.table.add({"epoch": run.state["epoch"] + 1, "step": run.state["step"], **figures})
    for logger in run.loggers:
        logger.log_metrics(dict(figures), step=run.state["step"])


def _remaining(run: Run) -> str:
    epoch, recipe = run.state["epoch"], run.recipe
    validations = sum(_due(recipe, number) for number in range(epoch + 1, recipe.epochs + 1)) if run.validate else 0
    return run.pace.remaining(recipe.epochs * run.steps_per_epoch - run.state["step"], validations)


# -- epochs


def _end_epoch(run: Run) -> None:
    """Validate, keep the best weights, and write the checkpoint."""
    epoch = run.state["epoch"] + 1
    metrics = _validated(run, run.validate, epoch) if run.validate and _due(run.recipe, epoch) else None
    with run.interrupts.held():
        if metrics:
            _judge(run, metrics)
        run.state |= {"epoch": epoch, "position": 0}
        save(run)


def _due(recipe: Recipe, epoch: int) -> bool:
    return epoch % recipe.validate_every == 0 or epoch == recipe.epochs


def _validated(run: Run, validate: Validate, epoch: int) -> dict[str, float]:
    """The metrics of the present weights."""
    with run.pace.validation(), rng.preserved(), _evaluating(run.evaluated), torch.no_grad():
        metrics = {name: float(value) for name, value in validate(run.evaluated, epoch).items()}
    metrics = run.fabric.broadcast(metrics)
    if run.recipe.monitor not in metrics:
        raise unknown("metric to monitor", run.recipe.monitor, metrics)
    return metrics


def _judge(run: Run, metrics: dict[str, float]) -> None:
    """Log a validation, and keep the weights if the monitored metric has never been higher."""
    state, value, monitor = run.state, metrics[run.recipe.monitor], run.recipe.monitor
    better = not math.isnan(value) and (state["best"] is None or value > state["best"])
    state |= {"best": value if better else state["best"], "stale": 0 if better else state["stale"] + 1, "metrics": metrics}
    _record(run, metrics)
    figures = " · ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    run.display.say(f"epoch {state['epoch'] + 1}/{run.recipe.epochs}: {figures}{' (best)' if better else ''}")
    if better:
        run.watch.healthy(run.evaluated)
        kind = "ema" if run.average else "model"
        about = {"weights": kind, "epoch": str(state["epoch"] + 1), "step": str(state["step"]), monitor: repr(value)}
        if run.fabric.is_global_zero:
            checkpoint.save_weights(run.best, run.evaluated.state_dict(), run.meta | about)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every part is afterwards in the mode in which it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextlib.contextmanager
def _compiled(detector: nn.Module, wanted: bool) -> Iterator[None]:
    """The detector's forward compiled inside, its own again afterwards."""
    if wanted:
        detector.forward = torch.compile(detector.forward)
    try:
        yield
    finally:
        if wanted:
            del detector.forward
