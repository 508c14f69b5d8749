"""Build a detector from a config."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from fusedet import config as configs
from fusedet.config import validate_value
from fusedet.errors import InputError, make_unknown_error
from fusedet.models.backbones import LastStage, TimmBackbone, insert_plugin
from fusedet.models.build import build, resolve_class
from fusedet.models.detectors.neck_chain import NeckChain
from fusedet.models.detectors.one_stage import OneStage
from fusedet.models.detectors.two_stage import TwoStage
from fusedet.models.heads import HEADS
from fusedet.models.modules import INTERACTIONS, PLUGINS
from fusedet.models.necks import NECKS
from fusedet.models.ops.scale_ranges import ScaleRange
from fusedet.models.ops.soft_nms import SoftNMS
from fusedet.models.protocols import (
    AuxiliaryNeck,
    BranchedBackbone,
    BranchInteraction,
    DenseHead,
    Neck,
    ProposalHead,
    RoIBranch,
    RoIPooling,
    RoIStage,
)
from fusedet.models.roi import BRANCHES, POOLINGS, STAGES
from fusedet.models.roi.pooling import AllLevelPooling, PoolingFactory
from fusedet.types import Levels

BACKBONES = {"timm": TimmBackbone}
ROI_KEYS = ("stages", "branches", "valid_ranges")

DetectorModule = OneStage | TwoStage
"""A detector that the factory builds: an `nn.Module` with the contract of `models.protocols.Detector`."""


def create_model(name: str, *overrides: str, num_classes: int = 80, **sections: Mapping[str, Any]) -> DetectorModule:
    """Build a detector by the name of a shipped config or from a YAML file.

    >>> create_model("retinanet_r50", "model.backbone.pretrained=false", num_classes=3)  # doctest: +SKIP
    >>> create_model("retinanet_r50", model={"backbone": {"pretrained": False}})  # doctest: +SKIP

    Args:
        name: Name of a shipped config, or path of a YAML file.
        overrides: Settings as on the command line, `key=value`.
        num_classes: K, the number of classes.
        sections: Settings by section of the config.

    Raises:
        InputError: The config is invalid, or its detector cannot be built.
    """
    return build_detector(configs.load(name, overrides, sections), num_classes)


def build_detector(config: configs.Config, num_classes: int) -> DetectorModule:
    """Build the detector of a resolved config, with two stages if `model.roi` is set.

    Raises:
        InputError: The parts do not fit together, or an option is unknown or out of its range.
    """
    model = config.model
    if num_classes < 1:
        raise InputError(f"num_classes={num_classes}: a detector needs at least one class")
    _check_slots(model)
    backbone = build(
        "model.backbone", {"type": "timm"} | model.backbone, BACKBONES, {}, {"data": {"channels": config.data.channels}}
    )
    if model.plugin:
        insert_plugin(backbone, build("model.plugin", model.plugin, PLUGINS, {}))
    last_stage = _take_last_stage(model.roi, backbone)
    neck = _build_neck(model, backbone.levels)
    if not model.roi:
        if isinstance(backbone, BranchedBackbone) and backbone.branches > 1:
            raise InputError("model.backbone.trident_stages: a one-stage detector has no branches, set model.roi")
        return OneStage(backbone, neck, _build_head(model, neck.levels, num_classes), selection_options(config.test))
    stages, branches, auxiliary_stages = _build_roi(model.roi, neck, num_classes, last_stage)
    head = _build_head(model, neck.levels, num_classes)
    assert isinstance(head, ProposalHead)
    ranges = validate_value(model.roi.get("valid_ranges") or [], list[ScaleRange], "model.roi.valid_ranges")
    return TwoStage(backbone, neck, head, stages, branches, selection_options(config.test), auxiliary_stages, ranges)


def build_meta_detector(config: configs.Config, num_classes: int = 1) -> DetectorModule:
    """Build the detector of a config on the meta device: names and shapes without weights and memory.

    Raises:
        InputError: As `build_detector`; so a config can be checked before the dataset is read.
    """
    with torch.device("meta"):
        return build_detector(disable_pretrained(config), num_classes)


def disable_pretrained(config: configs.Config) -> configs.Config:
    """Return the config without pretrained backbone weights, for a detector that is loaded from a checkpoint."""
    backbone = config.model.backbone | {"pretrained": False, "weights": None}
    return config.replace(model=config.model.replace(backbone=backbone))


def selection_options(test: configs.Test, names: Sequence[str] = ()) -> dict[str, Any]:
    """Return the config's test thresholds as options of `ops.boxes.select_detections`.

    Args:
        test: The section. Its `score` may hold a threshold per class name, and one for the others as "default".
        names: The K class names; without them, the lowest of several thresholds is that of all classes.

    Raises:
        InputError: A threshold is that of an unknown class.
    """
    score: float | list[float]
    if isinstance(test.score, dict):
        by_name = {"default": configs.Test.model_fields["score"].default} | test.score
        if wrong := [name for name in test.score if names and name not in ("default", *names)]:
            raise make_unknown_error("class", wrong[0], names, of="test.score")
        score = [by_name.get(n, by_name["default"]) for n in names] if names else min(by_name.values())
    else:
        score = test.score
    options = {"score": score, "iou": test.nms, "pre_nms": test.pre_nms, "max_det": test.max_det}
    soft = SoftNMS(test.soft_nms, test.soft_sigma, test.soft_min_score) if test.soft_nms else None
    return options | ({"soft": soft} if soft else {})


def _check_slots(model: configs.Model) -> None:
    """Refuse a part in the wrong slot; the nearest name within the slot's table would mislead."""
    tables: dict[str, Mapping[str, Any]] = {"plugin": PLUGINS, "neck": NECKS, "interact": INTERACTIONS, "head": HEADS}
    for slot, table in tables.items():
        value = getattr(model, slot)
        for spec in value if isinstance(value, list) else [value]:
            name = spec.get("type") if isinstance(spec, Mapping) else spec
            right = [other for other, names in tables.items() if isinstance(name, str) and name in names]
            if right and name not in table:
                raise InputError(f"model.{slot}: {name} belongs in another slot, write model.{right[0]}={name}")


