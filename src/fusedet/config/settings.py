"""The list of all settings, for help texts and docs."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from fusedet.config.schema import Config
from fusedet.config.section import Declaration, describe_range, is_section, to_builtins
from fusedet.config.validation import union_members


@dataclass(frozen=True)
class Setting:
    """One setting of a config.

    Attributes:
        key: Its dotted key, "train.lr".
        group: The section that it belongs to: model, model.pyramid, data, train, test, or "" for those outside.
        type: Its type as a user writes it: "int", "[int, int] or null", "sgd | adamw".
        default: Its default as YAML: "null", "[8, 11]"; "" if it must be given.
        range: Its range, "0 to 1", or "".
        help: One sentence.
    """

    key: str
    group: str
    type: str
    default: str
    range: str
    help: str


def settings(declared: type[Declaration] = Config) -> list[Setting]:
    """List all settings, section by section."""
    return list(_settings(declared))


def _settings(section: type[Declaration]) -> Iterator[Setting]:
    nested = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if is_section(kind):
            nested.append(kind)
            continue
        key = f"{section.key}.{name}" if section.key else name
        default = "" if field.is_required() else json.dumps(to_builtins(field.get_default(call_default_factory=True)))
        help_text = field.description or ""
        yield Setting(key, section.key, _describe_type(kind), default, describe_range(field), help_text)
    for kind in nested:
        yield from _settings(kind)  # type: ignore[arg-type]


def _describe_type(hint: Any) -> str:
    members = [member for member in union_members(hint) if member is not NoneType]
    texts = [_describe_member(member) for member in members]
    return " or ".join(texts + ["null"] * (NoneType in union_members(hint)))


def _describe_member(hint: Any) -> str:
    args: Sequence[Any] = get_args(hint)
    if get_origin(hint) is Literal:
        return " | ".join(map(str, args))
    if get_origin(hint) is tuple:
        return f"[{', '.join('...' if item is Ellipsis else _describe_member(item) for item in args)}]"
    if get_origin(hint) is dict:
        return "mapping"
    return {Any: "part", dict: "mapping"}.get(hint, getattr(hint, "__name__", str(hint)))
