"""Validation of values from outside by their type hints, with one sentence per mistake."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from fusedet.errors import InputError, find_nearest_name, format_count, make_unknown_error

_LARGEST = 2**63 - 1  # what torch and numpy count with
_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
_LISTS = (list, tuple, Sequence)
_MAPPINGS = (dict, Mapping)


def validate_value(value: Any, hint: Any, key: str) -> Any:
    """Return the value as its type hint asks for it.

    Integers become floats and lists become tuples where the hint says so; any other difference is a mistake.

    Args:
        value: A value of a config or a file.
        hint: A type hint, such as `int`, `float | None`, `tuple[int, int]`, `Literal["a", "b"]`, `Mapping[str, float]`.
        key: The value's name in messages.

    Raises:
        InputError: For a value of another type, naming the key and the item.
    """
    refuse_huge_integers(value, key)
    try:
        return make_adapter(hint).validate_python(value)
    except ValidationError as error:
        mistake = find_deepest_error(error, value)
        raise to_input_error(mistake, mistake["loc"], value, hint, key) from None


def refuse_huge_integers(value: Any, key: str) -> None:
    """Raise InputError for an integer, at any depth, that no tensor holds."""
    if isinstance(value, int) and abs(value) > _LARGEST:
        limits = f"between {-_LARGEST} and {_LARGEST}"
        raise InputError(f"{key} must lie {limits}, got an integer of {value.bit_length()} bits")
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    for name, item in items:
        refuse_huge_integers(item, f"{key}.{name}" if key else str(name))


def find_deepest_error(error: ValidationError, value: Any) -> Any:
    """Choose the mistake to report: of those of a union's members, that inside an item says most."""
    return max(error.errors(include_url=False), key=lambda mistake: len(_parts(mistake["loc"], value)))


def to_input_error(mistake: Any, loc: Sequence[Any], value: Any, hint: Any, key: str) -> InputError:
    """Turn pydantic's mistake at `loc` in a value into one sentence."""
    own = mistake.get("ctx", {}).get("error")
    if isinstance(own, InputError):
        return own
    for part in _parts(loc, value):
        hint, key = _item_hint(hint, part), f"{key}.{part}"
    if loc and loc[-1] == "[key]":
        hint = str
    members = [member for member in union_members(hint) if member is not NoneType]
    hint = members[0] if len(members) == 1 else hint
    if mistake["type"] == "literal_error" and get_origin(hint) is Literal:
        return make_unknown_error("value", mistake["input"], map(str, get_args(hint)), of=key)
    if mistake["type"] in ("missing", "too_long", "too_short"):
        return InputError(f"{key} must have {format_count(len(get_args(hint)), 'item')}, got {list(mistake['input'])}")
    return _wrong_type(mistake["input"], hint, key)


def type_name(hint: Any) -> str:
    """Name a type hint as a message does: int, dict[str, int], int | Mapping[str, int], int | 'auto'."""
    members = union_members(hint)
    if len(members) > 1:
        return " | ".join(map(type_name, members))
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    if not get_args(hint):
        return getattr(hint, "__name__", str(hint))
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def union_members(hint: Any) -> tuple[Any, ...]:
    """List the members of a union, or the hint itself, without annotations."""
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return tuple(get_args(member)[0] if get_origin(member) is Annotated else member for member in members)


@cache
def make_adapter(hint: Any) -> TypeAdapter:
    """Return pydantic's validator of the values that `validate_value` takes for a type hint."""
    try:
        return TypeAdapter(_accept_lists(hint), config=_STRICT)
    except PydanticUserError:  # a hint that pydantic cannot check, such as a dataclass of another package
        return TypeAdapter(Any)


def accept_sequences(kind: type[list] | type[tuple]) -> BeforeValidator:
    """Let a strict list or tuple take any sequence, as YAML has no tuples; sets and iterators have no fixed order."""
    return BeforeValidator(
        lambda value: kind(value) if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else value
    )


def _accept_lists(hint: Any) -> Any:
    """Let a strict hint take any sequence for a list or tuple; a Sequence becomes a tuple."""
    origin, args = get_origin(hint), tuple(_accept_lists(arg) for arg in get_args(hint))
    if origin in (Union, UnionType):
        return Union[args]  # noqa: UP007 - of a tuple
    if origin is Sequence:
        origin, args = tuple, (*args, ...)
    if origin in (list, tuple):
        return Annotated[origin[args], accept_sequences(origin)]
    return origin[args] if origin in _MAPPINGS else hint


def _parts(loc: Sequence[Any], value: Any) -> list[Any]:
    """Keep the parts of an error's location that index the value; the others name members of a union."""
    parts = []
    for part in loc:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            continue
        parts.append(part)
    return parts


def _item_hint(hint: Any, part: Any) -> Any:
    """Find the hint of an item: of a sequence by its position, of a mapping by its key."""
    for member in union_members(hint):
        origin, args = get_origin(member), get_args(member)
        if origin in _MAPPINGS and not isinstance(part, int):
            return args[1]
        if origin in _LISTS and isinstance(part, int):
            is_fixed = origin is tuple and args[-1] is not Ellipsis
            return args[part] if is_fixed else args[0]
    return Any


def _wrong_type(value: Any, hint: Any, key: str) -> InputError:
    names = [name for member in union_members(hint) if get_origin(member) is Literal for name in get_args(member)]
    if names:
        near = find_nearest_name(value, map(str, names))
        meant = f": did you mean {near[0]!r}?" if near else ""
        return InputError(f"{key} must be {type_name(hint).replace(' | ', ' or ')}, got {value!r}{meant}")
    if get_origin(hint) not in _LISTS:
        return InputError(f"{key} must be {type_name(hint)}, got {value!r}")
    args = get_args(hint)
    is_fixed = get_origin(hint) is tuple and args[-1] is not Ellipsis
    items = args if is_fixed else args[:1]
    example = f", such as [{', '.join([str(value)] * len(items))}]"
    try:
        validate_value([value] * len(items), hint, key)
    except InputError:  # the value is no item of such a list either
        example = f" [{', '.join(map(type_name, items))}{'' if is_fixed else ', ...'}]"
    return InputError(f"{key} must be a list{example}, got {value!r}")
