"""The training loop: epochs of steps, each epoch followed by a validation and a checkpoint."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import Logger
from torch import Tensor, nn

from fusedet.engine import checkpoint, rng, shards
from fusedet.engine.nan_guard import NonFinite
from fusedet.engine.optim import schedule
from fusedet.engine.recipe import Recipe, precision
from fusedet.engine.signals import Interrupted
from fusedet.engine.train_state import TABLES, Loader, Run, Validate, part, save, setup
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
    say: Callable[[str], None] | None = None,
    saved: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Train a detector; leave last.ckpt, metrics.csv, speed.csv and (with a validation) best.safetensors in the folder `out`.

    detector: a module with `loss(Batch) -> dict of scalar tensors`; afterwards it holds the trained, not the averaged weights.
    fabric: launched; its devices and precision are used. meta: what the checkpoints say about the model; values that are
    not strings become JSON. say: takes what is another one since the run was stopped. saved: called
    by the first process when it has written its first checkpoint. The validation runs in full precision and sees the averaged
    weights where there are any.

    Returns epoch, step, best (the monitored metric's highest value, or None) and metrics (of the last validation).
    Raises Interrupted after Ctrl-C or SIGTERM, with last.ckpt written; NonFinite, with the last checkpoint as it was;
    InputError for a folder that already holds a training (without resume), for nothing to resume, and for a full disk. Any other
    failure in one process, or in a validation, is raised again after last.ckpt is written, once a step of the epoch is done.
    """
    run = setup(
        fabric,
        detector,
        loader,
        recipe,
        out=out,
        validate=validate,
        resume=resume,
        loggers=loggers,
        meta=meta or {},
        quiet=quiet,
        say=say,
    )
    run.after_save = saved
    if resume:
        run.say(_standing(run))
    status = "failed"
    with run.interrupts, run.display, _compiled(detector, recipe.compile):
        try:
            with run.interrupts.held():
                while not _finished(run):
                    _train_epoch(run)
                    _end_epoch(run)
            status = "success"
        except NonFinite:
            raise
        except Exception as error:
            # an image that cannot be read, or a validation that fails, costs none of the steps before it; of several processes
            # the others may not be here to save with, unless they have said before the validation what there is to save
            if run.parts or (fabric.world_size == 1 and run.state["position"]):
                save(run)
            if run.parts and run.interrupts.received:
                raise _interrupted(run) from error  # another process has gone first
            raise
        except KeyboardInterrupt:
            if not run.interrupts.forced:
                save(run)
            raise _interrupted(run) from None
        finally:
            for logger in run.loggers:
                logger.finalize(status)
    return {key: run.state[key] for key in ("epoch", "step", "best", "metrics")}


def _standing(run: Run) -> str:
    """Where a resumed run goes on."""
    epoch, epochs = run.state["epoch"], run.recipe.epochs
    if _finished(run):
        return f"{run.out} has ended with epoch {epoch} of {epochs}: nothing is left to train, a larger train.epochs goes on"
    return f"{run.out} goes on after step {run.state['step']}, in epoch {epoch + 1} of {epochs}"


def _interrupted(run: Run) -> Interrupted:
    step, command = run.state["step"], f"fusedet train {run.out} --resume"
    if run.interrupts.forced:
        text = f"stopped at once by a second Ctrl-C after step {step}: {run.last} is what was saved before it; to go on: {command}"
    else:
        text = f"stopped after step {step}, all of it is in {run.last}; to go on: {command}"
    return Interrupted(text, run.interrupts.received or signal.SIGINT)


def _finished(run: Run) -> bool:
    patience = run.recipe.patience
    return run.state["epoch"] >= run.recipe.epochs or (patience is not None and run.state["stale"] >= patience)


# -- steps


def _train_epoch(run: Run) -> None:
    """The steps of the epoch that are still to come."""
    run.pace.start()
    every = run.recipe.checkpoint_every
    for batches in _groups(run):
        norm, stop, due = _train_step(run, batches)
        run.state["step"] += 1
        run.state["position"] += len(batches)
        run.pace.step(sum(len(batch) for batch in batches) * run.fabric.world_size)
        run.display.step(run.state["epoch"] + 1, run.done)
        if run.state["step"] % run.recipe.log_every == 0 or run.done == run.steps_per_epoch:
            _log(run, norm)
        if stop:
            run.interrupts.received = stop
            raise KeyboardInterrupt
        run.interrupts.check()
        if due or (every and every.steps and run.state["step"] % every.steps == 0):
            save(run)


