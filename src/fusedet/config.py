"""YAML with one `base:` parent and dotted key=value overrides become one typed, checked config."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fusedet.errors import InputError, checked, unknown

Spec = str | dict[str, Any]

_SHIPPED = files("fusedet") / "configs"
_SLOTS = ("plugin", "neck", "interact", "head", "roi")
_RENAMED = {"data": "data.path", "model.backbone": "model.backbone.name"}


@dataclass(frozen=True)
class Pyramid:
    """The pyramid that the first neck of a chain makes: P`finest` to P`coarsest`, all of `channels` channels."""

    channels: int = 256
    finest: int = 3
    coarsest: int = 7
    top: Literal["max_pool", "on_input", "on_output"] = "on_input"

    def __post_init__(self) -> None:
        _at_least(1, "model.pyramid", self, "channels")
        _need(self.finest <= self.coarsest, "model.pyramid.finest", self.finest, f"at most model.pyramid.coarsest={self.coarsest}")


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
    """Where the pictures are and how the network sees them."""

    path: str | None = None
    train: str = "train"
    val: str = "val"
    images: str | None = None
    size: tuple[int, int] = (800, 1333)
    multi_scale: tuple[int, int] | None = None
    flip: float = 0.5
    photometric: bool = False
    workers: int = 2

    def __post_init__(self) -> None:
        _need(self.size[0] >= 32, "data.size", self.size, "[short, longest] with a short side of at least 32 pixels")
        _need(self.size[0] <= self.size[1], "data.size", self.size, "[short, longest] with short <= longest")
        if self.multi_scale:
            _need(32 <= self.multi_scale[0] <= self.multi_scale[1], "data.multi_scale", self.multi_scale, "[smallest, largest] short side")
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
    policy: Literal["multistep", "cosine"] = "multistep"
    milestones: tuple[float, ...] = (8, 11)
    gamma: float = 0.1
    warmup_steps: int = 500
    warmup_ratio: float = 0.001
    clip_norm: float | None = None
    ema: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    validate_every: int = 1
    monitor: str = "AP"
    patience: int | None = None
    seed: int = 0
    compile: bool = False
    loggers: tuple[str, ...] = ()
    weights: str | None = None

    def __post_init__(self) -> None:
        _at_least(1, "train", self, "epochs", "batch", "accumulate", "validate_every", "base_batch", "patience")
        _at_least(0, "train", self, "seed", "warmup_steps", "weight_decay")
        for key in ("lr", "gamma", "clip_norm"):
            value = getattr(self, key)
            _need(value is None or 0 < value < math.inf, f"train.{key}", value, "above 0 and finite")
        _need(0 <= self.momentum < 1, "train.momentum", self.momentum, "0 or more and below 1")
        _need(0 < self.warmup_ratio <= 1, "train.warmup_ratio", self.warmup_ratio, "above 0 and at most 1")
        _need(self.batch % self.accumulate == 0, "train.batch", self.batch, f"a multiple of train.accumulate={self.accumulate}")
        _need(self.ema is None or 0 < self.ema < 1, "train.ema", self.ema, "a decay between 0 and 1, or null")
        _need(list(self.milestones) == sorted(self.milestones), "train.milestones", self.milestones, "increasing epochs")


@dataclass(frozen=True)
class Test:
    """How raw outputs become detections."""

    score: float = 0.05
    nms: float = 0.5
    max_det: int = 100
    pre_nms: int = 1000
    batch: int | None = None

    def __post_init__(self) -> None:
        for key in ("score", "nms"):
            _need(0 <= getattr(self, key) <= 1, f"test.{key}", getattr(self, key), "0 to 1")
        _at_least(1, "test", self, "max_det", "pre_nms", "batch")


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
        return dict(_plain(asdict(self)))


def load(name: str | Path, overrides: Sequence[str] = (), sections: Mapping[str, Any] | None = None) -> Config:
    """The config of that name (shipped) or file, with overrides on top.

    overrides: "key=value" texts with dotted keys; list items are addressed by number ("model.neck.0.channels=64");
    `data=PATH` and `model.backbone=NAME` are short for data.path and model.backbone.name.
    sections: the same as nested mappings, {"model": {"neck": ["fpn", "smsl"]}}.
    A schedule (train.schedule=2x) is merged where it is named: above what came before, below what comes after.
    Raises InputError for an unknown config, key or schedule, and for a value of the wrong type.
    """
    tree: dict[str, Any] = _file(_find(name, "models", "config"))
    for section, values in (sections or {}).items():
        tree = _merge(tree, {section: _plain(values)}, f"{section}=")
    return parse(overridden(tree, overrides))


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A nested mapping with "key=value" texts laid over it, as `load` does; the schedule first."""
    pairs = [_parse(text) for text in overrides]
    for key, value in sorted(pairs, key=lambda pair: pair[0] != "train.schedule"):
        tree = _set(tree, key, value)
    return tree


def parse(tree: Mapping[str, Any]) -> Config:
    """A nested mapping as a checked config."""
    return _typed(Config, tree, "")


def replaced(config: Config, **values: Any) -> Config:
    """The same config with other top-level values."""
    return replace(config, **values)


