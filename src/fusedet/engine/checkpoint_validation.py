"""The declared content of last.ckpt, and its validation before a training goes on from it.

A file that is whole may still be a wrong one: of another program, or changed by somebody.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from fusedet.errors import InputError

_TWISTER = 624  # numbers in the state of numpy's generator, which would read beyond them from any larger position


def _reject_other_keys(kind: type) -> BeforeValidator:
    """Reject keys of another type before pydantic names them: the text of a nested tuple may have any length."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and not all(type(key) is kind for key in value):
            raise ValueError(f"keys must be {kind.__name__}")
        return value

    return BeforeValidator(check)


T = TypeVar("T")
Count = Annotated[int, Field(ge=0, lt=2**63)]
ByName = Annotated[dict[str, T], _reject_other_keys(str)]
ByNumber = Annotated[dict[int, T], _reject_other_keys(int)]


class MeterState(TypedDict):
    """Running sums of the losses; `sums` is (len(names),)."""

    names: list[str]
    sums: Tensor | None
    steps: Count


class RandomStates(TypedDict):
    """The states that `rng.capture_states` returns."""

    python: tuple[Count, tuple, float | None]
    numpy: tuple[
        str,
        Annotated[list[Count], Field(min_length=_TWISTER, max_length=_TWISTER)],
        Annotated[int, Field(ge=0, le=_TWISTER)],
        Count,
        float,
    ]
    torch: Tensor
    cuda: Tensor | None


class ProcessState(TypedDict):
    """What each process keeps for itself."""

    random: RandomStates
    meter: MeterState


class ParamGroup(TypedDict):
    """A group of an optimizer; its other options come from the settings."""

    params: list[Count]
    lr: float
    momentum: NotRequired[Any]


class OptimizerState(TypedDict):
    """An optimizer's state dict."""

    state: ByNumber[ByName[Tensor]]
    param_groups: list[ParamGroup]


class TableState(TypedDict):
    """How much of a csv file the checkpoint counts."""

    columns: list[str]
    rows: Count


Tables = TypedDict("Tables", {"metrics.csv": TableState, "speed.csv": TableState})


class Checkpoint(BaseModel):
    """The content of last.ckpt; see `train_state.TrainingRun` for the meaning of the plain values."""

    model_config = ConfigDict(strict=True, extra="ignore", arbitrary_types_allowed=True)

    step: Count
    epoch: Count
    position: Count
    best: float | None
    stale: Count
    metrics: ByName[float]
    model: ByName[Tensor]
    optimizer: OptimizerState
    ema: ByName[Tensor] | None
    ema_updates: Count
    scaler: ByName[int | float]
    processes: list[ProcessState]
    tables: Tables
    plan: ByName[bool | int | str | None]
    made_with: ByName[str] = Field(alias="made with")
    meta: ByName[str]


MOMENTS = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}
"""What an optimizer keeps of a weight that it has moved."""


def make_damage_error(path: Path, key: str) -> InputError:
    """Return the error for a checkpoint that is not as `train_state.save` writes it, with the key that is wrong."""
    return InputError(
        f"{path} cannot be resumed: what it holds under '{key}' is not what fusedet writes there, so it is damaged or "
        f"was not written by fusedet; copy it again, or begin a new run with train.weights={path}"
    )


def validate_checkpoint(content: Mapping[str, Any], path: Path) -> Checkpoint:
    """Return the content of a checkpoint in its declared types.

    Raises:
        InputError: It lacks what a training needs to go on, or holds something else in its place.
    """
    try:
        saved = Checkpoint.model_validate(content)
    except ValidationError as error:
        mistakes = error.errors(include_url=False, include_context=False, include_input=False)
        if missing := [str(m["loc"][0]) for m in mistakes if m["type"] == "missing" and len(m["loc"]) == 1]:
            raise InputError(f"{path} cannot be resumed: it holds no {', '.join(sorted(missing))}") from None
        raise make_damage_error(path, ".".join(str(part)[:100] for part in mistakes[0]["loc"])) from None
    meters = [process["meter"] for process in saved.processes]
    if len({(tuple(meter["names"]), meter["steps"]) for meter in meters}) != 1:
        raise make_damage_error(path, "processes")
    for i, meter in enumerate(meters):
        sums = meter["sums"]
        if (sums is None) != (meter["steps"] == 0) or (sums is not None and sums.shape != (len(meter["names"]),)):
            raise make_damage_error(path, f"processes.{i}.meter.sums")
    return saved


def check_position(saved: Checkpoint, batches: int, accumulate: int, path: Path) -> None:
    """Check that step, epoch and position belong together.

    Args:
        saved: The checkpoint.
        batches: Batches of an epoch.
        accumulate: Batches of a step.
        path: The file, for the message.

    Raises:
        InputError: They do not.
    """
    if saved.position > batches:
        raise make_damage_error(path, "position")
    if saved.step != saved.epoch * math.ceil(batches / accumulate) + math.ceil(saved.position / accumulate):
        raise make_damage_error(path, "step")


def check_moments(saved: Checkpoint, name: str, optimizer: Optimizer, path: Path) -> None:
    """Check that the saved moments are those of this optimizer over these weights.

    Args:
        saved: The checkpoint.
        name: Kind of the optimizer, one of `MOMENTS`.
        optimizer: The optimizer.
        path: The file, for the message.

    Raises:
        InputError: They are not.
    """
    state, groups = saved.optimizer["state"], saved.optimizer["param_groups"]
    now = [len(group["params"]) for group in optimizer.param_groups]
    then = [len(group["params"]) for group in groups]
    if now != then:
        raise InputError(
            f"{path} cannot be resumed: it trains {_sizes(then)} tensors of weights, this model has {_sizes(now)}: "
            "use the same options, such as model.backbone.frozen_stages"
        )
    factors = [group.get("momentum") for group in groups]
    is_stateless = any(isinstance(factor, (int, float)) and factor == 0 for factor in factors)  # SGD then keeps nothing
    if saved.step and not (state or is_stateless or saved.scaler):  # fp16's scaler may have skipped every step
        raise make_damage_error(path, "optimizer.state")
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for i, moments in state.items():
        if not 0 <= i < len(weights) or moments.keys() != MOMENTS[name]:
            raise make_damage_error(path, f"optimizer.state.{i}")
        for key, moment in moments.items():
            if moment.shape != (() if key == "step" else weights[i].shape) or not moment.is_floating_point():
                raise make_damage_error(path, f"optimizer.state.{i}.{key}")


def merged_optimizer_state(saved: Checkpoint, optimizer: Optimizer) -> dict[str, Any]:
    """Return the saved moments with momentum and decay as this optimizer has them.

    "lr" is the last step's; each step sets its own.
    """
    own = getattr(optimizer, "optimizer", optimizer).state_dict()["param_groups"]
    # Copies, because tensors of a file may share their memory.
    state = {
        i: {key: value.clone() for key, value in moments.items()} for i, moments in saved.optimizer["state"].items()
    }
    groups = zip(own, saved.optimizer["param_groups"], strict=True)
    return {"state": state, "param_groups": [group | {"lr": then["lr"]} for group, then in groups]}


def _sizes(groups: list[int]) -> str:
    return " + ".join(map(str, groups[:10])) or "no"
