"""Typed access to a mapping of MMDetection's config, with a record of the keys that were not read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedet.errors import InputError, checked

_LARGEST = 1e30  # a float32 holds it and products with it
# Keys that do not affect predictions, or that are set elsewhere.
_IGNORED = {
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
    """Reader of one mapping.

    Args:
        path: Dotted path of the mapping, for messages.
        values: The mapping.
        notes: Notes for the user, shared by all readers of a config.

    Raises:
        InputError: The value is not a mapping.
    """

    def __init__(self, path: str, values: Mapping[str, Any] | None, notes: list[str]) -> None:
        if values is not None and not isinstance(values, Mapping):
            raise InputError(f"MMDetection's {path} must be a mapping, got {values!r}")
        self.path, self.values, self.notes = path, dict(values or {}), notes
        self.read_keys: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self.values)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default if it is absent or None."""
        self.read_keys.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def get_typed(self, key: str, hint: Any, default: Any) -> Any:
        """Return a value of a type such as list[bool] (see `errors.checked`)."""
        return checked(self.get(key, default), hint, f"MMDetection's {self.path}.{key}")

    def get_bool(self, key: str, default: bool) -> bool:
        """Return True or False."""
        value: bool = self.get_typed(key, bool, default)
        return value

    def get_int(self, key: str, default: int, least: int = -1, most: int = 10**6) -> int:
        """Return an integer from least to most, which bound the size of the model."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise InputError(f"MMDetection's {self.path}.{key}={value!r} must be a whole number")
        if not least <= value <= most:
            raise InputError(f"MMDetection's {self.path}.{key}={value} must be from {least} to {most}")
        return value

    def get_float(self, key: str, default: float) -> float:
        """Return a number."""
        value = self.get(key, default)
        if not _is_number(value):
            raise InputError(f"MMDetection's {self.path}.{key}={value!r} must be a number")
        return float(value)

    def get_floats(self, key: str, default: Any = ()) -> list[float]:
        """Return a list of numbers."""
        value = self.get(key, list(default))
        if not isinstance(value, (list, tuple)) or not all(map(_is_number, value)):
            raise InputError(f"MMDetection's {self.path}.{key}={value!r} must be a list of numbers")
        return [float(v) for v in value]

    def get_section(self, key: str) -> ConfigReader:
        """Return the reader of a nested mapping; empty if it is absent."""
        return ConfigReader(f"{self.path}.{key}", self.get(key), self.notes)

    def get_sections(self, key: str) -> list[ConfigReader]:
        """Return the readers of a list of mappings, or of a single mapping."""
        value = self.get(key, [])
        values = value if isinstance(value, (list, tuple)) else [value]
        many = len(values) > 1 or isinstance(value, (list, tuple))
        return [
            ConfigReader(f"{self.path}.{key}" + (f"[{i}]" if many else ""), v, self.notes) for i, v in enumerate(values)
        ]

    def require_value(self, key: str, *supported: Any) -> Any:
        """Return a value that must be one of the supported ones; the first is the default."""
        value = self.get(key, supported[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in supported:
            shown = " or ".join(repr(r) for r in supported)
            raise InputError(
                f"MMDetection's {self.path}.{key}={value!r} is not supported: supported values are {shown}"
            )
        return value

    def require_type(self, *supported: str) -> str:
        """Return the type without a registry's scope ("mmdet.ResNet"); it must be one of the supported ones."""
        value = str(self.get("type", supported[0])).rpartition(".")[2]
        if value not in supported:
            raise InputError(
                f"MMDetection's {self.path}.type={value} is not supported: supported types are {', '.join(supported)}"
            )
        return value

    def note_unread(self, *ignored: str) -> None:
        """Note the keys that were not read, except the ignored ones."""
        left = [
            k for k, v in self.values.items() if k not in self.read_keys | _IGNORED | set(ignored) and v is not None
        ]
        if left:
            self.notes.append(f"not converted of {self.path}: {', '.join(left)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def read_norm_type(reader: ConfigReader, key: str, default: str | None, *kinds: str | None) -> str | None:
    """Return the type of a norm_cfg, one of the given kinds (None: no normalization); a GN must have 32 groups."""
    section = reader.get_section(key) if reader.values.get(key) is not None else None
    if key in reader.values and reader.values[key] is None:
        kind = None
    else:
        kind = str(section.get("type")).rpartition(".")[2] if section else default
    reader.read_keys.add(key)
    kind = {"SyncBN": "BN", "naiveSyncBN": "BN"}.get(str(kind), kind)
    if kind not in kinds:
        shown = " or ".join(str(k) for k in kinds)
        raise InputError(
            f"MMDetection's {reader.path}.{key} is {kind}, which is not supported: supported values are {shown}"
        )
    if kind == "GN" and section and section.get_int("num_groups", 32) != 32:
        raise InputError(
            f"MMDetection's {reader.path}.{key} has {section.get('num_groups')} groups: only 32 are supported"
        )
    return kind
