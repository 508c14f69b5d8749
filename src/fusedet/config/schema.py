"""What a config holds: typed, checked when made; each key with its default."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_type_hints

from omegaconf import OmegaConf

from fusedet.config.interval import interval
from fusedet.errors import InputError, checked, unknown


@dataclass(frozen=True)
class Pyramid:
    """The pyramid that the first neck of a chain makes: P`finest` to P`coarsest`, all of `channels` channels."""

    channels: int = 256
    finest: int = 3
    coarsest: int = 7
    top: Literal["max_pool", "on_input", "on_output", "on_input_relu", "on_output_plain"] = "on_input"

    def __post_init__(self) -> None:
        _at_least(1, "model.pyramid", self, "channels")
        _need(
            self.finest <= self.coarsest,
            "model.pyramid.finest",
            self.finest,
            f"at most model.pyramid.coarsest={self.coarsest}",
        )


@dataclass(frozen=True)
class Model:
    """The detector's parts: each slot is a name or {type, options}; the neck may be a list, a chain."""

    backbone: dict = field(default_factory=dict)
    plugin: Any = None
    neck: Any = "fpn"
    interact: Any = None
    head: Any = "retina"
    roi: Any = None
    pyramid: Pyramid = field(default_factory=Pyramid)


@dataclass(frozen=True)
class Data:
    """Where the images are and how the network sees them."""

    path: str | None = None
    train: str = "train"
    val: str = "val"
    images: str | None = None
    size: tuple[int, int] = (800, 1333)
    multi_scale: tuple[int, int] | None = None
    flip: float = 0.5
    photometric: bool = False
    antialias: bool = True
    workers: int = 2
    check: bool = True

    def __post_init__(self) -> None:
        _need(self.size[0] >= 32, "data.size", self.size, "[short, longest] with a short side of at least 32 pixels")
        _need(self.size[0] <= self.size[1], "data.size", self.size, "[short, longest] with short <= longest")
        if self.multi_scale:
            _need(
                32 <= self.multi_scale[0] <= self.multi_scale[1],
                "data.multi_scale",
                self.multi_scale,
                "[smallest, largest] short side",
            )
        _need(0 <= self.flip <= 1, "data.flip", self.flip, "a probability, 0 to 1")
        _at_least(0, "data", self, "workers")


@dataclass(frozen=True)
class Train:
    """The recipe. `batch` is the total over all processes and accumulated steps; `lr` belongs to a batch of `base_batch`."""

    schedule: str | None = None
    epochs: int = 12
    batch: int = 16
    accumulate: int = 1
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.01
    base_batch: int | None = 16
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay_norm_and_bias: bool = True
    decay_bias: bool = True
    bias_lr: float = 1.0
    policy: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (8, 11)
    gamma: float = 0.1
    warmup_steps: int = 500
    warmup_ratio: float = 0.001
    clip_norm: float | None = None
    ema: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    validate_every: int = 1
    checkpoint_every: str | int | None = None
    monitor: str = "AP"
    patience: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    max_bad_images: float = 0.01
    seed: int = 0
    deterministic: bool = False
    compile: bool = False
    loggers: tuple[str, ...] = ()
    weights: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, "train", self, "epochs", "batch", "accumulate", "validate_every", "base_batch", "patience")
        _at_least(0, "train", self, "seed", "warmup_steps", "weight_decay")
        for key in ("lr", "gamma", "clip_norm", "bias_lr"):
            value = getattr(self, key)
            _need(value is None or 0 < value < math.inf, f"train.{key}", value, "above 0 and finite")
        _need(
            0 <= self.max_bad_images <= 1, "train.max_bad_images", self.max_bad_images, "a share of the images, 0 to 1"
        )
        _need(0 <= self.momentum < 1, "train.momentum", self.momentum, "0 or more and below 1")
        _need(0 < self.warmup_ratio <= 1, "train.warmup_ratio", self.warmup_ratio, "above 0 and at most 1")
        if self.checkpoint_every is not None:
            interval(self.checkpoint_every, "train.checkpoint_every")
        _need(
            self.batch % self.accumulate == 0,
            "train.batch",
            self.batch,
            f"a multiple of train.accumulate={self.accumulate}",
        )
        _need(self.ema is None or 0 < self.ema < 1, "train.ema", self.ema, "a decay between 0 and 1, or null")
        _need(
            list(self.milestones) == sorted(self.milestones), "train.milestones", self.milestones, "increasing epochs"
        )


