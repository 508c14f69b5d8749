"""Settings of a command: a config name, a YAML file, a run directory or a `Config`, with single settings over it.

All functions of `fusedet.api` take settings in the same two ways, which can be mixed:

- as text, like the command line: `fusedet.train("retinanet_r50", "train.epochs=24", "data=data/coco")`;
- as keywords, one per section of the config: `fusedet.train("retinanet_r50", data="data/coco", train={"epochs": 24})`.

Text is applied after keywords.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from fusedet import config
from fusedet.api import run_dir
from fusedet.api.load_model import read_stored_config, weights_file
from fusedet.config import Config
from fusedet.errors import InputError
from fusedet.interop.published_weights import is_published_name, require_source
from fusedet.process_ranks import get_ranks

Source = str | Path | Config


class Sections(TypedDict, total=False):
    """Sections of a config as keywords; `data` may be the path of the dataset."""

    model: Mapping[str, Any]
    data: str | Path | Mapping[str, Any]
    train: Mapping[str, Any]
    test: Mapping[str, Any]


class Settings(Sections, total=False):
    """All settings of a config as keywords: its sections, the device and the output directory."""

    device: str
    out: str | Path | None


def to_overrides(overrides: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
    """Return keyword settings as "key=value" texts, followed by the texts `overrides`.

    >>> to_overrides(["out=runs/a"], {"data": "coco", "train": {"epochs": 24}})
    ['data=coco', 'train.epochs=24', 'out=runs/a']

    """
    texts = []
    for key, value in settings.items():
        values = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, Mapping) else {key: value}
        texts += [f"{name}={_to_text(item)}" for name, item in values.items()]
    return [*texts, *overrides]


def _to_text(value: Any) -> str:
    return (
        str(value)
        if isinstance(value, (str, Path))
        else json.dumps(run_dir.to_plain(value), ensure_ascii=False, default=str)
    )


def resolve_config(
    source: Source | None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    trust: bool = True,
) -> Config:
    """Return the config of a source with settings laid over it.

    Args:
        source: A shipped config's name, a YAML file, a run directory (without its `out`), a name of published weights
            (the config that trains from them), a `Config`, or None for the defaults.
        overrides: "key=value" texts.
        settings: Sections, device and output directory by keyword.
        trust: Whether a run directory's config may name classes of other packages, whose code then runs.

    Raises:
        InputError: The source or a key does not exist, or a value is wrong.
        StorageError: Weights cannot be written to the cache.
    """
    texts = to_overrides(overrides, settings or {})
    if source is None or isinstance(source, Config):
        return config.parse(config.apply_overrides(source.tree() if source else {}, texts))
    if is_run_dir(source):
        return config.load(config_file(source), ["out=null", *texts], trust=trust)
    return _load_named(source, texts)


def _load_named(source: str | Path, overrides: Sequence[str]) -> Config:
    """Return the config of a shipped name or a file; of published weights, the config that trains from them."""
    if not is_published_name(source):
        if str(source) not in config.names() and not os.path.exists(source):
            require_source(source)
        return config.load(source, overrides)
    stored = read_stored_config(weights_file(source))
    has_schedule = "schedule" in config.apply_overrides({}, overrides).get("train", {})
    start = [f"train.weights={source}", *([] if has_schedule else ["train.schedule=finetune"])]
    return config.parse(config.apply_overrides(stored.tree(), [*start, *overrides]))


def training_config(
    source: Source | None, overrides: Sequence[str], settings: Mapping[str, Any], resume: bool, trust: bool
) -> Config:
    """Return the config of a training, always with an output directory.

    A `Config` keeps its `out`. For a name or a file, `out` is runs/NAME by default. A run directory is trained again in
    runs/NAME, or continued where it is with `resume`. With a name of published weights, the training starts from them.

    Args:
        source: A config, its name or file, a run directory, or a name of published weights.
        overrides: Settings as key=value.
        settings: Settings as keyword arguments.
        resume: Whether to continue the run in `out`.
        trust: Whether a config from elsewhere may name classes of other packages.

    Raises:
        InputError: As `resolve_config`; no source is given; with `resume`, `out` holds no run of this model.
    """
    if source is None:
        raise InputError(
            f"which config? Write fusedet train CONFIG data=PATH, with CONFIG one of the {len(config.names())} that "
            "fusedet info lists, such as retinanet_r50, a YAML file, a run directory or a name of fusedet weights"
        )
    if isinstance(source, Config):
        return resolve_config(source, overrides, settings)
    texts, path = to_overrides(overrides, settings), Path(source)
    if is_run_dir(source):
        options = config.load(config_file(path), [f"out={path}" if resume else "out=null", *texts], trust=trust)
    elif resume:
        options = _resumed_config(str(source), texts)
    else:
        options = _load_named(source, texts)
    if options.out is not None:
        return options
    if get_ranks()[1] > 1:
        raise InputError("several processes need one output directory: add out=DIR")
    return options.replace(out=str(run_dir.find_free_path("runs", get_source_name(source))))


def get_source_name(source: str | Path) -> str:
    """Return the last name of a run directory or of published weights, or a file's name without its suffix."""
    path = Path(source)
    return path.name if path.is_dir() or is_published_name(source) else path.stem


