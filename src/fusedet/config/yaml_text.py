"""YAML from anywhere: parsed within limits, and checked for names of foreign classes."""

import copy
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from fusedet.errors import InputError

LONGEST, LARGEST = 2**20, 100_000
"""Limits of a YAML text: characters, and values with every alias written out; a shipped config has some hundred."""


def read_yaml(path: Any, keys: str = "model, data, train, test or base") -> dict[str, Any]:
    """Read the mapping in a YAML file, as `parse_yaml` does.

    Raises:
        InputError: As for `parse_yaml`, or the file is not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    return parse_yaml(text, path, keys)


def parse_yaml(text: str, source: Any, keys: str = "model, data, train, test or base") -> dict[str, Any]:
    """Parse the mapping that a YAML text is. Nothing in it is resolved or built.

    Args:
        text: The YAML text.
        source: Where it comes from, for messages.
        keys: What it should have, for messages.

    Raises:
        InputError: For what is not YAML, is no mapping, or has more than `LARGEST` values with its aliases written out.
    """
    return copy.deepcopy(_parse(text, str(source), keys))


@lru_cache(maxsize=256)  # a table resolves the same bases and settings for each of its rows
def _parse(text: str, source: str, keys: str) -> dict[str, Any]:
    import yaml  # slow to import, and `--help` does not need it
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where PyYAML was built with it
    try:
        if len(text) > LONGEST or count_values(node := yaml.compose(text, loader), {}) > LARGEST:
            limits = f"{LONGEST} characters or {LARGEST} values"
            raise InputError(f"{source} is larger than any config: it has more than {limits}")
        is_value = isinstance(node, yaml.ScalarNode) and not node.tag.endswith((":str", ":null"))
        own: Any = None if is_value else OmegaConf.to_container(OmegaConf.create(text))  # which refuses single values
    except InputError:
        raise
    except RecursionError as error:
        raise InputError(f"{source} is not a config: its values are nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise InputError(f"{source} is not YAML: {where}{error.problem or error.context}") from error
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, ArithmeticError, TypeError, LookupError) as error:
        raise InputError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(own, dict):
        raise InputError(f"{source} must be a mapping with {keys}")
    return own


def count_values(node: Any, known: dict[int, int]) -> int:
    """Count the values of a YAML node with its aliases written out; known: the counts by node."""
    if id(node) not in known:
        known[id(node)] = LARGEST + 1  # in case an anchor contains itself
        inner = getattr(node, "value", None)
        items = inner if isinstance(inner, list) else []
        known[id(node)] = 1 + sum(
            count_values(part, known) for item in items for part in (item if isinstance(item, tuple) else (item,))
        )
    return known[id(node)]


def refuse_foreign_classes(tree: Mapping[str, Any], source: Any) -> None:
    """Raise InputError for a config from elsewhere that names a class of another package: importing it runs code.

    A class of another package has a ":" in its name, so every text of `model` with one is refused, but for the path
    of a backbone's weights.
    """
    for key, text in _texts(tree.get("model"), "model"):
        if ":" in text and key != "model.backbone.weights":
            raise InputError(
                f"{source}: {key} names {text[:200]!r}, a class that is not fusedet's: making it runs code of that "
                "package; if you trust whom the file comes from, add --trust (in Python trust=True)"
            )


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Iterate over the texts in a config with their keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (Mapping, list, tuple)):
        for name, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _texts(item, f"{key}.{name}")
