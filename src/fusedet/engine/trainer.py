"""The training loop: epochs of steps, each epoch followed by a validation and a checkpoint.

Read it from `fit` downwards: `_train_epoch` -> `_train_step`, then `_end_epoch` -> `_validate` -> `_keep_best`.
"""

import contextlib
import itertools
import math
import signal
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn

from fusedet.config import Train
from fusedet.engine import checkpoint, rng
from fusedet.engine.optim import lr_factor
from fusedet.engine.setup import setup
from fusedet.engine.signals import Interrupted
from fusedet.engine.train_state import TABLES, Loader, TrainingRun, Validate, gather_process_states, save
from fusedet.errors import DivergenceError, make_unknown_error
from fusedet.models.detectors import TwoStage
from fusedet.models.ops.losses import sum_losses
from fusedet.models.protocols import EpochDependent
from fusedet.types import Batch, Losses

__all__ = ["Interrupted", "Loader", "TrainingRun", "Validate", "fit", "setup"]


def fit(run: TrainingRun) -> dict[str, Any]:
    """Train the detector of a run that `setup` has made.

    The run directory then holds last.ckpt, metrics.csv, speed.csv and, with a validation, best.safetensors. The
    detector holds the trained weights, not the averaged ones. The validation runs in full precision, on the averaged
    weights where there are any. Every process calls this.

    Returns:
        `epoch`, `step`, `best` (the monitored metric's highest value, or None) and `metrics` (of the last validation).

    Raises:
        Interrupted: After Ctrl-C or SIGTERM, with last.ckpt written.
        DivergenceError: A loss, gradient or weight is not finite; last.ckpt stays as it was.
        StorageError: A file cannot be written; the previous one is still whole.
        Exception: Any other failure of a step or a validation. In one process, last.ckpt is written first.
    """
    status = "failed"
    with run.interrupts, run.display, _compiled(run.detector, run.settings):
        try:
            with run.interrupts.held():
                while not run.is_finished:
                    _train_epoch(run)
                    _end_epoch(run)
            status = "success"
        except DivergenceError:
            raise
        except Exception as error:
            # An unreadable image or a failing validation costs none of the steps before it. Other processes may not be
            # here to save with, unless they have given their states before the validation.
            if run.process_states or (run.fabric.world_size == 1 and run.state["position"]):
                save(run)
            if run.process_states and run.interrupts.received:
                raise _interrupted(run) from error  # the signal has ended another process first
            raise
        except KeyboardInterrupt:
            if not run.interrupts.forced:
                save(run)
            raise _interrupted(run) from None
        finally:
            for logger in run.loggers:
                logger.finalize(status)
    return {key: run.state[key] for key in ("epoch", "step", "best", "metrics")}


def _interrupted(run: TrainingRun) -> Interrupted:
    step, command = run.state["step"], f"fusedet train {run.out} --resume"
    if run.interrupts.forced:
        text = (
            f"stopped at once by a second Ctrl-C after step {step}: {run.last} is what was saved before it; "
            f"to go on: {command}"
        )
    else:
        text = f"stopped after step {step}, all of it is in {run.last}; to go on: {command}"
    return Interrupted(text, run.interrupts.received or signal.SIGINT)


# -- steps


def _train_epoch(run: TrainingRun) -> None:
    """Do the remaining steps of the epoch."""
    for module in {run.detector, run.eval_module}:  # the averaged copy computes the losses of a validation
        for part in module.modules():
            if isinstance(part, EpochDependent):
                part.set_epoch(run.state["epoch"])
    run.pace.start()
    every = run.checkpoint_every.steps
    for batches in _accumulation_groups(run):
        norm, stop, due = _train_step(run, batches)
        run.state["step"] += 1
        run.state["position"] += len(batches)
        run.pace.step(sum(len(batch) for batch in batches) * run.fabric.world_size)
        run.display.step(run.state["epoch"] + 1, run.done)
        if run.state["step"] % run.log_every == 0 or run.done == run.steps_per_epoch:
            _log(run, norm)
        if stop:
            run.interrupts.received = stop
            raise KeyboardInterrupt
        run.interrupts.check()
        if due or (every and run.state["step"] % every == 0):
            save(run)


