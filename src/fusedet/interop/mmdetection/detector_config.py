"""From MMDetection's config of a detector to fusedet's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.backbone_config import (
    convert_backbone,
    convert_necks,
    is_imagenet_normalization,
    read_normalization,
    read_resizing,
)
from fusedet.interop.mmdetection.config_reader import ConfigReader
from fusedet.interop.mmdetection.head_config import convert_dense_head, convert_rpn_head, read_nms_threshold
from fusedet.interop.mmdetection.roi_config import convert_roi_head

Tree = dict[str, Any]
_DENSE = ("RetinaNet", "FCOS", "VFNet", "RepPointsDetector", "SingleStageDetector")
_TWO_STAGE = ("FasterRCNN", "MaskRCNN", "CascadeRCNN", "GridRCNN", "TwoStageDetector")
DETECTORS = (*_DENSE, *_TWO_STAGE)
_ROI_OF_1X = {"CascadeRCNN": "CascadeRoIHead", "GridRCNN": "GridRoIHead"}
_ROI_KEYS_OF_1X = (
    "bbox_roi_extractor",
    "bbox_head",
    "mask_roi_extractor",
    "mask_head",
    "grid_roi_extractor",
    "grid_head",
    "num_stages",
)


@dataclass(frozen=True)
class DetectorConfig:
    """fusedet's config as a tree; whether the weights take BGR; notes, what differs or was not taken over."""

    tree: Tree
    bgr: bool
    notes: list[str]


def convert_config(config: Mapping[str, Any], keys: Mapping[str, Any], legacy: bool = False) -> DetectorConfig:
    """fusedet's config for MMDetection's. keys: of the checkpoint. legacy: whether RoIAlign is the 1.x line's where the config is silent.

    Raises InputError that names the first thing that is not here.
    """
    notes: list[str] = []
    values = config.get("model")
    if not isinstance(values, Mapping):
        raise InputError("MMDetection's config has no `model`: give the one that the checkpoint was trained with")
    values = _as_today(values, config)
    model = ConfigReader("model", values, notes)
    kind = str(model.get("type")).rpartition(".")[2]
    if kind not in DETECTORS:
        raise InputError(f"MMDetection's detector {kind} is not here: {', '.join(DETECTORS)} can be converted")
    for key in ("backbone", "neck", *(("bbox_head",) if kind in _DENSE else ("rpn_head", "roi_head"))):
        if not values.get(key):
            raise InputError(f"MMDetection's config has no model.{key}: give the whole config")
    body = convert_backbone(body_part := model.get_section("backbone"))
    body_part.note_unread("base_width", "groups", "style")
    necks, pyramid = convert_necks(model.get_sections("neck"))
    train, test = model.get_section("train_cfg"), model.get_section("test_cfg")
    found: Tree = {"backbone": body, "pyramid": pyramid, "neck": necks}
    if kind in _DENSE:
        found["head"] = convert_dense_head(model.get_section("bbox_head"), train, pyramid, keys)
    else:
        proposals = test.get_section("rpn")
        found["head"] = convert_rpn_head(
            model.get_section("rpn_head"),
            train.get_section("rpn"),
            train.get_section("rpn_proposal"),
            proposals,
            pyramid,
        )
        found["roi"] = convert_roi_head(model.get_section("roi_head"), train.get_sections("rcnn"), legacy)
        test = test.get_section("rcnn")
        test.values.setdefault("nms_pre", proposals.values.get("nms_pre"))
    pixels = read_normalization({**config, "model": values}, notes)
    if pixels is None:
        notes.append("how images are normalised is not said: RGB and ImageNet's mean and deviation are taken")
    elif not is_imagenet_normalization(*pixels[:2]):
        body |= {"mean": pixels[0], "std": pixels[1]}
    settings = {"score": test.get_float("score_thr", 0.05), "nms": read_nms_threshold(test, 0.5)}
    settings["max_det"] = _count(test, ("max_per_img", "max_num"), 100)
    settings["pre_nms"] = _count(test, ("nms_pre",), 1000)
    model.note_unread("data_preprocessor", "train_cfg", "test_cfg", "rpn_head", "roi_head", "bbox_head")
    tree = {"model": found, "data": read_resizing(config, notes), "test": settings}
    bgr = pixels is not None and pixels[2]
    return DetectorConfig(tree | ({} if kind in _DENSE else {"train": {"lr": 0.02}}), bgr, notes)