def _resumed_config(name: str, overrides: Sequence[str]) -> Config:
    """Return the config of the run in `out`, which must be a run of the model `name`."""
    if name not in config.names() and not Path(name).exists() and not is_published_name(name):
        raise InputError(f"{name} does not exist: there is no run to resume")
    asked = _load_named(name, overrides)
    if asked.out is None:
        raise InputError("--resume needs a run: give its directory, fusedet train RUN --resume, or add out=DIR")
    if not (Path(asked.out) / "config.yaml").is_file():
        raise InputError(f"out={asked.out} holds no run to resume: give the run directory, fusedet train RUN --resume")
    options = config.load(config_file(asked.out), [f"out={asked.out}", *overrides])
    if options.model != asked.model:
        raise InputError(
            f"{name} is not the model of the run in out={asked.out}: give the run directory, fusedet train RUN --resume"
        )
    return options


def split_overrides(overrides: Iterable[str], *keys: str) -> tuple[Config, list[str]]:
    """Return a config that only the overrides of these keys set, and the other overrides."""
    overrides = list(overrides)
    own = [text for text in overrides if text.partition("=")[0] in keys]
    return resolve_config(None, own), [text for text in overrides if text not in own]


def is_run_dir(source: str | Path) -> bool:
    """Return whether a source is a directory and no shipped config's name."""
    return str(source) not in config.names() and Path(source).is_dir()


def is_checkpoint(source: str | Path) -> bool:
    """Return whether a source is a checkpoint's file."""
    return Path(source).suffix in (".ckpt", ".safetensors") and Path(source).is_file()


def config_file(directory: str | Path) -> Path:
    """Return the config file of a run directory.

    Raises:
        InputError: The directory has no config.yaml.
    """
    file = Path(directory) / "config.yaml"
    if not file.is_file():
        raise InputError(f"{directory} is not a run directory: it has no config.yaml; did you mean data={directory}?")
    return file


def refuse_other_keys(overrides: Iterable[str], *keys: str, of: str = "a trained model") -> list[str]:
    """Return the overrides, all of which must set one of these keys or a key of these sections.

    Args:
        overrides: "key=value" texts.
        keys: Keys and sections that can be set.
        of: What the others would not change, for the message.

    Raises:
        InputError: An override sets another key of a config.
    """
    overrides = list(overrides)
    for text in overrides:
        key = text.partition("=")[0]
        known = key.partition(".")[0] in Config.model_fields
        if known and not any(f"{key}.".startswith(f"{allowed}.") for allowed in keys):
            raise InputError(f"{text} changes nothing for {of}: what can be set here is {', '.join(keys)}")
    return overrides
