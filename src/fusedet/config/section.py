"""What declared settings share: frozen models that refuse unknown keys and wrong values in one sentence."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from fusedet.config.validation import find_deepest_error, refuse_huge_integers, to_input_error
from fusedet.errors import InputError, make_unknown_error


class Declaration(BaseModel):
    """A frozen group of settings that refuses unknown keys and wrong values in one sentence.

    Raises:
        InputError: A key is unknown, or a value has another type or range; the sentence names the key.
    """

    model_config = ConfigDict(
        defer_build=True, frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    key: ClassVar[str] = ""
    """Where the group stands in a larger one: model, model.pyramid, data, train or test."""

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self._input_error(error, values) from None

    def replace(self, **changes: Any) -> Self:
        """Return a copy with other values, validated like new ones."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    @model_validator(mode="before")
    @classmethod
    def _check_keys_and_integers(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name in values:
            if name not in cls.model_fields:
                raise cls._unknown_key(name)
        refuse_huge_integers(values, cls.key)
        sections = {name for name, field in cls.model_fields.items() if is_section(field.annotation)}
        return {name: text_keys(value) if name in sections else value for name, value in values.items()}

    @classmethod
    def _unknown_key(cls, name: str) -> InputError:
        return make_unknown_error("key", name, cls.model_fields)

    @classmethod
    def _input_error(cls, error: ValidationError, values: dict[str, Any]) -> InputError:
        mistake = find_deepest_error(error, values)
        name, *rest = mistake["loc"] or [""]
        if name not in cls.model_fields:
            return to_input_error(mistake, (), values, cls, cls.key)
        field, key = cls.model_fields[name], _join(cls.key, name)
        if name not in values:
            return InputError(f"{key} is missing")
        if mistake["type"] == "model_type":
            names = ", ".join(field.annotation.model_fields)  # type: ignore[union-attr]
            return InputError(f"{key} must be a mapping with {names}, got {mistake['input']!r}")
        if not rest and (limits := describe_range(field)) and mistake["type"] in _RANGE_ERRORS:
            finite = " and finite" if mistake["type"] == "finite_number" else ""
            return InputError(f"{key}={mistake['input']} must be {limits}{finite}")
        return to_input_error(mistake, rest, values[name], field.annotation, key)


class Section(Declaration):
    """A section of a config."""

    @classmethod
    def _unknown_key(cls, name: str) -> InputError:
        key = _join(cls.key, name)
        return make_unknown_error("config key", key, [_join(cls.key, n) for n in cls.model_fields], meant=_meant(key))


_RANGE_ERRORS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}


def is_section(hint: Any) -> bool:
    """Return whether a field is a section."""
    return isinstance(hint, type) and issubclass(hint, Section)


def _join(section: str, name: str) -> str:
    return f"{section}.{name}" if section else name


def text_keys(values: Any) -> Any:
    """Make a mapping's keys texts, as arguments have to be; a key 3 is then an unknown key '3'."""
    return {str(name): value for name, value in values.items()} if isinstance(values, Mapping) else values


def iterate_settings() -> Iterator[tuple[str, FieldInfo]]:
    """List the settings of all sections by their keys, and the sections among them."""
    for section in _sections(Section):
        for name, field in section.model_fields.items():
            yield _join(section.key, name), field


def _sections(parent: type[Section]) -> Iterator[type[Section]]:
    for section in parent.__subclasses__():
        yield section
        yield from _sections(section)


def get_limits(field: FieldInfo) -> dict[str, Any]:
    """Return the limits of a number by pydantic's names, such as {"ge": 0, "lt": 1}."""
    names = ("gt", "ge", "lt", "le")
    return {name: getattr(limit, name) for limit in field.metadata for name in names if hasattr(limit, name)}


def describe_range(field: FieldInfo) -> str:
    """Describe the range of a number: "1 or more", "0 to 1", "above 0 and at most 1", or "" without one."""
    limits = get_limits(field)
    if "ge" in limits and "le" in limits:
        return f"{limits['ge']} to {limits['le']}"
    templates = {"gt": "above {}", "ge": "{} or more", "lt": "below {}", "le": "at most {}"}
    return " and ".join(text.format(limits[name]) for name, text in templates.items() if name in limits)


def to_builtins(value: Any) -> Any:
    """Convert mappings and sequences to dicts and lists (YAML has no tuples)."""
    if isinstance(value, Mapping):
        return {k: to_builtins(v) for k, v in value.items()}
    return [to_builtins(v) for v in value] if isinstance(value, (list, tuple)) else value


def _meant(key: str) -> list[str]:
    """List the keys that an unknown one may stand for: those of nearly its last name, best in its own section."""
    section, _, name = key.rpartition(".")
    by_name: dict[str, list[str]] = {}
    for path, _field in iterate_settings():
        by_name.setdefault(path.rpartition(".")[2], []).append(path)
    candidates = [path for near in get_close_matches(name, by_name, n=1, cutoff=0.8) for path in by_name[near]]
    return [path for path in candidates if path.rpartition(".")[0] == section] or candidates