def read_backbone_settings(config: Mapping[str, Any], given: Mapping[str, Any], name: str) -> DetectorConfig:
    """What a body's weights need and do not show, as MMDetection's config in the checkpoint says it: style, mean and std; whether BGR.

    config: empty where there is none. given: model.backbone of the config here that is to be used, called `name`; what it says itself
    must be the same. Raises InputError where it is not.
    """
    notes: list[str] = []
    model = config.get("model")
    values = model if isinstance(model, Mapping) else {}
    facts: Tree = {}
    pixels = None
    if values.get("backbone"):
        facts["style"] = convert_backbone(ConfigReader("model.backbone", values["backbone"], notes)).get(
            "style", "pytorch"
        )
        pixels = read_normalization({**config, "model": values}, notes)
        notes.append(
            f"the body's style and pixels and the resizing are those of the checkpoint's own config, all else is that of {name}"
        )
    if pixels is None:
        notes.append(
            f"the checkpoint does not say how its images were: RGB, no antialiasing, and mean and style as {name} has them, are taken; "
            "if it was trained caffe-style or with BGR, give MMDetection's config"
        )
    else:
        facts |= {"mean": pixels[0], "std": pixels[1]}
    for key, value in facts.items():
        if (own := given.get(key)) is not None and not _same(own, value):
            raise InputError(
                f"model.backbone.{key}={own} of --config={name} is not what the checkpoint was trained with: its own config says {value}"
            )
    return DetectorConfig(facts, pixels is not None and pixels[2], notes)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, str):
        return bool(a == b)
    return len(a) == len(b) and all(abs(x - y) < 5e-3 for x, y in zip(a, b))


def uses_1x_keys(config: Mapping[str, Any]) -> bool:
    """Whether a config is in the words of the 1.x line: anchors in the head, or RoI heads beside it."""
    model = config.get("model")
    heads = [model.get(key) for key in ("bbox_head", "rpn_head")] if isinstance(model, Mapping) else []
    named = any(isinstance(head, Mapping) and ("anchor_strides" in head or "anchor_scales" in head) for head in heads)
    return named or (isinstance(model, Mapping) and "bbox_roi_extractor" in model)


def is_1x_checkpoint(config: Mapping[str, Any], keys: Mapping[str, Any], version: str = "") -> bool:
    """Whether a checkpoint is of MMDetection's 1.x line: by its version, else by the names that only that line has."""
    if version:
        return version.startswith(("0.", "1."))
    old = ("bbox_head.fc_cls.weight", "bbox_head.0.fc_cls.weight", "bbox_head.fcos_cls.weight")
    return uses_1x_keys(config) or any(key in keys for key in old)


def _as_today(model: Mapping[str, Any], config: Mapping[str, Any]) -> Tree:
    """A model of any line in the form of 3.x: RoI heads under roi_head, train_cfg and test_cfg inside."""
    found = dict(model)
    for key in ("train_cfg", "test_cfg"):
        if not isinstance(found.get(key) or {}, Mapping):
            raise InputError(f"MMDetection's model.{key} must be a mapping, got {found[key]!r}")
        outside = config.get(key)
        if not found.get(key) and isinstance(outside, Mapping) and "type" not in outside:
            found[key] = outside
    if "roi_head" not in found and found.get("bbox_roi_extractor"):
        found["roi_head"] = {k: found.pop(k) for k in _ROI_KEYS_OF_1X if k in found}
        found["roi_head"]["type"] = _ROI_OF_1X.get(str(found.get("type")), "StandardRoIHead")
        weights = (found.get("train_cfg") or {}).get("stage_loss_weights")
        if weights:
            found["roi_head"]["stage_loss_weights"] = weights
    head = found.get("bbox_head")
    for key in ("train_cfg", "test_cfg"):  # a head may carry its own
        if not found.get(key) and isinstance(head, Mapping) and head.get(key):
            found[key] = head[key]
    return found


def _count(test: ConfigReader, names: tuple[str, ...], default: int) -> int:
    value = next((test.get_int(name, default) for name in names if test.get(name) is not None), default)
    return value if value > 0 else 100_000  # -1 is "all"