def names(room: str = "models") -> list[str]:
    """The names of the shipped configs."""
    return sorted(p.name.removesuffix(".yaml") for p in (_SHIPPED / room).iterdir() if p.name.endswith(".yaml") and p.name[0] != "_")


def _find(name: str | Path, room: str, kind: str) -> Any:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"there is no config file {path}: give a YAML file, or one of {', '.join(names(room))}")
        return path
    shipped = _SHIPPED / room / f"{name}.yaml"
    if not shipped.is_file():
        raise unknown(kind, name, names(room))
    return shipped


def _file(path: Any, children: tuple[str, ...] = ()) -> dict[str, Any]:
    try:
        own: Any = OmegaConf.to_container(OmegaConf.create(path.read_text(encoding="utf-8")))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, dict):
        raise InputError(f"{path} must be a mapping with model, data, train, test or base")
    base = own.pop("base", None)
    if base is None:
        return _merge({}, own, str(path))
    # a base beside the file wins over a shipped one, so that a folder of configs moves as a whole
    beside = path.parent / f"{base}.yaml"
    parent = beside if beside.is_file() else _find(base, "models", f"base of {path}:")
    if str(parent) in (str(path), *children):
        raise InputError(f"{path} is, through {parent}, its own base")
    return _merge(_file(parent, (str(path), *children)), own, str(path))


def _merge(tree: dict[str, Any], layer: dict[str, Any], source: str) -> dict[str, Any]:
    """Lay one mapping over another; schedules first, slots whose type changes begin anew."""
    layer = dict(layer)
    schedule = layer.get("train", {}).get("schedule") if isinstance(layer.get("train"), Mapping) else None
    if schedule is not None:
        tree = _overlay(tree, _file(_find(schedule, "schedules", f"schedule (train.schedule in {source})")))
    return _overlay(tree, layer)


def _overlay(below: Any, above: Any, key: str = "") -> Any:
    if key in _RENAMED and isinstance(above, str):
        above = {_RENAMED[key].rpartition(".")[2]: above}
    if key.removeprefix("model.") in _SLOTS:
        above, below = _spec(above), _spec(below)
        if isinstance(above, dict) and isinstance(below, dict) and above.get("type", below.get("type")) != below.get("type"):
            return above
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = dict(below)
    for name, value in above.items():
        merged[name] = _overlay(below.get(name), value, f"{key}.{name}" if key else str(name))
    return merged


def _spec(slot: Any) -> Any:
    if isinstance(slot, str):
        return {"type": slot}
    return [_spec(item) for item in slot] if isinstance(slot, (list, tuple)) else slot


def _parse(text: str) -> tuple[str, Any]:
    key, sign, raw = text.partition("=")
    if not sign or not key:
        raise InputError(f"'{text}' is not an override: write key=value, for example train.epochs=24")
    key = _RENAMED.get(key, key).replace("[", ".").replace("]", "")
    if _leaf(Config, key) in (str, str | None):
        return key, None if raw in ("null", "") else raw
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))["value"]  # type: ignore[index, call-overload]
    except (OmegaConfBaseException, YAMLError) as error:
        raise InputError(f"the value of '{text}' is not YAML") from error


def _leaf(schema: Any, key: str) -> Any:
    for part in key.split("."):
        schema = get_type_hints(schema).get(part) if hasattr(schema, "__dataclass_fields__") else None
    return schema


def _set(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Lay one dotted key over the tree; a number addresses an item of a list that is there."""
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(f"{key}: {'.'.join(parts[:depth])} is a list of {len(node)}, address its items by 0 to {len(node) - 1}")
            layer = _nest(parts[depth + 1 :], value)
            item = _spec(node[int(part)])
            node[int(part)] = _overlay(item, _spec(layer), "model.neck")
            return tree
        node = node.get(part) if isinstance(node, dict) else None
    return _merge(tree, _nest(parts, value), f"{key}={value}")


def _nest(parts: list[str], value: Any) -> Any:
    for part in reversed(parts):
        value = {part: value}
    return value


def _typed(schema: Any, tree: Any, key: str) -> Any:
    if not isinstance(tree, Mapping):
        raise InputError(f"{key or 'a config'} must be a mapping with {', '.join(f.name for f in fields(schema))}, got {tree!r}")
    hints = get_type_hints(schema)
    values = {}
    for name, value in tree.items():
        where = f"{key}.{name}" if key else str(name)
        if name not in hints:
            raise unknown("config key", where, (f"{key}.{n}" if key else n for n in hints))
        nested = hasattr(hints[name], "__dataclass_fields__")
        values[name] = _typed(hints[name], value, where) if nested else checked(value, hints[name], where)
    return schema(**values)


def _plain(value: Any) -> Any:
    """Mappings and sequences as plain dicts and lists (YAML knows no tuples)."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def _need(condition: bool, key: str, value: Any, right: str) -> None:
    if not condition:
        shown = list(value) if isinstance(value, tuple) else value
        raise InputError(f"{key}={shown} must be {right}")


def _at_least(least: int, section: str, values: Any, *keys: str) -> None:
    for key in keys:
        value = getattr(values, key)
        _need(value is None or value >= least, f"{section}.{key}", value, f"{least} or more")
