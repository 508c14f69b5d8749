"""What last.ckpt holds, and the look at one before a training goes on from it: a file that is whole may still be a wrong one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

from torch import Tensor

from fusedet.errors import InputError


class Count(int):
    """A whole number from 0 on, as a form."""


PLAIN = str | int | float | bool | None
METER = {"names": [str], "sums": Tensor | None, "steps": Count}
NUMPY = (str, [Count], Count, Count, float)
RANDOM = {"python": (int, tuple, float | None), "numpy": NUMPY, "torch": Tensor, "cuda": Tensor | None}
TABLE = {"columns": [str], "rows": Count}
FORM = {
    "step": Count,
    "epoch": Count,
    "position": Count,
    "best": float | None,
    "stale": Count,
    "metrics": dict[str, float],
    "model": dict[str, Tensor],
    "optimizer": {"state": dict[int, dict[str, Tensor]], "param_groups": [{"params": [Count], "lr": float}]},
    "ema": dict[str, Tensor] | None,
    "ema_updates": Count,
    "scaler": dict[str, float],
    "processes": [{"random": RANDOM, "meter": METER}],
    "tables": {"metrics.csv": TABLE, "speed.csv": TABLE},
    "plan": dict[str, PLAIN],
    "made with": dict[str, str],
    "meta": dict[str, str],
}
"""A dict has these keys, a list any number of such items, a tuple these items; else a type, a mapping's types, or one of several."""
MOMENTS = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
"""What an optimiser keeps of a weight that it has moved."""
_WEIGHTS = {"model", "ema", "ema_updates", "meta"}  # what files of weights have too, from which no training goes on
_TWISTER = 624  # numbers in the state of numpy's generator, which would read on from any place, behind them too


def damaged(path: Path, what: str) -> InputError:
    """The error for a checkpoint that is not as `run.save` writes it."""
    return InputError(
        f"{path} cannot be resumed: what it holds under '{what}' is not what fusedet writes there, so it is damaged or was not written by "
        f"fusedet; copy it again, or begin a new run with train.weights={path}"
    )


def check(saved: Mapping[str, Any], path: Path) -> None:
    """Raises InputError for a checkpoint that lacks what a training needs to go on, or holds something else in its place."""
    if lacking := FORM.keys() - _WEIGHTS - saved.keys():
        raise InputError(f"{path} cannot be resumed: it holds no {', '.join(sorted(lacking))}")
    if wrong := next(_wrong(dict(saved), FORM, ""), None):
        raise damaged(path, wrong)
    everyone = saved["processes"]
    if not everyone or len({(tuple(one["meter"]["names"]), one["meter"]["steps"]) for one in everyone}) > 1:
        raise damaged(path, "processes")
    for i, one in enumerate(everyone):
        meter, (_, numbers, place, _, _) = one["meter"], one["random"]["numpy"]
        sums = meter["sums"]
        if (sums is None) != (meter["steps"] == 0) or (sums is not None and sums.shape != (len(meter["names"]),)):
            raise damaged(path, f"processes.{i}.meter.sums")
        if len(numbers) != _TWISTER or place > _TWISTER:
            raise damaged(path, f"processes.{i}.random.numpy")


def check_place(saved: Mapping[str, Any], batches: int, accumulate: int, path: Path) -> None:
    """Raises InputError where step, epoch and position are not of one moment, in epochs of so many batches."""
    position = saved["position"]
    if position > batches:
        raise damaged(path, "position")
    if saved["step"] != saved["epoch"] * math.ceil(batches / accumulate) + math.ceil(position / accumulate):
        raise damaged(path, "step")


def check_moments(saved: Mapping[str, Any], name: str, optimizer: Any, path: Path) -> None:
    """Raises InputError where the saved optimiser's state is not one of this optimiser, of that name, over these weights."""
    state = saved["optimizer"]
    own, then = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if own != then:
        raise InputError(
            f"{path} cannot be resumed: it trains {_many(then)} tensors of weights, this model has {_many(own)}: use the same options, "
            "such as model.backbone.frozen_stages"
        )
    factors = [group.get("momentum") for group in state["param_groups"]]
    still = any(isinstance(one, (int, float)) and one == 0 for one in factors)  # SGD then keeps nothing
    if saved["step"] and not (state["state"] or still or saved["scaler"]):  # fp16's scaler may have left out every step
        raise damaged(path, "optimizer.state")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for i, moments in state["state"].items():
        if not 0 <= i < len(weights) or moments.keys() != MOMENTS[name]:
            raise damaged(path, f"optimizer.state.{i}")
        for key, moment in moments.items():
            if moment.shape != (() if key == "step" else weights[i].shape) or not moment.is_floating_point():
                raise damaged(path, f"optimizer.state.{i}.{key}")


def moved(saved: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """The saved optimiser's state with momentum and decay as this optimiser has them; "lr" is the last step's, each step sets its own."""
    state, groups = saved["optimizer"]["state"], saved["optimizer"]["param_groups"]
    own = getattr(optimizer, "optimizer", optimizer).state_dict()["param_groups"]
    # copies, because tensors of a file may share their memory
    copies = {i: {key: value.clone() for key, value in one.items()} for i, one in state.items()}
    return {
        "state": copies,
        "param_groups": [mine | {"lr": then["lr"]} for mine, then in zip(own, groups, strict=True)],
    }


def _many(groups: list[int]) -> str:
    return " + ".join(map(str, groups[:10])) or "no"


def _wrong(value: Any, form: Any, key: str) -> Iterator[str]:
    """The keys under which a value has not its form."""
    if isinstance(form, dict) and isinstance(value, dict):
        for name, inner in form.items():
            below = f"{key}.{name}".lstrip(".")
            yield from _wrong(value[name], inner, below) if name in value else (below,)
    elif isinstance(form, list) and isinstance(value, list):
        for i, one in enumerate(value):
            yield from _wrong(one, form[0], f"{key}.{i}")
    elif isinstance(form, tuple) and isinstance(value, tuple) and len(form) == len(value):
        for i, (one, inner) in enumerate(zip(value, form)):
            yield from _wrong(one, inner, f"{key}.{i}")
    elif get_origin(form) is dict and isinstance(value, dict):
        kind, inner = get_args(form)
        for name, one in value.items():
            yield from _wrong(one, inner, f"{key}.{str(name)[:100]}") if _is(name, kind) else (key,)
    elif isinstance(form, UnionType):
        if all(any(True for _ in _wrong(value, option, key)) for option in get_args(form)):
            yield key
    elif not _is(value, form):
        yield key


def _is(value: Any, form: Any) -> bool:
    if form in (Count, int, float) and type(value) is int:
        return abs(value) < 2**63 and (value >= 0 or form is not Count)
    return isinstance(form, type) and isinstance(value, form) and form is not int
