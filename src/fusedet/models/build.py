"""A spec ("fpn", or {type: fpn, ...}) becomes an object: the only place where strings become classes."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

from fusedet.errors import InputError, checked, unknown

# what a message about a slot begins with: the innermost slot is named alone
_NAMES_A_SLOT = re.compile(r"(unknown (option of |value of )?)?model\.")


def resolve_class(kind: str, name: str, table: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The class of that name in a package's table, or, as "package.module:Class", from another package."""
    if name in table:
        return table[name]
    if ":" not in name:
        raise unknown(kind, name, table)
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"{kind}: '{name}' cannot be imported ({error}): it must read package.module:Class, with the package installed or its folder "
            "in PYTHONPATH"
        ) from error


def build(
    kind: str,
    spec: str | Mapping[str, Any],
    table: Mapping[str, Callable[..., Any]],
    given: Mapping[str, Any],
    offered: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Make the part that a spec names.

    kind: the slot, for messages ("model.neck"). given: what the parent knows; passed always, refused in the spec.
    offered: by the section of the config where it stands ("model.pyramid"), what only some parts ask for; passed where the
    constructor names it, refused in the spec.
    Raises InputError for an unknown type, an unknown option (the nearest is offered) or a value of the wrong type.
    """
    options = {"type": spec} if isinstance(spec, str) else dict(spec) if isinstance(spec, Mapping) else {}
    name = options.pop("type", None)
    if not isinstance(name, str):
        raise InputError(f"{kind} must be a name or have a key 'type', got {spec!r}")
    make = resolve_class(kind, name, table)
    parameters = inspect.signature(make).parameters
    sources = {k: section for section, values in (offered or {}).items() for k in values if k in parameters}
    passed = dict(given) | {k: (offered or {})[section][k] for k, section in sources.items()}
    hints = get_type_hints(make.__init__ if inspect.isclass(make) else make)
    for key, value in options.items():
        if key in sources:
            raise InputError(f"{kind}.{key} is not set here: set {sources[key]}.{key}")
        if key in passed:
            raise InputError(f"{kind}.{key} is not set here: the model passes {key} by itself")
        if key not in parameters:
            raise unknown(f"option of {kind} '{name}':", key, set(parameters) - set(passed))
        options[key] = checked(value, hints.get(key, Any), f"{kind}.{key}")
    try:
        return make(**passed, **options)
    except InputError as error:
        text = str(error)
        raise InputError(
            text if text.startswith(kind) or _NAMES_A_SLOT.match(text) else f"{kind} '{name}': {text}"
        ) from error
