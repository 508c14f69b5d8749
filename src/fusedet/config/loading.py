"""YAML with one `base:` parent and dotted key=value overrides become one config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fusedet.config.schema import Config, parse, plain
from fusedet.errors import InputError, nearest, unknown

_SHIPPED = files("fusedet") / "configs"
_LISTER = "fusedet info"
BACKBONES = {
    "r18": "resnet18.tv_in1k",
    "r50": "resnet50.tv_in1k",
    "r101": "resnet101.tv_in1k",
    "x101_32x4d": "resnext101_32x4d.gluon_in1k",
    "x101_64x4d": "resnext101_64x4d.tv_in1k",
}
"""timm's backbones by their short names: `retinanet_r101` is retinanet_BACKBONE.yaml with the backbone of `r101`."""
_PLACEHOLDER = "BACKBONE"
_SLOTS = ("plugin", "neck", "interact", "head", "roi")
LONGEST, LARGEST = 2**20, 100_000
"""Characters and, with every alias written out, values that a YAML text may have: the longest shipped config has a few hundred values."""
_RENAMED = {"data": "data.path", "model.backbone": "model.backbone.name"}


def load(
    name: str | Path,
    overrides: Sequence[str] = (),
    sections: Mapping[str, Any] | None = None,
    *,
    trust: bool = True,
    kind: str = "config",
    folder: Any = None,
) -> Config:
    """Resolve a shipped config or a YAML file, with overrides on top.

    A schedule (train.schedule=2x) is merged where it is named: above what came before, below what comes after.

    Args:
        name: A shipped name (`names`) or a YAML file.
        overrides: "key=value" texts with dotted keys. A number addresses an item of a list ("model.neck.0.type=fpn").
            `data=PATH` and `model.backbone=NAME` are short for data.path and model.backbone.name.
        sections: The same as nested mappings, {"model": {"neck": ["fpn", "smsl"]}}.
        trust: Whether the file may name classes of other packages. Overrides and sections may in any case.
        kind: What the name is, for messages.
        folder: Where a file of that name wins over a shipped config.

    Raises:
        InputError: For an unknown config, key or schedule, and for a value of the wrong type.
    """
    tree = _read_tree(name, "models", kind, folder)
    if not trust:
        refuse_outside(tree, name)
    for section, values in (sections or {}).items():
        tree = _merge(tree, {section: plain(values)}, f"{section}=")
    return parse(overridden(tree, overrides))


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Lay "key=value" texts over a nested mapping: a schedule first, and a slot before its options."""
    pairs = [_parse(text) for text in overrides]
    for key, value in sorted(pairs, key=lambda pair: (pair[0] != "train.schedule", pair[0].count("."))):
        tree = _set(tree, key, value)
    return tree


def names(package: str = "models") -> list[str]:
    """List the names of the shipped configs."""
    return sorted(_backbone_variants() if package == "models" else _stems(package))


def find(name: str | Path, package: str, kind: str, folder: Any = None) -> Any:
    """Find the YAML file of a name: the file itself, one of that name in `folder`, or a shipped one.

    Args:
        name: A shipped name or a YAML file.
        package: The folder of shipped files: models, schedules or ablations.
        kind: What the name is, for messages.
        folder: Where a file of that name wins over a shipped one, so that a folder of configs moves as a whole.

    Raises:
        InputError: For a name without a file.
    """
    if not isinstance(name, (str, Path)):
        raise InputError(f"the {kind.removesuffix(':')} must be a name or a YAML file, got {type(name).__name__}")
    path = Path(name)
    is_file = path.suffix in (".yaml", ".yml")
    if folder is not None and _exists(local := folder / (str(name) if is_file else f"{name}.yaml")):
        return local
    if is_file:
        if not _exists(path):
            what, known = "table" if package == "ablations" else "config", names(package)
            some = (
                f"a name: known are {nearest(path.stem, known, _LISTER)}"
                if package == "models"
                else f"one of {', '.join(known)}"
            )
            raise InputError(f"there is no {what} file {path}: give a YAML file, or {some}")
        return path
    shipped = _SHIPPED / package / f"{name}.yaml"
    if not _exists(shipped):
        raise unknown(kind, name, names(package), lister=_LISTER)
    return shipped


def _stems(package: str) -> list[str]:
    """List the shipped YAML files of a package, without those that only others build on ("_tiny")."""
    files = (path.name for path in (_SHIPPED / package).iterdir())
    return [name.removesuffix(".yaml") for name in files if name.endswith(".yaml") and name[0] != "_"]


@cache
def _backbone_variants() -> dict[str, tuple[str, str | None]]:
    """Map each shipped model's name to its file and, where the name chooses the backbone, to timm's name of that."""
    variants: dict[str, tuple[str, str | None]] = {}
    for stem in _stems("models"):
        if _PLACEHOLDER in stem:
            variants |= {stem.replace(_PLACEHOLDER, alias): (stem, timm) for alias, timm in BACKBONES.items()}
        else:
            variants[stem] = stem, None
    return variants


def _exists(file: Any) -> bool:
    """Whether there is such a file; no name is too long, or too strange, to ask."""
    try:
        return bool(file.is_file())
    except (OSError, ValueError):
        return False


def read(path: Any, keys: str = "model, data, train, test or base") -> dict[str, Any]:
    """The mapping in a YAML file. Raises InputError for what is not YAML and what is no mapping; keys: what it should have, as told."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return mapping(text, path, keys)


