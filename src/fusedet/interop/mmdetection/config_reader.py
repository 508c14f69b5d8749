"""A mapping of MMDetection's config that is asked key by key, and remembers what nobody asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedet.errors import InputError, checked

_LARGEST = 1e30  # what a float32 holds with package for products
# what changes no prediction and has its own place here, or none
_SILENT = {
    "type",
    "pretrained",
    "init_cfg",
    "with_cp",
    "zero_init_residual",
    "in_channels",
    "conv_cfg",
    "act_cfg",
    "num_classes",
}


class ConfigReader:
    """One mapping: `where` names it in messages, notes are for the user and shared by all parts of a config."""

    def __init__(self, where: str, values: Mapping[str, Any] | None, notes: list[str]) -> None:
        if values is not None and not isinstance(values, Mapping):
            raise InputError(f"MMDetection's {where} must be a mapping, got {values!r}")
        self.where, self.values, self.notes = where, dict(values or {}), notes
        self.asked: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.values)

    def get(self, key: str, default: Any = None) -> Any:
        """A value, or the default where it is absent or None."""
        self.asked.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def get_typed(self, key: str, hint: Any, default: Any) -> Any:
        """The same, of the type that the hint says (`errors.checked`): list[bool], str, ..."""
        return checked(self.get(key, default), hint, f"MMDetection's {self.where}.{key}")

    def get_bool(self, key: str, default: bool) -> bool:
        """The same, True or False."""
        found: bool = self.get_typed(key, bool, default)
        return found

    def get_int(self, key: str, default: int, least: int = -1, most: int = 10**6) -> int:
        """The same, a whole number from least to most, which bound what is built of it."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"MMDetection's {self.where}.{key}={value!r} must be a whole number")
        if not least <= value <= most:
            raise InputError(f"MMDetection's {self.where}.{key}={value} must be from {least} to {most}")
        return value

    def get_float(self, key: str, default: float) -> float:
        """The same, a number."""
        value = self.get(key, default)
        if not _is_number(value):
            raise InputError(f"MMDetection's {self.where}.{key}={value!r} must be a number")
        return float(value)

    def get_floats(self, key: str, default: Any = ()) -> list[float]:
        """The same, a list of numbers."""
        value = self.get(key, list(default))
        if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)):
            raise InputError(f"MMDetection's {self.where}.{key}={value!r} must be a list of numbers")
        return [float(v) for v in value]

    def get_section(self, key: str) -> ConfigReader:
        """A mapping inside; empty where it is absent."""
        return ConfigReader(f"{self.where}.{key}", self.get(key), self.notes)

    def get_sections(self, key: str) -> list[ConfigReader]:
        """A list of mappings, or the one mapping that stands alone."""
        value = self.get(key, [])
        values = value if isinstance(value, (list, tuple)) else [value]
        many = len(values) > 1 or isinstance(value, (list, tuple))
        return [
            ConfigReader(f"{self.where}.{key}" + (f"[{i}]" if many else ""), v, self.notes)
            for i, v in enumerate(values)
        ]

    def require_value(self, key: str, *right: Any) -> Any:
        """A value that must be one of these, the first of which is the default."""
        value = self.get(key, right[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in right:
            shown = " or ".join(repr(r) for r in right)
            raise InputError(
                f"MMDetection's {self.where}.{key}={value!r} is not here: what can be converted has {shown}"
            )
        return value

    def require_type(self, *right: str) -> str:
        """The type, without a registry's scope ("mmdet.ResNet"); one of these."""
        value = str(self.get("type", right[0])).rpartition(".")[2]
        if value not in right:
            raise InputError(
                f"MMDetection's {self.where}.type={value} is not here: {', '.join(right)} can be converted"
            )
        return value

    def note_unread(self, *silent: str) -> None:
        """Note the keys that nobody asked for, but for these."""
        left = [k for k, v in self.values.items() if k not in self.asked | _SILENT | set(silent) and v is not None]
        if left:
            self.notes.append(f"not taken over from {self.where}: {', '.join(left)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def read_norm_type(part: ConfigReader, key: str, default: str | None, *kinds: str | None) -> str | None:
    """The type of a norm_cfg, one of these kinds (None: without); a GN must have 32 groups."""
    found = part.get_section(key) if part.values.get(key) is not None else None
    if key in part.values and part.values[key] is None:
        kind = None
    else:
        kind = str(found.get("type")).rpartition(".")[2] if found else default
    part.asked.add(key)
    kind = {"SyncBN": "BN", "naiveSyncBN": "BN"}.get(str(kind), kind)
    if kind not in kinds:
        shown = " or ".join(str(k) for k in kinds)
        raise InputError(
            f"MMDetection's {part.where}.{key} is {kind}, which is not here: what can be converted has {shown}"
        )
    if kind == "GN" and found and found.get_int("num_groups", 32) != 32:
        raise InputError(
            f"MMDetection's {part.where}.{key} has {found.get('num_groups')} groups: what can be converted has 32"
        )
    return kind
