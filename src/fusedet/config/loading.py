"""Loading of configs: YAML with bases, schedules and dotted key=value overrides."""

from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from textwrap import indent
from typing import Any

from fusedet.config.schema import Config, parse
from fusedet.config.section import iterate_settings, to_builtins
from fusedet.config.yaml_text import parse_yaml, read_yaml, refuse_foreign_classes
from fusedet.errors import InputError, describe_known_names, make_unknown_error

_SHIPPED = files("fusedet") / "configs"
_LISTER = "fusedet info"
BACKBONES = {
    "r18": "resnet18.tv_in1k",
    "r50": "resnet50.tv_in1k",
    "r101": "resnet101.tv_in1k",
    "x101_32x4d": "resnext101_32x4d.gluon_in1k",
    "x101_64x4d": "resnext101_64x4d.tv_in1k",
}
"""timm's names of backbones by alias: `retinanet_r101` is retinanet_BACKBONE.yaml with the backbone `r101`."""
_PLACEHOLDER = "BACKBONE"
_SLOTS = ("plugin", "neck", "interact", "head", "roi")
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
        refuse_foreign_classes(tree, name)
    for section, values in (sections or {}).items():
        tree = _merge(tree, {section: to_builtins(values)}, f"{section}=")
    return parse(apply_overrides(tree, overrides))


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply "key=value" texts to a nested mapping: a schedule first, and a slot before its options."""
    pairs = [_parse(text) for text in overrides]
    for key, value in sorted(pairs, key=lambda pair: (pair[0] != "train.schedule", pair[0].count("."))):
        tree = _set(tree, key, value)
    return tree


def names(package: str = "models") -> list[str]:
    """List the names of the shipped configs."""
    return sorted(_backbone_variants() if package == "models" else _stems(package))


def read_schema(name: str) -> str:
    """Read a shipped JSON schema, which editors use: "schema" of configs, "ablation_schema" of ablation tables."""
    return (_SHIPPED / f"{name}.json").read_text(encoding="utf-8")


def find_file(name: str | Path, package: str, kind: str, folder: Any = None) -> Any:
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
        raise InputError(f"the {kind} must be a name or a YAML file, got {type(name).__name__}")
    path = Path(name)
    is_file = path.suffix in (".yaml", ".yml")
    if folder is not None and _exists(local := folder / (str(name) if is_file else f"{name}.yaml")):
        return local
    if is_file:
        if not _exists(path):
            what, known = "table" if package == "ablations" else "config", names(package)
            some = (
                f"a name: known are {describe_known_names(path.stem, known, _LISTER)}"
                if package == "models"
                else f"one of {', '.join(known)}"
            )
            raise InputError(f"there is no {what} file {path}: give a YAML file, or {some}")
        return path
    shipped = _SHIPPED / package / f"{name}.yaml"
    if not _exists(shipped):
        raise make_unknown_error(kind, name, names(package), lister=_LISTER)
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
    """Return whether a file exists, for any name, however long or odd."""
    try:
        return bool(file.is_file())
    except (OSError, ValueError):
        return False


def _read_tree(
    name: str | Path, package: str, kind: str, folder: Any = None, children: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read a shipped name or a file with its bases; children: the files that build on it."""
    stem, backbone = _backbone_variants().get(str(name), (name, None)) if package == "models" else (name, None)
    if backbone and folder is not None and _exists(folder / f"{name}.yaml"):
        stem, backbone = name, None
    path = find_file(stem, package, kind, folder)
    if str(path) in children:
        raise InputError(f"{children[-1]} is, through {path}, its own base")
    own = read_yaml(path)
    bases = own.pop("base", None)
    tree: dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [] if bases is None else [bases]:
        parent = _read_tree(base, package, f"base of {path}", path.parent, (*children, str(path)))
        tree = _overlay(tree, parent)
    tree = _merge(tree, own, str(path))
    return _overlay(tree, {"model": {"backbone": {"name": backbone}}}) if backbone else tree


def _merge(tree: dict[str, Any], layer: dict[str, Any], source: str) -> dict[str, Any]:
    """Merge a layer over a config: its schedule first; a slot whose type changes drops its old options."""
    layer = dict(layer)
    schedule = layer.get("train", {}).get("schedule") if isinstance(layer.get("train"), Mapping) else None
    if schedule is not None:
        kind = "schedule" if "=" in source else f"schedule (train.schedule in {source})"
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
    if _takes_text(key):
        return key, None if raw in ("null", "") else raw
    try:
        return key, parse_yaml("value:\n" + indent(raw, "  "), text)["value"]
    except InputError as error:
        raise InputError(f"the value of '{text}' is not YAML") from error


@cache
def _takes_text(key: str) -> bool:
    """Return whether a setting is a text, which is taken as it stands: a path 007 is no number."""
    return any(path == key and field.annotation in (str, str | None) for path, field in iterate_settings())


def _set(tree: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set one dotted key; a number addresses an item of an existing list."""
    parts = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parts):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise InputError(
                    f"{key}: {'.'.join(parts[:depth])} is a list of {len(node)}, "
                    f"address its items by 0 to {len(node) - 1}"
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
