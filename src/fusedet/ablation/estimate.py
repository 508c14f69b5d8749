"""Estimated duration of runs: their multiply-adds times the speed of finished runs or of a timed training step."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count as count_up
from statistics import fmean, median

import torch

from fusedet.ablation.plan import FAILED, TIMES, Plan, Run, Split
from fusedet.api.detection import build_tta_transforms
from fusedet.api.detector_evaluation import build_val_loader, detect, has_mask_branch
from fusedet.api.predictor import pick_device
from fusedet.api.run_dir import read_json
from fusedet.api.train_inputs import make_detector, train_transform, training_images
from fusedet.config import Config, to_seconds
from fusedet.data.class_balance import compute_repeat_factors, count_entries
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import build_train_loader
from fusedet.data.tiling import count_windows
from fusedet.errors import InputError, format_count
from fusedet.models.ops.losses import sum_losses

MAX_CPU_IMAGES = 2  # batch of a timed step on a CPU


def parse_duration(text: str) -> float:
    """Parse a duration such as 2h, 90m, 1h30m or 45s into seconds.

    Raises:
        InputError: The text is not a duration.

    >>> parse_duration("1h30m")
    5400.0
    """
    seconds = to_seconds(text)
    if seconds is None:
        raise InputError(f"--budget {text} is not a duration: write it as 2h, 90m, 1h30m or 45s")
    return seconds


@dataclass
class Clock:
    """Durations of finished runs, and the estimated durations of others.

    Attributes:
        work: Work of one run of every row, by label; see `count_work`.
        seconds: Durations of the runs that were trained without interruption, by label.
        rate: Seconds per unit of work while no run has finished.
        basis: What the estimate is based on, as text.
    """

    work: Mapping[str, float]
    seconds: dict[str, list[float]]
    rate: float | None = None
    basis: str = ""

    def expected(self, label: str) -> float | None:
        """Estimate the seconds of a run: the mean of the row's finished runs, else its work times the median rate."""
        if own := self.seconds.get(label):
            return fmean(own)
        rates = [value / self.work[name] for name, values in self.seconds.items() for value in values]
        rate = median(rates) if rates else self.rate
        return None if rate is None else rate * self.work[label]

    def add(self, run: Run) -> None:
        """Add the duration of a run, unless it has not finished, has failed, or was interrupted before."""
        if (run.folder / FAILED).is_file() or read_json(run.folder / "metrics.json") is None:
            return
        times = read_json(run.folder / TIMES)
        if times and not times["resumed"] and times["seconds"] is not None:
            self.seconds.setdefault(run.label, []).append(times["seconds"])


def make_clock(plan: Plan, costs: Mapping[str, Mapping[str, float]]) -> Clock:
    """Make the clock of a plan from its finished runs."""
    clock = Clock({label: count_work(plan, label, costs[label]["multiply_adds"]) for label in plan.configs}, {})
    for label in dict.fromkeys(plan.runs_of.values()):
        for run in plan.runs(label):
            clock.add(run)
    if count := sum(map(len, clock.seconds.values())):
        clock.basis = f"{format_count(count, 'finished run')}; other rows by their multiply-adds"
    return clock


def count_work(plan: Plan, label: str, multiply_adds: float) -> float:
    """Count the multiply-adds of a row's run.

    A training step counts as three forward passes, a validation as one per copy of test-time
    augmentation. A row that uses the weights of another row has a validation only.
    """
    options, (train, val) = plan.configs[label], plan.data[label]
    area = sum((transform.size / options.data.size[0]) ** 2 for transform in build_tta_transforms(options))
    validation = area * sum(count_windows(val, options.test.tiles))
    if plan.runs_of[label] != plan.weights_of[label]:
        return multiply_adds * validation
    steps = 3 * options.train.epochs * _count_epoch(options, train)
    return multiply_adds * (steps + _count_validations(options) * validation)


def time_training_step(plan: Plan, label: str, multiply_adds: float, clock: Clock) -> None:
    """Set the clock's rate by timing one training step and one prediction of a row's model with random weights.

    Args:
        plan: The ablation.
        label: The row to time.
        multiply_adds: Of the row's model on one image.
        clock: Its `rate` and `basis` are set.
    """
    options, data = plan.configs[label], plan.data[label]
    device = pick_device(options.device)
    count = max(1, options.train.total_batch // options.train.accumulate)
    count = count if device.type == "cuda" else min(MAX_CPU_IMAGES, count)
    step, prediction = _measure_seconds(plan, label, data, device, count)
    windows = sum(count_windows(data[1], options.test.tiles))
    # Step and prediction have a rate each; a run mixes them as `count_work` does.
    images = options.train.epochs * _count_epoch(options, data[0])
    seconds = images * step + _count_validations(options) * windows * prediction
    # The rate is that of a training, even if this row only uses another row's weights.
    all_trained = replace(plan, weights_of=plan.runs_of)
    clock.rate = seconds / count_work(all_trained, label, multiply_adds)
    clock.basis = (
        f"one training step of '{label}' on {device} with {count} images, {step:.3g} s each, and a prediction, "
        f"{prediction:.3g} s; other rows by their multiply-adds"
    )


def _count_epoch(options: Config, train: DetectionDataset) -> int:
    """Count the images or tiles of an epoch, with the repetitions of train.balance."""
    images = training_images(options, train)
    if options.train.balance is None:
        return len(images)
    return count_entries(compute_repeat_factors(images, options.train.balance))


def _count_validations(options: Config) -> int:
    """Count the validations of a training; of several, the best may not be the last one and is then repeated."""
    count = -(-options.train.epochs // options.train.validate_every)
    return count + (count > 1)


def _measure_seconds(plan: Plan, label: str, data: Split, device: torch.device, count: int) -> tuple[float, float]:
    """Measure the seconds per image of a training step and of a prediction, each after a warm-up."""
    options = plan.configs[label]
    detector = make_detector(options, data[1], lambda text: None, resume=True).to(device).train()
    images = training_images(options, data[0])
    loader = build_train_loader(images, train_transform(options), batch=count, masks=has_mask_branch(detector))
    batches = (batch for epoch in count_up() for batch in loader.epoch(epoch))
    for _ in range(2):
        start = time.perf_counter()
        terms = detector.loss(next(batches).to(device))
        sum_losses(terms, detector.loss_weights).backward()
        step = _seconds_since(start, device) / count
    few = options.replace(data=options.data.replace(workers=0), test=options.test.replace(batch=count))
    batch = next(iter(build_val_loader(few, data[1]))).to(device)
    detector.eval()
    for _ in range(2):
        start = time.perf_counter()
        detect(detector, [batch], data[1], device)
        prediction = _seconds_since(start, device) / len(batch)
    return step, prediction


def _seconds_since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