def _train_step(run: Run, batches: list[Batch]) -> tuple[Tensor, int, bool]:
    """One update of the weights; gives the gradient's norm, the signal by which the processes shall stop (or 0), and whether to save."""
    number, stop, due, parts = run.state["step"] + 1, 0, False, []
    for group in run.optimizer.param_groups:
        group["lr"] = _rate(run) * group["factor"]
    for i, batch in enumerate(batches):
        with run.fabric.no_backward_sync(run.model, enabled=i < len(batches) - 1):
            terms: Losses = run.model(partial(batch.to, run.fabric.device, non_blocking=True))
            loss = _total(terms, run.detector.loss_weights)  # type: ignore[arg-type]
            names, values = [*terms, "loss"], torch.stack([*terms.values(), loss]).detach().float()
            run.watch.look(names, values, number, batch.ids, stop=run.interrupts.received, save=run.late)
            run.fabric.backward(loss / len(batches))
        stop, due = run.watch.verdict()
        parts.append(values)

    # without a limit the norm is measured and nothing clipped; fp16's scaler sees to non-finite gradients itself
    limit = run.recipe.clip_norm or math.inf
    norm = run.fabric.clip_gradients(run.model, run.optimizer, max_norm=limit, error_if_nonfinite=False)
    assert norm is not None
    norm = shards.whole(norm)
    if getattr(run.fabric.strategy.precision, "scaler", None) is None:
        run.watch.gradient(norm, tuple(one for batch in batches for one in batch.ids))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.average:
        with shards.gathered(run.model):
            run.average.update(run.detector)
    run.meter.add(names, torch.stack(parts).mean(dim=0))
    return norm, stop, due


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
        with rng.preserved(), contextlib.nullcontext() if run.interrupts.agreed else run.interrupts.open():
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
    _record(run, {"lr": rate, **losses, "grad_norm": gradient}, {"images_per_second": speed})
    run.display.figures(run.state["epoch"] + 1, run.done, {**losses, "lr": rate, "images/s": speed}, _remaining(run))


def _record(run: Run, figures: Mapping[str, float], speed: Mapping[str, float] | None = None) -> None:
    """Write figures of the present step to metrics.csv, how fast it was to speed.csv, and both to the loggers."""
    place = {"epoch": run.state["epoch"] + 1, "step": run.state["step"]}
    # in two files: what the seed decides is the same in every run, the clock is not
    for name, row in zip(TABLES, (figures, speed), strict=True):
        if run.tables and row:
            run.tables[name].add({**place, **row})
    for logger in run.loggers:
        logger.log_metrics({**figures, **(speed or {})}, step=run.state["step"])


def _remaining(run: Run) -> str:
    epoch, recipe = run.state["epoch"], run.recipe
    validations = sum(_due(recipe, number) for number in range(epoch + 1, recipe.epochs + 1)) if run.validate else 0
    return run.pace.remaining(recipe.epochs * run.steps_per_epoch - run.state["step"], validations)


# -- epochs


def _end_epoch(run: Run) -> None:
    """Validate, keep the best weights, and write the checkpoint."""
    epoch = run.state["epoch"] + 1
    if run.validate and _due(run.recipe, epoch):
        run.parts = part(run)
        run.weights = shards.weights(run.detector, run.optimizer) if shards.is_shared(run.model) else None
        _judge(run, _validated(run, run.validate, epoch))
    run.state |= {"epoch": epoch, "position": 0}
    run.parts = run.weights = None
    save(run)
    if run.interrupts.agreed:
        asked = torch.tensor(float(run.interrupts.received), device=run.fabric.device)
        run.interrupts.received = int(run.fabric.all_reduce(asked, reduce_op="max"))  # type: ignore[arg-type]
    if run.interrupts.received:
        raise KeyboardInterrupt


def _due(recipe: Recipe, epoch: int) -> bool:
    return epoch % recipe.validate_every == 0 or epoch == recipe.epochs


def _validated(run: Run, validate: Validate, epoch: int) -> dict[str, float]:
    """The metrics of the present weights."""
    if run.fabric.world_size > 1:
        shards.equal_buffers(run.evaluated)  # each process has seen other images: all judge what the first one keeps
    around = (
        run.pace.validation(),
        rng.preserved(),
        _evaluating(run.evaluated),
        torch.no_grad(),
        shards.gathered(run.model),
    )
    with contextlib.ExitStack() as stack:
        for one in (*around, run.interrupts.open()):
            stack.enter_context(one)
        metrics = {name: float(value) for name, value in validate(run.evaluated, epoch).items()}
    metrics = run.fabric.broadcast(metrics)
    if run.recipe.monitor not in metrics:
        raise unknown("metric to monitor", run.recipe.monitor, metrics)
    return metrics


def _judge(run: Run, metrics: dict[str, float]) -> None:
    """Log a validation, and keep the weights if the monitored metric has never been higher."""
    state, value, monitor = run.state, metrics[run.recipe.monitor], run.recipe.monitor
    better = not math.isnan(value) and (state["best"] is None or value > state["best"])
    if better:
        weights = shards.whole(run.evaluated.state_dict())
        run.watch.healthy(weights)
        kind = "ema" if run.average else "model"
        about = {"weights": kind, "epoch": str(state["epoch"] + 1), "step": str(state["step"]), monitor: repr(value)}
        if run.fabric.is_global_zero:
            checkpoint.save_weights(run.best, weights, run.meta | about)
    _record(run, metrics)
    # last: where a file could not be written, the validation is done again
    state |= {
        "best": value if better else state["best"],
        "stale": 0 if better else state["stale"] + 1,
        "metrics": metrics,
    }
    figures = " · ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    run.display.say(f"epoch {state['epoch'] + 1}/{run.recipe.epochs}: {figures}{' (best)' if better else ''}")


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
