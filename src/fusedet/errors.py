"""Wrong input from the user, reported in one sentence."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

_LISTED = 50  # more names than this are not listed in a message


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


def make_unknown_error(
    kind: str, name: object, known: Iterable[str], *, of: str = "", meant: Sequence[str] = (), lister: str = ""
) -> InputError:
    """Make the error for an unknown name; it offers the nearest known name.

    Args:
        kind: What the name is for, as the message begins.
        name: The unknown name.
        known: The known names.
        of: What the name belongs to, such as a key.
        meant: Names to offer instead of the nearest.
        lister: The command that lists all known names, where they are too many for a message.

    >>> str(make_unknown_error("neck", "fpm", ["fpn", "bfp"]))
    "unknown neck 'fpm': did you mean 'fpn'? Known: bfp, fpn"
    """
    names = sorted(known)
    near = meant or find_nearest_name(name, names)
    hint = f": did you mean {' or '.join(map(repr, near))}?" if near else "."
    listed = f"Known: {', '.join(names) or 'none'}"
    if len(names) > _LISTED:
        listed = f"Known are {describe_known_names(name, names, lister)}"
    return InputError(f"unknown {kind} '{name}'{of and f' of {of}'}{hint} {listed}")


@contextmanager
def prefix_errors(where: str) -> Iterator[None]:
    """Name the place of what is checked inside: an `InputError` from there begins with it."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def split_names(kind: str, names: str | Iterable[str], known: Iterable[str], *, of: str = "") -> list[str]:
    """Return names, each alone or joined with others by commas, without duplicates and in the order of `known`.

    >>> split_names("format", ["csv,yolo", "csv"], ["coco", "yolo", "csv"])
    ['yolo', 'csv']

    Args:
        kind: What the names are of, for messages.
        names: One text or several.
        known: All names that there are.
        of: The option or key, for messages.

    Raises:
        InputError: A name is not among the known ones.
    """
    known = list(known)
    texts = [names] if isinstance(names, str) else names
    asked = [name.strip() for text in texts for name in text.split(",") if name.strip()]
    for name in asked:
        if name not in known:
            raise make_unknown_error(kind, name, known, of=of)
    return [name for name in known if name in asked]


def find_nearest_name(name: object, known: Iterable[str]) -> list[str]:
    """Return the known name that an unknown one probably means, in a list, which is empty if none is near."""
    return difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)


def describe_known_names(name: object, known: Sequence[str], lister: str = "") -> str:
    """Describe the known names: their number, the five nearest to a name, and the command that lists all."""
    some = ", ".join(difflib.get_close_matches(str(name), known, n=5, cutoff=0))
    return f"{len(known)}, among them {some}" + (f" ({lister} lists them)" if lister else "")


def format_count(count: int, thing: str) -> str:
    """Format a count with its noun.

    >>> format_count(1, "box"), format_count(2, "box"), format_count(1200, "image")
    ('1 box', '2 boxes', '1200 images')
    """
    return f"{count} {thing}{'' if count == 1 else 'es' if thing.endswith(('s', 'x')) else 's'}"


def shorten_list(items: Iterable[object], limit: int = 5) -> str:
    """Join the first items by commas, and count the others.

    >>> shorten_list("abc", 3), shorten_list("abcde", 3)
    ('a, b, c', 'a, b, c and 2 more')
    """
    texts = list(map(str, items))
    return ", ".join(texts[:limit]) + f" and {len(texts) - limit} more" * (len(texts) > limit)


def require_at_least(least: int, **values: int) -> None:
    """Raise InputError for a number, given with its name, that is too small."""
    for name, value in values.items():
        if value < least:
            raise InputError(f"{name}={value} must be {least} or more")


def require_choice(kind: str, value: object, choices: Any) -> None:
    """Raise InputError, with the nearest value, for a value that a Literal type lacks.

    Configs are validated where they are built; constructors call this for Python users.
    """
    if value not in get_args(choices):
        raise make_unknown_error(kind, value, map(str, get_args(choices)))