def _build_neck(model: configs.Model, levels: Levels) -> Neck:
    """Build the neck, or the chain of necks, on the backbone's levels."""
    if model.neck == []:
        raise InputError("model.neck=[]: a chain needs at least one neck, such as fpn")
    necks: list[Neck] = []
    for i, spec in enumerate(model.neck if isinstance(model.neck, list) else [model.neck]):
        slot = f"model.neck.{i}" if isinstance(model.neck, list) else "model.neck"
        given = {"levels": necks[-1].levels if necks else levels}
        necks.append(build(slot, spec, NECKS, given, {"model.pyramid": vars(model.pyramid)}))
    return NeckChain(necks) if len(necks) > 1 else necks[0]


def _build_head(model: configs.Model, levels: Levels, num_classes: int) -> DenseHead:
    """Build the dense head: a proposal head if and only if `model.roi` is set."""
    if model.roi and model.interact:
        raise InputError(
            f"model.interact={model.interact}: a two-stage detector has no two branches to exchange, leave it null"
        )

    def interact(channels: int) -> BranchInteraction:
        return build("model.interact", model.interact, INTERACTIONS, {"channels": channels})

    given = {"levels": levels, "num_classes": num_classes, "interact": interact if model.interact else None}
    head = build("model.head", model.head, HEADS, given)
    if model.roi and not isinstance(head, ProposalHead):
        raise InputError(f"model.head={model.head} makes no proposals: with model.roi it must be rpn")
    if not model.roi and isinstance(head, ProposalHead) and num_classes > 1:
        raise InputError(
            "model.roi=null: model.head=rpn only makes proposals, which suits data of one class, not of "
            f"{num_classes}: set model.roi={{stages: [box]}} or another head"
        )
    return head


def _take_last_stage(roi: Any, backbone: TimmBackbone) -> LastStage | None:
    """Take the backbone's last stage out if an RoI stage runs it."""
    stages = roi.get("stages") if isinstance(roi, Mapping) else None
    for i, spec in enumerate(stages if isinstance(stages, list) else []):
        kind = spec.get("type") if isinstance(spec, Mapping) else spec
        if isinstance(kind, str) and _takes_last_stage(resolve_class(f"model.roi.stages.{i}", kind, STAGES)):
            return backbone.take_last_stage()
    return None


def _takes_last_stage(make: Callable[..., Any]) -> bool:
    return "last_stage" in inspect.signature(make).parameters


def _build_roi(
    spec: Any, neck: Neck, num_classes: int, last_stage: LastStage | None
) -> tuple[list[RoIStage], list[list[RoIBranch]], list[RoIStage]]:
    """Build the stages, and one branch per stage for each kind, from {stages: [...], branches: [...]}.

    For a neck with auxiliary losses also an auxiliary stage like each stage, on all laterals of the neck.
    """
    if not isinstance(spec, Mapping):
        raise InputError(f"model.roi={spec!r} must be a mapping {{stages: [...], branches: [...]}}")
    for key, value in spec.items():
        if key not in ROI_KEYS:
            raise make_unknown_error("key", key, ROI_KEYS, of="model.roi")
        if value is not None and not isinstance(value, list):
            raise InputError(f"model.roi.{key}={value!r} must be a list")
    if not spec.get("stages"):
        raise InputError("model.roi.stages=[]: a two-stage detector needs at least one stage, such as box")
    slots = {f"model.roi.stages.{i}": part for i, part in enumerate(spec["stages"])}
    stages: list[RoIStage] = [
        _build_roi_part(slot, part, STAGES, neck.levels, num_classes, last_stage=last_stage)
        for slot, part in slots.items()
    ]
    branches: list[list[RoIBranch]] = [
        [_build_roi_part(f"model.roi.branches.{i}", part, BRANCHES, neck.levels, num_classes) for _ in stages]
        for i, part in enumerate(spec.get("branches") or [])
    ]
    auxiliary_stages: list[RoIStage] = []
    if isinstance(neck, AuxiliaryNeck) and neck.auxiliary_weight:
        laterals = neck.lateral_levels
        pooling = partial(AllLevelPooling, laterals)
        auxiliary_stages = [
            _build_roi_part(slot, part, STAGES, laterals, num_classes, pooling, last_stage)
            for slot, part in slots.items()
        ]
    return stages, branches, auxiliary_stages


def _build_roi_part(
    slot: str,
    spec: Any,
    table: Mapping[str, Any],
    levels: Levels,
    num_classes: int,
    pooling: PoolingFactory | None = None,
    last_stage: LastStage | None = None,
) -> Any:
    """Build a stage or a branch; its pooling is a spec inside its own, unless one is given.

    A stage that runs the backbone's last stage gets a copy of it.
    """
    options = dict(spec) if isinstance(spec, Mapping) else {"type": spec}
    pooling_spec = options.pop("pooling", "level")

    def build_pooling(size: int) -> RoIPooling:
        return build(f"{slot}.pooling", pooling_spec, POOLINGS, {"levels": levels, "size": size})

    given: dict[str, Any] = {"levels": levels, "num_classes": num_classes, "pooling": pooling or build_pooling}
    kind = options.get("type")
    if last_stage is not None and isinstance(kind, str) and _takes_last_stage(resolve_class(slot, kind, table)):
        given["last_stage"] = copy.deepcopy(last_stage)
    return build(slot, options, table, given)
