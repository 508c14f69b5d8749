"""Construction of parts from specs ("fpn", or {type: fpn, ...}): the only place where strings become classes."""

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, Unpack, get_args, get_origin, get_type_hints

from fusedet.config.validation import validate_value
from fusedet.errors import InputError, make_unknown_error

# beginnings of messages that name a slot: only the innermost slot is named
_NAMES_A_SLOT = re.compile(r"(unknown ((option|value) '.*' of )?)?model\.")


def resolve_class(kind: str, name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """Return the class of a name in a package's table, or, for "package.module:Class", from another package.

    Raises:
        InputError: The name is unknown or cannot be imported.
    """
    if name in table:
        return table[name]
    if ":" not in name:
        raise make_unknown_error(kind, name, table)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{kind}: '{name}' cannot be imported ({error}): it must read package.module:Class, with the package "
            "installed or its folder in PYTHONPATH"
        ) from error


def constructor_options(make: Callable[..., Any]) -> tuple[set[str], dict[str, Any]]:
    """Return the names and the type hints of a constructor's arguments.

    Where it takes `**options: Unpack[TD]` with a `TypedDict` TD, they are those of TD.
    """
    names = set(inspect.signature(make).parameters)
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    for name, hint in list(hints.items()):
        if get_origin(hint) is Unpack:
            further = get_type_hints(get_args(hint)[0])
            names, hints = names - {name} | set(further), hints | further
    return names, hints


def build(
    kind: str,
    spec: str | Mapping[str, Any],
    table: Mapping[str, Callable[..., Any]],
    given: Mapping[str, Any],
    offered: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Build the part that a spec names, with its options validated against the constructor's type hints.

    Args:
        kind: The slot, for messages ("model.neck").
        spec: A name, or a mapping with the key `type` and options.
        table: Names and classes of the slot.
        given: Arguments that the parent passes to every part; refused in the spec.
        offered: Arguments that only some parts take, by the config section where they stand ("model.pyramid"). They are
            passed where the constructor names them, and refused in the spec.

    Raises:
        InputError: An unknown type, an unknown option (with the nearest name), or a value of the wrong type.
    """
    options = {"type": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise InputError(f"{kind} must be a name or have a key 'type', got {spec!r}")
    make = resolve_class(kind, name, table)
    parameters, hints = constructor_options(make)
    sources = {k: section for section, values in (offered or {}).items() for k in values if k in parameters}
    passed = dict(given) | {k: (offered or {})[section][k] for k, section in sources.items()}
    for key, value in options.items():
        if key in sources:
            raise InputError(f"{kind}.{key} is not set here: set {sources[key]}.{key}")
        if key in passed:
            raise InputError(f"{kind}.{key} is not set here: the model passes {key} by itself")
        if key not in parameters:
            raise make_unknown_error("option", key, parameters - set(passed), of=f"{kind} '{name}'")
        options[key] = validate_value(value, hints.get(key, Any), f"{kind}.{key}")
    try:
        return make(**passed, **options)
    except InputError as error:
        text = str(error)
        raise InputError(
            text if text.startswith(kind) or _NAMES_A_SLOT.match(text) else f"{kind} '{name}': {text}"
        ) from error
