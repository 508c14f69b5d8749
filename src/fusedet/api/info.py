"""Parameters and multiply-adds of a model: the command `info`."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Unpack

from rich.console import RenderableType

from fusedet import config as configs
from fusedet.api.load_model import COCO_CLASSES, limit_model_size, rebuild_detector, refuse_overflow, weights_file
from fusedet.api.results import CommandResult, group_lines
from fusedet.api.settings import (
    Settings,
    Source,
    is_checkpoint,
    is_run_dir,
    refuse_other_keys,
    resolve_config,
    to_overrides,
)
from fusedet.api.tables import cost_table
from fusedet.config import Config
from fusedet.errors import InputError, format_count
from fusedet.interop.published_weights import is_published_name
from fusedet.models import profiling
from fusedet.models.detectors import build_meta_detector

SETTABLE = ("model", "data.size", "test.max_det", "train.schedule")
"""What can be set where a model's cost is counted."""


@dataclass(frozen=True)
class ModelInfo(CommandResult):
    """What a model costs.

    Attributes:
        model: Its name.
        classes: Number of classes.
        cost: Parameters, trainable parameters and multiply-adds of the model and of each of `parts`, and the size of
            the `image`.
    """

    model: str
    classes: int
    cost: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return {"model": self.model, "classes": self.classes, **self.cost}

    def __rich__(self) -> RenderableType:
        return cost_table(self.cost, f"{self.model}, {format_count(self.classes, 'class')}")


@dataclass(frozen=True)
class ConfigNames(CommandResult):
    """Names of the shipped configs.

    Attributes:
        models: Of the models.
        schedules: Of the schedules (`train.schedule`).
    """

    models: list[str]
    schedules: list[str]

    def __rich__(self) -> RenderableType:
        return group_lines(f"{kind}: {', '.join(names)}" for kind, names in vars(self).items())


def info(
    config: Source | None = None,
    *overrides: str,
    classes: int | None = None,
    trust: bool = False,
    **settings: Unpack[Settings],
) -> ModelInfo | ConfigNames:
    """Count parameters, trainable parameters and multiply-adds of a model, per part; no weights are loaded.

    >>> fusedet.info("retinanet_r50").cost["trainable"]  # doctest: +SKIP
    37743348

    Args:
        config: A config's name, a YAML file, a run directory, a checkpoint, a name of published weights or a `Config`;
            without one the shipped configs are listed.
        overrides: "key=value" texts.
        classes: Number of classes; by default those of a run or checkpoint, else COCO's 80.
        trust: Whether the config of a run or checkpoint may name classes of other packages, whose code then runs.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The model does not exist or cannot be built.
    """
    texts = refuse_other_keys(to_overrides(overrides, settings), *SETTABLE, of="a model's cost")
    if config is None:
        if texts or classes is not None:
            key = texts[0] if texts else f"classes={classes}"
            raise InputError(f"{key} belongs to a config: name one, such as fusedet info retinanet_r50")
        return ConfigNames(configs.names(), configs.names("schedules"))
    name = "model" if isinstance(config, Config) else str(config)
    limit, is_trained = None, False
    if not isinstance(config, Config):
        is_trained = is_run_dir(config) or is_checkpoint(config) or is_published_name(config)
    options = None
    if not is_trained or is_run_dir(name):
        options = resolve_config(config, texts, trust=trust)
    if is_trained:
        file = weights_file(name)
        detector, saved, names, _ = rebuild_detector(file, trust)
        # the config may be somebody else's: its model has no more weights than the file
        limit = limit_model_size(len(detector.state_dict()), file)
        classes = len(names) if classes is None else classes
        options = options or resolve_config(saved, texts)
    assert options is not None
    classes = COCO_CLASSES if classes is None else classes
    with refuse_overflow(name):
        with limit or nullcontext():
            detector = build_meta_detector(options, classes)
        size = profiling.network_size(options.data.size)
        return ModelInfo(name, classes, profiling.count_cost(detector, *size, options.data.channels))