def mapping(text: str, source: Any, keys: str = "model, data, train, test or base") -> dict[str, Any]:
    """The mapping that a YAML text is; source and keys are for the message. Nothing in it is looked up or built.

    Raises InputError for what is not YAML, is no mapping, or grows beyond `LARGEST` values when its aliases are written out.
    """
    try:
        if len(text) > LONGEST or count_values(node := yaml.compose(text, yaml.SafeLoader), {}) > LARGEST:
            raise InputError(
                f"{source} is larger than any config: it has more than {LONGEST} characters or {LARGEST} values"
            )
        value = isinstance(node, yaml.ScalarNode) and not node.tag.endswith(
            (":str", ":null")
        )  # which OmegaConf does not take
        own: Any = None if value else OmegaConf.to_container(OmegaConf.create(text))
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{source} is not a config: its values are nested too deeply") from error
    except (
        OmegaConfBaseException,
        YAMLError,
        ValueError,
        OverflowError,
        TypeError,
        LookupError,
    ) as error:  # PyYAML of "!!int" alone
        raise InputError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, dict):
        raise InputError(f"{source} must be a mapping with {keys}")
    return own


def count_values(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for; an alias is its anchor's node once more, and counted once (`known`)."""
    if id(node) not in known:
        known[id(node)] = LARGEST + 1  # an anchor that holds itself
        inner = getattr(node, "value", None)
        items = inner if isinstance(inner, list) else []
        known[id(node)] = 1 + sum(
            count_values(one, known) for item in items for one in (item if isinstance(item, tuple) else (item,))
        )
    return known[id(node)]


def refuse_outside(tree: Mapping[str, Any], source: Any) -> None:
    """Raises InputError where a config of somebody else names a class of another package, which importing would run.

    `build.find` imports what has a ":" in its name, so every text of `model` that has one is such a name; a body's file of weights is not.
    """
    for key, text in _texts(tree.get("model"), "model"):
        if ":" in text and key != "model.backbone.weights":
            raise InputError(
                f"{source}: {key} names {text[:200]!r}, a class that is not fusedet's: making it runs code of that package; if you trust "
                "whom the file comes from, add --trust (in Python trust=True)"
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, one in value.items():
            yield from _texts(one, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            yield from _texts(one, f"{key}.{i}")


def _read_tree(
    name: str | Path, package: str, kind: str, folder: Any = None, children: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read a shipped name or a file with its bases; children: the files that build on it."""
    stem, backbone = _backbone_variants().get(str(name), (name, None)) if package == "models" else (name, None)
    if backbone and folder is not None and _exists(folder / f"{name}.yaml"):
        stem, backbone = name, None
    path = find(stem, package, kind, folder)
    if str(path) in children:
        raise InputError(f"{children[-1]} is, through {path}, its own base")
    own = read(path)
    bases = own.pop("base", None)
    tree: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
        parent = _read_tree(base, package, f"base of {path}:", path.parent, (*children, str(path)))
        tree = _overlay(tree, parent)
    tree = _merge(tree, own, str(path))
    return _overlay(tree, {"model": {"backbone": {"name": backbone}}}) if backbone else tree


def _merge(tree: dict[str, Any], layer: dict[str, Any], source: str) -> dict[str, Any]:
    """Lay one mapping over another; schedules first, slots whose type changes begin anew."""
    layer = dict(layer)
    schedule = layer.get("train", {}).get("schedule") if isinstance(layer.get("train"), Mapping) else None
    if schedule is not None:
        kind = f"schedule (train.schedule in {source})"
        tree = _overlay(tree, _read_tree(schedule, "schedules", kind))
        # a resolved config must not depend on a file of the user's: the schedule's values are in it
        layer["train"] = layer["train"] | {"schedule": schedule if schedule in names("schedules") else None}
    return _overlay(tree, layer)


def _overlay(below: Any, above: Any, key: str = "") -> Any:
    if key in _RENAMED and isinstance(above, str):
        above = {_RENAMED[key].rpartition(".")[2]: above}
    if key.removeprefix("model.") in _SLOTS:
        above, below = _spec(above), _spec(below)
        if (
            isinstance(above, dict)
            and isinstance(below, dict)
            and above.get("type", below.get("type")) != below.get("type")
        ):
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
    key = key.replace("[", ".").replace("]", "")
    if not raw.startswith("{"):  # a section as a whole keeps its name
        key = _RENAMED.get(key, key)
    if _leaf(Config, key) in (str, str | None):
        return key, None if raw in ("null", "") else raw
    try:
        return key, OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))["value"]  # type: ignore[index, call-overload]
    except (
        OmegaConfBaseException,
        YAMLError,
        ValueError,
        TypeError,
        LookupError,
        ArithmeticError,
        RecursionError,
    ) as error:
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
                raise InputError(
                    f"{key}: {'.'.join(parts[:depth])} is a list of {len(node)}, address its items by 0 to {len(node) - 1}"
                )
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