@dataclass(frozen=True)
class Test:
    """How raw outputs become detections. Each image is seen at all `scales`, short sides, data.size's where there are none."""

    score: float = 0.05
    nms: float = 0.5
    max_det: int = 100
    pre_nms: int = 1000
    batch: int | None = None
    scales: tuple[int, ...] | None = None
    flip: bool = False

    def __post_init__(self) -> None:
        for key in ("score", "nms"):
            _need(0 <= getattr(self, key) <= 1, f"test.{key}", getattr(self, key), "0 to 1")
        _at_least(1, "test", self, "max_det", "pre_nms", "batch")
        if self.scales is not None:
            good = self.scales and min(self.scales) >= 32 and len(set(self.scales)) == len(self.scales)
            _need(
                bool(good),
                "test.scales",
                self.scales,
                "different short sides of at least 32 pixels, such as [600, 800, 1000], or null",
            )


@dataclass(frozen=True)
class Config:
    """Everything that a run needs. `device` is "auto", "cpu", "cuda", "cuda:1", ..."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    test: Test = field(default_factory=Test)
    device: str = "auto"
    out: str | None = None

    def to_yaml(self) -> str:
        """The resolved config: enough, alone, to run the same again."""
        return OmegaConf.to_yaml(OmegaConf.create(self.tree()))

    def tree(self) -> dict[str, Any]:
        """The same as nested dicts and lists."""
        return dict(plain(asdict(self)))


def parse(tree: Mapping[str, Any]) -> Config:
    """A nested mapping as a checked config. Raises InputError for an unknown key (the nearest is offered) or a wrong value."""
    return _typed(Config, tree, "")


def _typed(schema: Any, tree: Any, key: str) -> Any:
    if not isinstance(tree, Mapping):
        raise InputError(
            f"{key or 'a config'} must be a mapping with {', '.join(f.name for f in fields(schema))}, got {tree!r}"
        )
    hints = get_type_hints(schema)
    values = {}
    for name, value in tree.items():
        where = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise unknown("config key", where, (f"{key}.{n}" if key else n for n in hints), meant=_meant(where))
        nested = hasattr(hints[name], "__dataclass_fields__")
        values[name] = _typed(hints[name], value, where) if nested else checked(value, hints[name], where)
    return schema(**values)


def _meant(key: str) -> list[str]:
    """The keys that an unknown one may stand for: in its own section, else in any, those of its last name or, but for a letter, nearly."""
    section, _, name = key.rpartition(".")
    by_name: dict[str, list[str]] = {}
    for path in _paths(Config, ""):
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    found = [path for near in get_close_matches(name, by_name, n=1, cutoff=0.8) for path in by_name[near]]
    return [path for path in found if path.rpartition(".")[0] == section] or found


def _paths(schema: Any, section: str) -> Iterator[str]:
    for name, hint in get_type_hints(schema).items():
        yield f"{section}{name}"
        if hasattr(hint, "__dataclass_fields__"):
            yield from _paths(hint, f"{section}{name}.")


def plain(value: Any) -> Any:
    """Mappings and sequences as plain dicts and lists (YAML knows no tuples)."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _need(condition: bool, key: str, value: Any, right: str) -> None:
    if not condition:
        shown = list(value) if isinstance(value, tuple) else value
        raise InputError(f"{key}={shown} must be {right}")


def _at_least(least: int, section: str, values: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        _need(value is None or value >= least, f"{section}.{key}", value, f"{least} or more")
