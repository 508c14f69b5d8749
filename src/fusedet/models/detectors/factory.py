"""From a config's names to a detector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fusedet import config as configs
from fusedet.errors import InputError, unknown
from fusedet.models.backbones import Backbone, insert
from fusedet.models.build import build
from fusedet.models.detectors.neck_chain import Chain
from fusedet.models.detectors.one_stage import OneStage
from fusedet.models.detectors.two_stage import TwoStage
from fusedet.models.heads import HEADS
from fusedet.models.modules import INTERACTIONS, PLUGINS
from fusedet.models.necks import NECKS
from fusedet.models.roi import BRANCHES, POOLINGS, STAGES
from fusedet.types import Levels

BACKBONES = {"timm": Backbone}


def selection(test: configs.Test) -> dict[str, Any]:
    """The config's thresholds as options of `ops.boxes.select`."""
    return {"score": test.score, "iou": test.nms, "pre_nms": test.pre_nms, "max_det": test.max_det}


Detector = OneStage | TwoStage


def create_model(name: str, *overrides: str, num_classes: int = 80, **sections: Mapping[str, Any]) -> Detector:
    """A detector by the name of its config (or a YAML file), as the command line makes it.

    >>> create_model("retinanet_r50", "model.backbone.pretrained=false", num_classes=3)  # doctest: +SKIP
    >>> create_model("retinanet_r50", model={"backbone": {"pretrained": False}})  # doctest: +SKIP
    """
    return from_config(configs.load(name, overrides, sections), num_classes)


def without_weights(config: configs.Config) -> configs.Config:
    """The same config, but for the body's weights: none are fetched or asked for, where others will be loaded or only shapes are wanted."""
    backbone = config.model.backbone | {"pretrained": False, "weights": None}
    return config.replace(model=config.model.replace(backbone=backbone))


def from_config(config: configs.Config, num_classes: int) -> Detector:
    """A detector from a resolved config: of two stages where it has model.roi. Raises InputError for what cannot be built."""
    model = config.model
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}: a detector needs at least one class")
    _check_places(model)
    backbone = build("model.backbone", {"type": "timm"} | model.backbone, BACKBONES, {})
    if model.plugin:
        insert(backbone, build("model.plugin", model.plugin, PLUGINS, {}))
    neck = _neck(model, backbone.levels)
    if not model.roi:
        return OneStage(backbone, neck, _head(model, neck.levels, num_classes), selection(config.test))
    stages, branches = _roi(model.roi, neck.levels, num_classes)
    head = _head(model, neck.levels, num_classes)
    return TwoStage(backbone, neck, head, stages, branches, selection(config.test))


def bare(config: configs.Config, num_classes: int = 1) -> Detector:
    """The detector of a config without weights and without memory for them (on "meta").

    It tells names and shapes, and, as it raises InputError like `from_config`, before any data are read whether it can be built at all.
    """
    with torch.device("meta"):
        return from_config(without_weights(config), num_classes)


def _check_places(model: configs.Model) -> None:
    """The names are alike, and the nearest one is no help where a part stands in another's slot."""
    tables: dict[str, Mapping[str, Any]] = {"plugin": PLUGINS, "neck": NECKS, "interact": INTERACTIONS, "head": HEADS}
    for slot, table in tables.items():
        value = getattr(model, slot)
        for spec in value if isinstance(value, list) else [value]:
            name = spec.get("type") if isinstance(spec, Mapping) else spec
            right = [other for other, names in tables.items() if isinstance(name, str) and name in names]
            if right and name not in table:
                raise InputError(f"model.{slot}: {name} belongs in another slot, write model.{right[0]}={name}")


def _neck(model: configs.Model, levels: Levels) -> Any:
    """The neck, or the chain of necks, on a body's levels."""
    if model.neck == []:
        raise InputError("model.neck=[]: a chain needs at least one neck, such as fpn")
    necks: list[Any] = []
    for i, spec in enumerate(model.neck if isinstance(model.neck, list) else [model.neck]):
        slot = f"model.neck.{i}" if isinstance(model.neck, list) else "model.neck"
        given = {"levels": necks[-1].levels if necks else levels}
        necks.append(build(slot, spec, NECKS, given, {"model.pyramid": vars(model.pyramid)}))
    return Chain(necks) if len(necks) > 1 else necks[0]


def _head(model: configs.Model, levels: Levels, num_classes: int) -> Any:
    """The dense head; one that proposes where there is a second stage, and only there."""
    if model.roi and model.interact:
        raise InputError(
            f"model.interact={model.interact}: a two-stage detector has no two branches to exchange, leave it null"
        )

    def interact(channels: int) -> nn.Module:
        return build("model.interact", model.interact, INTERACTIONS, {"channels": channels})

    given = {"levels": levels, "num_classes": num_classes, "interact": interact if model.interact else None}
    head = build("model.head", model.head, HEADS, given)
    if model.roi and not hasattr(head, "propose"):
        raise InputError(f"model.head={model.head} makes no proposals: with model.roi it must be rpn")
    if not model.roi and hasattr(head, "propose"):
        raise InputError(
            "model.roi=null: model.head=rpn only proposes, and needs model.roi={stages: [box]} or another head"
        )
    return head


def _roi(spec: Any, levels: Levels, num_classes: int) -> tuple[list[nn.Module], list[list[nn.Module]]]:
    """The stages, and of each kind of branch one per stage, from {stages: [...], branches: [...]}."""
    if not isinstance(spec, Mapping):
        raise InputError(f"model.roi={spec!r} must be a mapping {{stages: [...], branches: [...]}}")
    for key, value in spec.items():
        if key not in ("stages", "branches"):
            raise unknown("key of model.roi:", key, ("stages", "branches"))
        if value is not None and not isinstance(value, list):
            raise InputError(f"model.roi.{key}={value!r} must be a list")
    if not spec.get("stages"):
        raise InputError("model.roi.stages=[]: a two-stage detector needs at least one stage, such as box")
    stages = [_part(f"model.roi.stages.{i}", one, STAGES, levels, num_classes) for i, one in enumerate(spec["stages"])]
    kinds = enumerate(spec.get("branches") or [])
    return stages, [
        [_part(f"model.roi.branches.{i}", one, BRANCHES, levels, num_classes) for _ in stages] for i, one in kinds
    ]


def _part(slot: str, spec: Any, table: Mapping[str, Any], levels: Levels, num_classes: int) -> nn.Module:
    """A stage or branch with its pooling, which is a spec inside the spec."""
    options = dict(spec) if isinstance(spec, Mapping) else {"type": spec}
    pooled = options.pop("pooling", "level")

    def pooling(size: int) -> nn.Module:
        return build(f"{slot}.pooling", pooled, POOLINGS, {"levels": levels, "size": size})

    return build(slot, options, table, {"levels": levels, "num_classes": num_classes, "pooling": pooling})
