"""Values of json annotation files, read by type: a wrong one is refused with the file, the entry and the key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusedet.data.image_files import read_text, require_valid_unicode
from fusedet.data.readers.number_text import parse_number
from fusedet.errors import InputError


def load_json(file: str | Path, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse a json file.

    Args:
        file: The file.
        object_hook: Replaces each object as soon as it is parsed.

    Raises:
        InputError: It is not valid json; the sentence names the line.
    """
    text = read_text(Path(file))
    try:
        return json.loads(text, object_hook=object_hook)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not valid json: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid json: {error}") from error


@dataclass(frozen=True)
class Entry:
    """An object of a json file.

    Attributes:
        values: Its values.
        where: The file and the entry, for messages.

    Raises:
        InputError: It is no object.
    """

    values: Any
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.values, dict):
            raise InputError(f"{self.where} must be an object, not {self.values!r:.60}")

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text; without a default it must be there and not be empty."""
        value = self.values.get(key, default)
        value = default if value is None else value
        if not isinstance(value, str) or (not value and default is None):
            raise self._wrong(key, "a text")
        require_valid_unicode([value], self.where)
        return value

    def integer(self, key: str, default: int = 0) -> int:
        """Return a whole number, which may be absent."""
        value = self.values.get(key)
        if value is None:
            return default
        number = self._parse(value, key)
        if not math.isfinite(number) or abs(number) >= 2**31:
            raise self._wrong(key, "a whole number")
        return int(number)

    def number(self, key: str) -> float:
        """Return a number; digits in quotes count."""
        return self._parse(self.values.get(key), key)

    def numbers(self, key: str) -> list[float]:
        """Return a list of numbers."""
        return [self._parse(value, key) for value in self._list(key)]

    def points(self, key: str) -> list[list[float]]:
        """Return a list of points [x, y]."""
        points = self._list(key)
        if not all(isinstance(point, list) and len(point) == 2 for point in points):
            raise self._wrong(key, "a list of points [x, y]")
        return [[self._parse(value, key) for value in point] for point in points]

    def entry(self, key: str) -> Entry:
        """Return an object inside; an absent one is empty."""
        return Entry({} if self.values.get(key) is None else self.values[key], f"{self.where}, '{key}'")

    def entries(self, key: str) -> Iterator[Entry]:
        """Yield the objects of a list or of a mapping, which may be absent."""
        value = self.values.get(key)
        rows = value.values() if isinstance(value, dict) else value or []
        if not isinstance(rows, list | type({}.values())):
            raise self._wrong(key, "a list")
        for i, row in enumerate(rows):
            yield Entry(row, f"{self.where}, entry {i} of '{key}'")

    def _list(self, key: str) -> list[Any]:
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self._wrong(key, "a list")
        return value

    def _parse(self, value: Any, key: str) -> float:
        try:
            if isinstance(value, int | float | str) and not isinstance(value, bool):
                return parse_number(value)
        except (ValueError, OverflowError):
            pass
        raise self._wrong(key, "a number" if value is self.values.get(key) else "a list of numbers")

    def _wrong(self, key: str, wanted: str) -> InputError:
        return InputError(f"{self.where}: '{key}' must be {wanted}, not {self.values.get(key)!r:.60}")
