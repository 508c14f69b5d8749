"""A user's mistake, told in one sentence, and the check of values that come from outside."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

_LISTED = 50  # more names than this are not listed in a message


class InputError(ValueError):
    """Wrong input: one sentence that names the file, key or value and what would be right.

    The command line prints it without a traceback and exits with 2.
    """


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
    """The error for a name that is not among the known ones; the nearest known name is offered.

    >>> str(unknown("neck", "fpm", ["fpn", "bfp"]))
    "unknown neck 'fpm': did you mean 'fpn'? Known: bfp, fpn"
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    if len(names) > _LISTED:
        some = difflib.get_close_matches(str(name), names, n=5, cutoff=0)
        return InputError(f"unknown {kind} '{name}': {hint}Known are {len(names)}, among them {', '.join(some)}")
    return InputError(f"unknown {kind} '{name}': {hint}Known: {', '.join(names) or 'none'}")


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
            raise InputError(f"{key} must have {len(args)} items, got {list(value)}")
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
        value = {checked(k, args[0], f"{key}.{k}"): checked(v, args[1], f"{key}.{k}") for k, v in value.items()} if ok else value
    elif hint is dict:
        ok = isinstance(value, dict)
    else:
        ok = True
    if not ok:
        raise _wrong(value, hint, key)
    return value


def _wrong(value: Any, hint: Any, key: str) -> InputError:
    if get_origin(hint) in (list, tuple):
        return InputError(f"{key} must be a list, such as [{value}], got {value!r}")
    name = getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint).replace("typing.", "").replace("collections.abc.", "")
    return InputError(f"{key} must be {name}, got {value!r}")