def _train_step(run: TrainingRun, batches: list[Batch]) -> tuple[Tensor, int, bool]:
    """Update the weights once.

    Returns:
        The gradient's norm, the signal that asks all processes to stop (0: none), and whether a checkpoint is due.
    """
    number, stop, due, parts = run.state["step"] + 1, 0, False, []
    for group in run.optimizer.param_groups:
        group["lr"] = _learning_rate(run) * group["factor"]
    for i, batch in enumerate(batches):
        with run.fabric.no_backward_sync(run.model, enabled=i < len(batches) - 1):
            terms: Losses = run.model(partial(batch.to, run.fabric.device, non_blocking=True))
            loss = sum_losses(terms, run.detector.loss_weights)
            names, values = [*terms, "loss"], torch.stack([*terms.values(), loss]).detach().float()
            run.guard.check_losses(
                names, values, number, batch.ids, stop=run.interrupts.received, save=run.is_checkpoint_due
            )
            run.fabric.backward(loss / len(batches))
        stop, due = run.guard.wait()
        parts.append(values)

    # Without a limit the norm is measured and nothing clipped. fp16's scaler handles non-finite gradients itself.
    limit = run.settings.clip_norm or math.inf
    norm = run.fabric.clip_gradients(run.model, run.optimizer, max_norm=limit, error_if_nonfinite=False)
    assert norm is not None
    if getattr(run.fabric.strategy.precision, "scaler", None) is None:
        run.guard.check_gradient(norm, tuple(image_id for batch in batches for image_id in batch.ids))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.ema:
        run.ema.update(run.detector)
    run.meter.add(names, torch.stack(parts).mean(dim=0))
    return norm, stop, due


def _accumulation_groups(run: TrainingRun) -> Iterator[list[Batch]]:
    """Yield the remaining batches of the epoch, in lists of as many as a step accumulates."""
    start = run.state["position"]
    if start >= len(run.loader):
        return
    batches = iter(run.loader.epoch(run.state["epoch"], start=start))
    while True:
        with rng.preserve_states(), contextlib.nullcontext() if run.interrupts.agreed else run.interrupts.open():
            group = list(itertools.islice(batches, run.settings.accumulate))
        if not group:
            return
        yield group


def _learning_rate(run: TrainingRun) -> float:
    """Return the learning rate of the next step."""
    per_epoch = run.steps_per_epoch
    total = run.settings.epochs * per_epoch
    return run.lr * lr_factor(run.state["step"], run.settings, total_steps=total, steps_per_epoch=per_epoch)


def _log(run: TrainingRun, norm: Tensor) -> None:
    """Log the mean losses since the last row, over the processes too, and the last step's rate and gradient norm."""
    losses = run.meter.pop_means(lambda values: run.fabric.all_reduce(values, reduce_op="mean"))
    losses = {"loss": losses.pop("loss"), **losses}
    rate, gradient, speed = run.optimizer.param_groups[0]["lr"], norm.item(), run.pace.speed()
    _record(run, {"lr": rate, **losses, "grad_norm": gradient}, {"images_per_second": speed})
    run.display.show(run.state["epoch"] + 1, run.done, {**losses, "lr": rate, "images/s": speed}, _remaining(run))


def _record(run: TrainingRun, metrics: Mapping[str, float], speed: Mapping[str, float] | None = None) -> None:
    """Write metrics of the present step to metrics.csv, its speed to speed.csv, and both to the loggers."""
    place = {"epoch": run.state["epoch"] + 1, "step": run.state["step"]}
    # Two files, because the seed decides the metrics and the clock the speed: metrics.csv is the same in every run.
    for name, row in zip(TABLES, (metrics, speed), strict=True):
        if run.tables and row:
            run.tables[name].add({**place, **row})
    for logger in run.loggers:
        logger.log_metrics({**metrics, **(speed or {})}, step=run.state["step"])


