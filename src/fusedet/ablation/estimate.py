"""How long a run will take: its work in multiply-adds times what a unit of work took, in finished runs or in a timed step."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count as count_up
from statistics import fmean, median
from typing import Any

import torch

from fusedet.ablation.plan import TIMES, Plan, Run, Split, read_json
from fusedet.api.predict import pick_device, views
from fusedet.api.train import make_detector, train_transform
from fusedet.api.validate import detect, has_mask_branch, val_loader
from fusedet.data.loader import build_train_loader
from fusedet.errors import InputError

LARGEST = 2  # images of a timed step on a CPU
UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_duration(text: str) -> float:
    """Seconds of a time such as 2h, 90m, 1h30m or 45s.

    >>> parse_duration("1h30m")
    5400.0
    """
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise InputError(f"--budget {text} is no time: write it as 2h, 90m, 1h30m or 45s")
    return float(sum(float(number) * UNITS[unit] for number, unit in parts))


def format_duration(seconds: float) -> str:
    """Seconds for a reader.

    >>> [format_duration(s) for s in (8, 95, 4000, 200000)]
    ['8 s', '2 min', '1 h 7 min', '2 d 7 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


@dataclass
class Clock:
    """Seconds of the runs that were trained without a stop, by their work; what is expected of others.

    work: of every row's run, by its label, see `work`. rate: seconds per unit where no run has finished. basis: what it rests on.
    """

    work: Mapping[str, float]
    seconds: dict[str, list[float]]
    rate: float | None = None
    basis: str = ""

    def expected(self, label: str) -> float | None:
        """Seconds of a run of that row: the mean of its own finished ones, else by the work and the median speed of all."""
        if own := self.seconds.get(label):
            return fmean(own)
        speeds = [one / self.work[name] for name, several in self.seconds.items() for one in several]
        rate = median(speeds) if speeds else self.rate
        return None if rate is None else rate * self.work[label]

    def add(self, cell: Run) -> None:
        """A run has finished: what it took counts, unless it was stopped in between or another machine's."""
        times = read_json(cell.folder / TIMES)
        if times and not times["resumed"] and times["seconds"] is not None:
            self.seconds.setdefault(cell.label, []).append(times["seconds"])


def make_clock(plan: Plan, costs: Mapping[str, Mapping[str, float]]) -> Clock:
    """The clock of a plan, with what its finished runs took."""
    made = Clock({label: count_work(plan, label, costs[label]["multiply_adds"]) for label in plan.configs}, {})
    for label in dict.fromkeys(plan.owners.values()):
        for cell in plan.runs(label):
            made.add(cell)
    if count := sum(map(len, made.seconds.values())):
        made.basis = f"what {count} finished run{'s' * (count > 1)} took; other rows by their multiply-adds"
    return made


def count_work(plan: Plan, label: str, multiply_adds: float) -> float:
    """Multiply-adds of a row's run: a training step is three forward passes, a validation one per view.

    Where the weights of another row are scored, a validation is all there is to do.
    """
    one, (data, val) = plan.configs[label], plan.data[label]
    validations = -(-one.train.epochs // one.train.validate_every) + 1  # the last one scores the best weights
    seen = sum((view.size / one.data.size[0]) ** 2 for view in views(one))
    if plan.owners[label] != plan.trainers[label]:
        return multiply_adds * seen * len(val)
    return multiply_adds * (3 * one.train.epochs * len(data) + validations * seen * len(val))


def time_training_step(plan: Plan, label: str, multiply_adds: float, made: Clock) -> None:
    """Give the clock the speed of one training step and the prediction of the same images, of that row's model from random weights."""
    options, data = plan.configs[label], plan.data[label]
    device = pick_device(options.device)
    count = max(1, options.train.batch // options.train.accumulate)
    count = count if device.type == "cuda" else min(LARGEST, count)
    step, prediction = _seconds(plan, label, data, device, count)
    # the two passes have a rate each; a run mixes them as `work` does
    one = options.train
    steps, checks = one.epochs * len(data[0]), (-(-one.epochs // one.validate_every) + 1) * len(data[1])
    # of a row that only scores another one's weights too: the rate is that of a training
    whole = replace(plan, trainers=plan.owners)
    made.rate = (steps * step + checks * prediction) / count_work(whole, label, multiply_adds)
    made.basis = (
        f"one training step of '{label}' on {device} with {count} images, {step:.3g} s each, and a prediction, {prediction:.3g} s; "
        "other rows by their multiply-adds"
    )


def _seconds(plan: Plan, label: str, data: Split, device: torch.device, count: int) -> tuple[float, float]:
    """Seconds per image of a training step and of a prediction, each after one to warm up."""
    options = plan.configs[label]
    detector: Any = make_detector(options, data[1], lambda text: None, resume=True).to(device).train()
    loader = build_train_loader(data[0], train_transform(options), batch=count, masks=has_mask_branch(detector))
    weights = detector.loss_weights
    batches = (batch for epoch in count_up() for batch in loader.epoch(epoch))
    for _ in range(2):
        began = time.perf_counter()
        terms = detector.loss(next(batches).to(device))
        torch.stack([weights[name] * value for name, value in terms.items()]).sum().backward()
        step = _since(began, device) / count
    alike = replace(options, data=replace(options.data, workers=0), test=replace(options.test, batch=count))
    some = next(iter(val_loader(alike, data[1]))).to(device)
    detector.eval()
    for _ in range(2):
        began = time.perf_counter()
        detect(detector, [some], data[1], device)
        prediction = _since(began, device) / len(some)
    return step, prediction


def _since(began: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
