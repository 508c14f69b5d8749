"""A user's mistake, told in one sentence, and the check of values that come from outside."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_LISTED = 50  # more names than this are not listed in a message
_LARGEST = 2**63 - 1  # what torch and numpy count with


class InputError(ValueError):
    """Wrong input: one sentence that names the file, key or value and what would be right.

    The command line prints it without a traceback and exits with `exit_code`.
    """

    exit_code = 2


class DivergenceError(InputError):
    """A loss, a gradient or a weight is infinite or not a number; the last checkpoint is from before."""

    exit_code = 3


class StorageError(InputError):
    """A file cannot be written, for example on a full disk; the previous one is still whole."""

    exit_code = 4


def unknown(
    kind: str, name: object, known: Iterable[str], *, meant: Sequence[str] = (), lister: str = ""
) -> InputError:
    """The error for a name that is not among the known ones; the nearest known name is offered.

    meant: what to offer instead. lister: the command that shows all of the known names, where they are too many for a message.

    >>> str(unknown("neck", "fpm", ["fpn", "bfp"]))
    "unknown neck 'fpm': did you mean 'fpn'? Known: bfp, fpn"
    """
    names = sorted(known)
    near = meant or difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if len(names) > _LISTED:
        return InputError(f"unknown {kind} '{name}': {hint}Known are {nearest(name, names, lister)}")
    return InputError(f"unknown {kind} '{name}': {hint}Known: {', '.join(names) or 'none'}")


def nearest(name: object, known: Sequence[str], lister: str = "") -> str:
    """How many names are known, the five that are most like a name, and the command that lists all."""
    some = ", ".join(difflib.get_close_matches(str(name), known, n=5, cutoff=0))
    return f"{len(known)}, among them {some}" + (f" ({lister} lists them)" if lister else "")


def plural(count: int, thing: str) -> str:
    """How many of a thing there are.

    >>> plural(1, "box"), plural(2, "box"), plural(1200, "image")
    ('1 box', '2 boxes', '1200 images')
    """
    return f"{count} {thing}{'' if count == 1 else 'es' if thing.endswith(('s', 'x')) else 's'}"


def one_of(key: str, value: object, kind: Any) -> None:
    """Raise InputError for a value that is none of a Literal type's; the nearest is offered.

    Configs are checked where they are built; constructors ask this for those who call them in Python.
    """
    if value not in get_args(kind):
        raise unknown(key, value, map(str, get_args(kind)))


def checked(value: Any, hint: Any, key: str) -> Any:
    """The value as the type hint asks for it: ints become floats, lists become tuples; anything else that differs is an InputError.

    Knows Any, None, bool, int, float, str, Literal, unions, list, tuple, dict and Mapping; other hints are taken as they come.
    """
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise InputError(
            f"{key} must lie between {-_LARGEST} and {_LARGEST}, got an integer of {value.bit_length()} bits"
        )
    if origin in (Union, UnionType):
        errors = []
        for option in sorted(args, key=lambda a: a is not NoneType):
            try:
                return checked(value, option, key)
            except InputError as error:
                errors.append(error)
        inside = [error for error in errors if str(error).startswith(f"{key}.")]  # what is wrong with an item says more
        raise inside[0] if inside else errors[-1] if len(args) == 2 and NoneType in args else _wrong(value, hint, key)
    if origin is Literal:
        one_of(f"value of {key}:", value, hint)
        return value
    if origin in (list, tuple, Sequence):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _wrong(value, hint, key)
        fixed = origin is tuple and args and args[-1] is not Ellipsis
        if fixed and len(value) != len(args):
            raise InputError(f"{key} must have {plural(len(args), 'item')}, got {list(value)}")
        inner = args if fixed else (args[:1] or (Any,)) * len(value)
        items = [checked(v, t, f"{key}.{i}") for i, (v, t) in enumerate(zip(value, inner))]
        return items if origin is list else tuple(items)
    if hint in (None, NoneType):
        ok = value is None
    elif hint is float:
        ok = isinstance(value, (int, float)) and not isinstance(value, bool)
        value = float(value) if ok else value
    elif hint is int:
        ok = isinstance(value, int) and not isinstance(value, bool)
    elif hint in (bool, str):
        ok = isinstance(value, hint)
    elif origin in (dict, Mapping):
        ok = isinstance(value, Mapping)
        value = (
            {checked(k, args[0], f"{key}.{k}"): checked(v, args[1], f"{key}.{k}") for k, v in value.items()}
            if ok
            else value
        )
    elif hint is dict:
        ok = isinstance(value, dict)
    else:
        ok = True
    if not ok:
        raise _wrong(value, hint, key)
    return value


def _wrong(value: Any, hint: Any, key: str) -> InputError:
    if get_origin(hint) not in (list, tuple, Sequence):
        return InputError(f"{key} must be {_named(hint)}, got {value!r}")
    args = get_args(hint)
    fixed = get_origin(hint) is tuple and args[-1] is not Ellipsis
    items = args if fixed else args[:1]
    example = f", such as [{', '.join([str(value)] * len(items))}]"
    try:
        checked([value] * len(items), hint, key)
    except InputError:  # the value is no item of such a list either
        example = f" [{', '.join(map(_named, items))}{'' if fixed else ', ...'}]"
    return InputError(f"{key} must be a list{example}, got {value!r}")


def _named(hint: Any) -> str:
    return (
        getattr(hint, "__name__", str(hint))
        if not get_args(hint)
        else str(hint).replace("typing.", "").replace("collections.abc.", "")
    )
