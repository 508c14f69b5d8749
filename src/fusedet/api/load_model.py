"""A checkpoint alone becomes a detector: what it says of itself is checked before anything is made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fusedet.config import Config, mapping, parse, refuse_outside
from fusedet.engine import checkpoint
from fusedet.errors import InputError
from fusedet.models.detectors import DetectorModule, build_detector, build_meta_detector, disable_pretrained


def weights_file(path: str | Path, which: str = "best") -> Path:
    """The checkpoint that a run's folder or a file stands for."""
    path = Path(path)
    if not path.is_dir():
        return path
    order = ["best.safetensors", "last.ckpt"] if which == "best" else ["last.ckpt"]
    for name in order:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} holds no checkpoint: {' or '.join(order)} is missing, so nothing was trained there yet")


def rebuild(file: Path, trust: bool = False) -> tuple[DetectorModule, Config, list[str], list[int]]:
    """The detector of a checkpoint, its config, class names and category ids, from that one file.

    trust: whether its config may name classes of other packages, whose code then runs.
    Raises InputError for what is no checkpoint, for such a class, and for weights that are not those of the config's model; a model that
    is larger than the weights is refused before memory is taken for it.
    """
    state, meta = checkpoint.load_weights(file)
    if lacking := {"config", "names", "category_ids"} - meta.keys():
        raise InputError(f"{file} is not a fusedet checkpoint: its description lacks {', '.join(sorted(lacking))}")
    tree = mapping(meta["config"], f"the config in {file}", "model, data, train and test")
    if not trust:
        refuse_outside(tree, file)
    config, names = disable_pretrained(parse(tree)), class_names(meta, file)  # the weights come from the checkpoint
    ids = _list(meta["category_ids"], int, f"{file}: its category_ids")
    if len(ids) != len(names):
        raise InputError(
            f"{file} is not a fusedet checkpoint: it has {len(names)} names of classes and {len(ids)} category ids"
        )
    with at_most(len(state), file):
        checkpoint.refuse_misfit(build_meta_detector(config, len(names)), state, file)
    detector = build_detector(config, len(names))
    checkpoint.load_into(detector, state, file)
    return detector, config, names, ids


def with_weights(config: Config, classes: int, file: Path) -> DetectorModule:
    """The config's detector with a checkpoint's weights; what the file says of itself is not asked: only the config was checked."""
    detector = build_detector(disable_pretrained(config), classes)
    checkpoint.load_into(detector, checkpoint.load_weights(file)[0], file)
    return detector


def class_names(meta: Mapping[str, str], file: Path | str) -> list[str]:
    """The names of the classes in a checkpoint's description; raises InputError where they are no list of texts."""
    return _list(meta["names"], str, f"{file}: its names of classes")


def _list(text: str, kind: type, what: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} are not JSON") from error
    if not isinstance(found, list) or set(map(type, found)) - {kind}:
        raise InputError(f"{what} must be a list of {kind.__name__}")
    return found


@contextmanager
def at_most(weights: int, file: Path) -> Iterator[None]:
    """Stops the making of a model that has many more parts than the file has weights (convs: 1000000000), or uncountable ones."""
    parameters, count = 10 * weights + 1000, 0

    def add(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        nonlocal count
        count += 1
        if count > parameters:
            raise InputError(
                f"{file} does not fit the model of its own config: that has more than {parameters} weights"
            )

    handle = register_module_parameter_registration_hook(add)
    try:
        with countable(file):
            yield
    finally:
        handle.remove()


@contextmanager
def countable(source: Path | str) -> Iterator[None]:
    """Raises InputError for a model whose sizes go beyond 64 bits, in place of torch's own words."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError(f"{source}: its model has more numbers than can be counted") from error
