"""Typed access to a mapping of MMDetection's config, with a record of the keys that were not read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusedet.config import validate_value
from fusedet.errors import InputError

_LARGEST = 1e30  # a float32 holds it and products with it
# Keys that do not affect predictions, or that are read from another place.
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
    "train_cfg",
    "test_cfg",
    "bbox_coder",
    "target_means",
    "target_stds",
    "roi_feat_size",
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

    def find_key(self, *keys: str) -> str:
        """Return the first of a value's names in different versions that has a value, else the first name."""
        return next((key for key in keys if self.values.get(key) is not None), keys[0])

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, or the default if it is absent or None."""
        self.read_keys.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def get_typed(self, key: str, hint: Any, default: Any) -> Any:
        """Return a value of a type such as list[bool] (see `config.validate_value`).

        Raises:
            InputError: The value has another type.
        """
        return validate_value(self.get(key, default), hint, f"MMDetection's {self.path}.{key}")

    def get_int(self, key: str, default: int, least: int = -1, most: int = 10**6) -> int:
        """Return an integer; its range bounds the size of the model.

        Args:
            key: The key.
            default: The value if the key is absent or None.
            least: The smallest value that is accepted.
            most: The largest value that is accepted.

        Raises:
            InputError: The value is no integer, or out of its range.
        """
        return self._check_range(key, self.get_typed(key, int, default), least, most)

    def get_float(self, key: str, default: float) -> float:
        """Return a number.

        Raises:
            InputError: The value is no number, or beyond 1e30.
        """
        return self._check_range(key, self.get_typed(key, float, default))

    def get_floats(self, key: str, default: Iterable[float] = ()) -> list[float]:
        """Return a list of numbers.

        Raises:
            InputError: The value is no list of numbers, or one is beyond 1e30.
        """
        return [self._check_range(key, value) for value in self.get_typed(key, list[float], list(default))]

    def _check_range(self, key: str, value: Any, least: float = -_LARGEST, most: float = _LARGEST) -> Any:
        if not least <= value <= most:
            raise InputError(f"MMDetection's {self.path}.{key}={value} must be from {least} to {most}")
        return value

    def get_options(self, table: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Return options of this project by their names.

        Args:
            table: The dotted path of each option, its default, which has its type, and the range of an integer.

        Raises:
            InputError: A value has another type, or is out of its range.
        """
        options = {}
        for name, (path, default, *limits) in table.items():
            *sections, key = path.split(".")
            reader = self
            for section in sections:
                reader = reader.get_section(section)
            if isinstance(default, bool):
                options[name] = reader.get_typed(key, bool, default)
            else:
                get: Any = reader.get_int if isinstance(default, int) else reader.get_float
                options[name] = get(key, default, *limits)
        return options

    def get_changes(self, table: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        return {name: value for name, value in self.get_options(table).items() if value != table[name][1]}

    def get_section(self, key: str) -> ConfigReader:
        """Return the reader of a nested mapping; empty if it is absent.

        Raises:
            InputError: The value is no mapping.
        """
        return ConfigReader(f"{self.path}.{key}", self.get(key), self.notes)

    def get_sections(self, key: str) -> list[ConfigReader]:
        """Return the readers of a list of mappings, or of a single mapping.

        Raises:
            InputError: An item is no mapping.
        """
        value = self.get(key, [])
        if not isinstance(value, (list, tuple)):
            return [self.get_section(key)]
        return [ConfigReader(f"{self.path}.{key}[{i}]", v, self.notes) for i, v in enumerate(value)]

    def get_type(self, key: str, default: str) -> str:
        """Return the type of a nested mapping without a registry's scope ("mmdet.ResNet")."""
        return str(self.get_section(key).get("type", default)).rpartition(".")[2]

    def require_value(self, key: str, *supported: Any) -> Any:
        """Return a value that must be one of the supported ones; the first is the default.

        Raises:
            InputError: The value is not supported; the sentence lists those that are.
        """
        value = self.get(key, supported[0])
        value = list(value) if isinstance(value, tuple) else value
        if value not in supported:
            shown = " or ".join(map(repr, supported))
            raise InputError(
                f"MMDetection's {self.path}.{key}={value!r} is not supported: supported values are {shown}"
            )
        return value

    def require_type(self, *supported: str) -> str:
        """Return the type without a registry's scope; it must be one of the supported ones, the first by default.

        Raises:
            InputError: The type is not supported; the sentence lists those that are.
        """
        value = str(self.get("type", supported[0])).rpartition(".")[2]
        if value not in supported:
            raise InputError(
                f"MMDetection's {self.path}.type={value} is not supported: supported types are {', '.join(supported)}"
            )
        return value

    def require_norm(self, key: str, default: str | None, *supported: str | None) -> str | None:
        """Return the type of a norm_cfg (None: no normalization), one of the supported; a GN must have 32 groups.

        Raises:
            InputError: The norm is not supported, or is a GN of another number of groups.
        """
        kind = default
        if key in self.values:
            kind = None if self.values[key] is None else self.get_type(key, "None")
        kind = "BN" if kind in ("SyncBN", "naiveSyncBN") else kind
        if kind not in supported:
            shown = " or ".join(map(str, supported))
            raise InputError(
                f"MMDetection's {self.path}.{key} is {kind}, which is not supported: supported values are {shown}"
            )
        if kind == "GN" and (groups := self.get_section(key).get_int("num_groups", 32)) != 32:
            raise InputError(f"MMDetection's {self.path}.{key} has {groups} groups: only 32 are supported")
        return kind

    def note_unread(self, *ignored: str) -> None:
        """Note the keys that were not read, except the ignored ones."""
        known = self.read_keys | _IGNORED | {*ignored}
        if left := [key for key, value in self.values.items() if key not in known and value is not None]:
            self.notes.append(f"not converted of {self.path}: {', '.join(left)}")