def _remaining(run: TrainingRun) -> str:
    epoch, settings = run.state["epoch"], run.settings
    epochs = range(epoch + 1, settings.epochs + 1)
    validations = sum(_is_validated(settings, number) for number in epochs) if run.validate else 0
    return run.pace.remaining(settings.epochs * run.steps_per_epoch - run.state["step"], validations)


# -- epochs


def _end_epoch(run: TrainingRun) -> None:
    """Validate, keep the best weights, and write the checkpoint."""
    epoch = run.state["epoch"] + 1
    if run.validate and _is_validated(run.settings, epoch):
        run.process_states = gather_process_states(run)
        _keep_best(run, _validate(run, run.validate, epoch))
    run.state |= {"epoch": epoch, "position": 0}
    run.process_states = None
    save(run)
    if run.interrupts.agreed:
        asked = torch.tensor(float(run.interrupts.received), device=run.fabric.device)
        run.interrupts.received = int(run.fabric.all_reduce(asked, reduce_op="max"))  # type: ignore[arg-type]
    if run.interrupts.received:
        raise KeyboardInterrupt


def _is_validated(settings: Train, epoch: int) -> bool:
    return epoch % settings.validate_every == 0 or epoch == settings.epochs


def _validate(run: TrainingRun, validate: Validate, epoch: int) -> dict[str, float]:
    """Return the metrics of the present weights."""
    if run.fabric.world_size > 1:
        for buffer in run.eval_module.buffers():  # they differ, because each process has seen other images
            distributed.broadcast(buffer, 0)
    with (
        run.pace.validation(),
        rng.preserve_states(),
        _evaluating(run.eval_module),
        torch.no_grad(),
        run.interrupts.open(),
    ):
        metrics = {name: float(value) for name, value in validate(run.eval_module, epoch).items()}
    metrics = run.fabric.broadcast(metrics)
    if run.settings.monitor not in metrics:
        raise make_unknown_error("metric to monitor", run.settings.monitor, metrics)
    return metrics


def _keep_best(run: TrainingRun, metrics: dict[str, float]) -> None:
    """Log a validation, and save the weights if the monitored metric has never been higher."""
    state, monitor = run.state, run.settings.monitor
    value = metrics[monitor]
    improved = not math.isnan(value) and (state["best"] is None or value > state["best"])
    if improved:
        weights = run.eval_module.state_dict()
        run.guard.check_weights(weights)
        kind = "ema" if run.ema else "model"
        about = {"weights": kind, "epoch": str(state["epoch"] + 1), "step": str(state["step"]), monitor: repr(value)}
        if run.fabric.is_global_zero:
            checkpoint.save_weights(run.best, weights, run.meta | about)
    _record(run, metrics)
    # Last: where a file could not be written, the validation is done again.
    state |= {
        "best": value if improved else state["best"],
        "stale": 0 if improved else state["stale"] + 1,
        "metrics": metrics,
    }
    text = " · ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    run.display.say(f"epoch {state['epoch'] + 1}/{run.settings.epochs}: {text}{' (best)' if improved else ''}")


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode inside; restore the mode of every part afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextlib.contextmanager
def _compiled(detector: nn.Module, settings: Train) -> Iterator[None]:
    """Compile the forward pass inside, not the loss; restore it afterwards.

    Of a two-stage detector, backbone, neck and proposal head are compiled, whose loss does not call `forward`.
    """
    parts: list[nn.Module] = []
    if settings.compile:
        names = ("backbone", "neck", "head") if isinstance(detector, TwoStage) else ("",)
        parts = [detector.get_submodule(name) for name in names]
    for part in parts:
        part.forward = torch.compile(part.forward, mode="reduce-overhead" if settings.cuda_graphs else None)
    try:
        yield
    finally:
        for part in parts:
            del part.forward
