"""A detector from a checkpoint only; the file is validated before a model is built."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from fusedet.api.weights_cache import fetch_weights
from fusedet.config import Config, load, parse, parse_yaml, refuse_foreign_classes
from fusedet.config import names as config_names
from fusedet.engine import checkpoint
from fusedet.errors import InputError, find_nearest_name, make_unknown_error
from fusedet.exporters.reference import spread_scores
from fusedet.function_skipping import uninitialized
from fusedet.interop.published_weights import is_published_name, list_published_weights, require_source
from fusedet.models.detectors import DetectorModule, build_detector, build_meta_detector, disable_pretrained

COCO_CLASSES = 80


def require_known_source(source: str | Path) -> None:
    """Check that a source may be a run, a checkpoint or a config.

    Raises:
        InputError: It is no path and no config; the sentence offers the published weights or config that was meant.
    """
    path = Path(source)
    if path.exists() or is_published_name(source) or str(source) in config_names():
        return
    require_source(source)
    if not path.suffix and path.name == str(source):
        raise make_unknown_error("run, checkpoint or config", source, config_names(), lister="fusedet info")


def weights_file(path: str | Path, which: str = "best") -> Path:
    """Return the checkpoint file of a run directory or of a name of published weights, or the file itself.

    Published weights are fetched and converted unless they are in the cache.

    Raises:
        InputError: The run directory has no checkpoint, the name is that of a config or unknown, or its file cannot be
            fetched. The sentence offers published weights that are near to a name.
    """
    if is_published_name(path):
        return fetch_weights(path)
    path = Path(path)
    if not path.is_dir():
        if not path.exists():
            if str(path) in config_names():
                raise InputError(
                    f"{path} is a config, which has no weights: give a run directory that it was trained in"
                )
            require_source(path)
            known = list_published_weights()
            if path.name == str(path) and (meant := find_nearest_name(path.name, known)):
                kind = "run, checkpoint or published weights"
                raise make_unknown_error(kind, path, known, meant=meant, lister="fusedet weights")
        return path
    order = ["best.safetensors", "last.ckpt"] if which == "best" else ["last.ckpt"]
    for name in order:
        if (path / name).is_file():
            return path / name
    raise InputError(f"{path} holds no checkpoint: {' or '.join(order)} is missing, nothing was trained there yet")


def read_stored_config(file: Path, trust: bool = False) -> Config:
    """Return the config in a checkpoint.

    Raises:
        InputError: The file is no checkpoint, or its config names a class of another package without `trust`.
    """
    return _parse_config(checkpoint.load_weights(file)[1], file, trust)


def rebuild_detector(file: Path, trust: bool = False) -> tuple[DetectorModule, Config, list[str], list[int]]:
    """Return the detector of a checkpoint, its config, class names and category ids, from that one file.

    A model that is larger than the weights is refused before memory is allocated for it.

    Args:
        file: The checkpoint.
        trust: Whether its config may name classes of other packages, whose code then runs.

    Raises:
        InputError: The file is no checkpoint, names such a class, or its weights do not fit the config's model.
    """
    state, meta = checkpoint.load_weights(file)
    config, names = _parse_config(meta, file, trust), parse_class_names(meta, file)
    config = disable_pretrained(config)  # the weights come from the checkpoint
    ids = _list(meta["category_ids"], int, f"{file}: its category_ids")
    if len(ids) != len(names):
        raise InputError(
            f"{file} is not a fusedet checkpoint: it has {len(names)} names of classes and {len(ids)} category ids"
        )
    with uninitialized():
        with limit_model_size(len(state), file), _naming_file(file):
            checkpoint.refuse_misfit(build_meta_detector(config, len(names)), state, file)
        detector = build_detector(config, len(names))
    checkpoint.load_into(detector, state, file)
    return detector, config, names, ids


def _parse_config(meta: Mapping[str, str], file: Path, trust: bool) -> Config:
    if lacking := {"config", "names", "category_ids"} - meta.keys():
        raise InputError(f"{file} is not a fusedet checkpoint: its description lacks {', '.join(sorted(lacking))}")
    tree = parse_yaml(meta["config"], f"the config in {file}", "model, data, train and test")
    if not trust:
        refuse_foreign_classes(tree, file)
    with _naming_file(file):
        return parse(tree)


@contextmanager
def _naming_file(file: Path) -> Iterator[None]:
    """Name the checkpoint in the errors of its config, which is that of another version or was edited."""
    try:
        yield
    except InputError as error:
        if str(file) in str(error):
            raise
        raise InputError(f"{file} does not fit this version of fusedet, or its config was edited: {error}") from error


def build_with_weights(config: Config, classes: int, file: Path) -> DetectorModule:
    """Build the config's detector with a checkpoint's weights; the config stored in the file is ignored.

    Raises:
        InputError: The file cannot be read, or its weights do not fit the config's detector of that many classes.
    """
    with uninitialized():
        detector = build_detector(disable_pretrained(config), classes)
    checkpoint.load_into(detector, checkpoint.load_weights(file)[0], file)
    return detector


def is_config(source: str | Path) -> bool:
    """Return whether a source is a shipped config's name or a YAML file."""
    return str(source) in config_names() or Path(source).suffix in (".yaml", ".yml")


def build_untrained(source: str | Path, texts: Sequence[str]) -> tuple[DetectorModule, Config, list[str]]:
    """Return the detector of a config with random weights, its config and names of 80 classes.

    The weights depend on `train.seed` only, and those of the heads are spread, so that there are detections.

    Args:
        source: A shipped config's name or a YAML file.
        texts: "key=value" settings.

    Raises:
        InputError: There is no such config, or a setting is wrong.
    """
    config = disable_pretrained(load(source, texts))
    names = [f"class {i}" for i in range(COCO_CLASSES)]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        detector = build_detector(config, len(names))
        spread_scores(detector)
    return detector, config, names


def parse_class_names(meta: Mapping[str, str], file: Path | str) -> list[str]:
    """Return the class names in a checkpoint's metadata.

    Raises:
        InputError: They are no list of texts.
    """
    return _list(meta["names"], str, f"{file}: its names of classes")


def _list(text: str, kind: type, what: str) -> list[Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} are not JSON") from error
    if not isinstance(values, list) or set(map(type, values)) - {kind}:
        raise InputError(f"{what} must be a list of {kind.__name__}")
    return values


@contextmanager
def limit_model_size(weights: int, file: Path) -> Iterator[None]:
    """Refuse, inside the block, a model with many more parameters than the file has weights (`convs: 1000000000`)."""
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
        with refuse_overflow(file):
            yield
    finally:
        handle.remove()


@contextmanager
def refuse_overflow(source: Path | str) -> Iterator[None]:
    """Raise InputError, inside the block, for a model whose sizes exceed 64 bits."""
    try:
        yield
    except (RuntimeError, TypeError) as error:
        if "overflow" not in str(error).lower():
            raise
        raise InputError(f"{source}: its model has more numbers than can be counted") from error
