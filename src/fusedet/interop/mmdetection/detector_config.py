"""Convert MMDetection's config of a detector to fusedet's config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fusedet.errors import InputError
from fusedet.interop.mmdetection.backbone_config import (
    convert_backbone,
    convert_necks,
    convert_plugins,
    read_normalization,
    read_resizing,
)
from fusedet.interop.mmdetection.config_reader import ConfigReader
from fusedet.interop.mmdetection.head_config import (
    convert_dense_head,
    convert_rpn_head,
    read_nms_threshold,
    read_soft_nms,
    require_no_least_side,
)
from fusedet.interop.mmdetection.roi_config import convert_roi_head

Tree = dict[str, Any]
_IMAGENET = {
    "mean": [255 * value for value in IMAGENET_DEFAULT_MEAN],
    "std": [255 * value for value in IMAGENET_DEFAULT_STD],
}
_ATSS_FAMILY = ("ATSS", "GFL", "PAA", "TOOD", "DDOD")
_MATCHING = ("FOVEA", "FSAF", "YOLOF", "AutoAssign")
_DENSE = ("RetinaNet", "FCOS", "VFNet", "RepPointsDetector", *_ATSS_FAMILY, *_MATCHING, "SingleStageDetector")
_TWO_STAGE = ("FasterRCNN", "MaskRCNN", "CascadeRCNN", "GridRCNN", "TridentFasterRCNN", "TwoStageDetector")
DETECTORS = (*_DENSE, "RPN", *_TWO_STAGE)
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
    """A converted config.

    Attributes:
        tree: fusedet's config as a nested mapping.
        bgr: Whether the weights expect BGR images.
        notes: What differs or was not converted.
    """

    tree: Tree
    bgr: bool
    notes: list[str]


def convert_config(config: Mapping[str, Any], keys: Mapping[str, Any], legacy: bool = False) -> DetectorConfig:
    """Convert MMDetection's config.

    Args:
        config: MMDetection's config.
        keys: Weights of the checkpoint by name.
        legacy: Whether RoIAlign is that of MMDetection 1.x unless the config says otherwise.

    Raises:
        InputError: A part or value is not supported; the message names it.
    """
    notes: list[str] = []
    values = config.get("model")
    if not isinstance(values, Mapping):
        raise InputError("MMDetection's config has no `model`: use the config that the checkpoint was trained with")
    values = _modernize(values, config)
    model = ConfigReader("model", values, notes)
    kind = str(model.get("type")).rpartition(".")[2]
    if kind not in DETECTORS:
        raise InputError(
            f"MMDetection's detector {kind} is not supported: supported detectors are {', '.join(DETECTORS)}"
        )
    heads = ("bbox_head",) if kind in _DENSE else ("rpn_head",) if kind == "RPN" else ("rpn_head", "roi_head")
    outputs = model.get_section("backbone").get("out_indices")
    ends_at_c4 = outputs is not None and list(outputs) == [2]
    for key in ("backbone", *heads):
        if not values.get(key):
            raise InputError(f"MMDetection's config has no model.{key}: use the complete config")
    if not ends_at_c4 and not values.get("neck"):
        raise InputError(
            "MMDetection's config has no model.neck: use the complete config; the only detectors without a neck that "
            "are supported are those on C4, with model.backbone.out_indices=[2]"
        )
    backbone = convert_backbone(model.get_section("backbone"))
    if ends_at_c4:
        model.require_value("neck", None)
        necks, pyramid = "identity", {"finest": 4, "coarsest": 4}
    else:
        necks, pyramid = convert_necks(model.get_sections("neck"), outputs is not None and list(outputs) == [3])
    train, test = model.get_section("train_cfg"), model.get_section("test_cfg")
    tests = [test]
    tree: Tree = {"model": {"backbone": backbone, "pyramid": pyramid, "neck": necks}}
    if plugin := convert_plugins(model.get_section("backbone")):
        tree["model"]["plugin"] = plugin
    if kind in _DENSE:
        require_no_least_side(test)
        tree["model"]["head"] = convert_dense_head(model.get_section("bbox_head"), train, pyramid, keys)
    else:
        proposals = test.get_section("rpn")
        tests.append(proposals)
        tree["model"]["head"] = convert_rpn_head(model.get_section("rpn_head"), train, proposals, pyramid)
        tree["train"] = {"lr": 0.02}
        if kind == "RPN":
            defaults, test = {"score_thr": 0.0, "max_per_img": 1000, "nms": {"iou_threshold": 0.7}}, proposals
            test.values = defaults | test.values
        else:
            tree["model"]["roi"] = convert_roi_head(model.get_section("roi_head"), train.get_sections("rcnn"), legacy)
            test = test.get_section("rcnn")
            tests.append(test)
            if model.get_section("roi_head").get("mask_head"):
                test.require_value("mask_thr_binary", 0.5)
            test.values.setdefault("nms_pre", proposals.values.get("nms_pre"))
    normalization = read_normalization({**config, "model": values}, notes)
    if normalization is None:
        notes.append("the config has no image normalization: RGB and ImageNet's mean and std are assumed")
    else:
        given = dict(zip(("mean", "std"), normalization))
        backbone |= {} if all(_is_close(given[key], _IMAGENET[key]) for key in given) else given
    tree["test"] = {
        "score": test.get_float("score_thr", 0.05),
        "nms": read_nms_threshold(test, 0.5, soft=True),
        "max_det": _read_count(test, "max_per_img", "max_num", default=100),
        "pre_nms": _read_count(test, "nms_pre", default=1000),
        **read_soft_nms(test),
    }
    for reader in tests:
        # limits have several names; the number of candidates of the RPN is read with the settings of the detections
        reader.note_unread("max_per_img", "max_num", "nms_post", "nms_pre", "mask_thr_binary", "keep_all_stages")
    model.note_unread("data_preprocessor", "rpn_head", "roi_head", "bbox_head")
    tree["data"] = read_resizing(config, notes)
    return DetectorConfig(tree, normalization is not None and normalization[2], notes)


def read_backbone_settings(config: Mapping[str, Any], given: Mapping[str, Any], name: str) -> DetectorConfig:
    """Read the backbone's settings that its weights do not show from the checkpoint's own MMDetection config.

    These are style, mean, std and the channel order.

    Args:
        config: MMDetection's config; may be empty.
        given: `model.backbone` of the fusedet config to use; its own settings must agree.
        name: Name of the fusedet config in messages.

    Raises:
        InputError: The fusedet config has another setting.
    """
    notes: list[str] = []
    model = config.get("model")
    facts: Tree = {}
    normalization = None
    if isinstance(model, Mapping) and model.get("backbone"):
        backbone = convert_backbone(ConfigReader("model.backbone", model["backbone"], []))
        facts["style"] = backbone.get("style", "pytorch")
        normalization = read_normalization(config, notes)
        notes.append(
            "the backbone's style, normalization and resizing are those of the checkpoint's own config, everything "
            f"else is that of {name}"
        )
    if normalization is None:
        notes.append(
            "the checkpoint has no preprocessing: RGB, no antialiasing, and mean and style of "
            f"{name} are assumed; if it was trained caffe-style or with BGR, use MMDetection's config"
        )
    else:
        facts |= {"mean": normalization[0], "std": normalization[1]}
    for key, value in facts.items():
        if (own := given.get(key)) is not None and not _is_close(own, value):
            raise InputError(
                f"model.backbone.{key}={own} of --config={name} is not what the checkpoint was trained with: its own "
                f"config has {value}"
            )
    return DetectorConfig(facts, normalization is not None and normalization[2], notes)


def _is_close(a: Any, b: Any) -> bool:
    if isinstance(a, str):
        return bool(a == b)
    return len(a) == len(b) and all(abs(x - y) < 5e-3 for x, y in zip(a, b))


def uses_1x_keys(config: Mapping[str, Any]) -> bool:
    """Return whether a config has the keys of MMDetection 1.x: anchors in the head, or RoI heads beside it."""
    model = config.get("model")
    if not isinstance(model, Mapping):
        return False
    heads = [head for key in ("bbox_head", "rpn_head") if isinstance(head := model.get(key), Mapping)]
    return "bbox_roi_extractor" in model or any({"anchor_strides", "anchor_scales"} & head.keys() for head in heads)


def is_1x_checkpoint(config: Mapping[str, Any], keys: Mapping[str, Any], version: str = "") -> bool:
    """Return whether a checkpoint is of MMDetection 1.x: by its version, else by names that only 1.x has."""
    if version:
        return version.startswith(("0.", "1."))
    old = {"bbox_head.fc_cls.weight", "bbox_head.0.fc_cls.weight", "bbox_head.fcos_cls.weight"}
    return uses_1x_keys(config) or not old.isdisjoint(keys)


def _modernize(model: Mapping[str, Any], config: Mapping[str, Any]) -> Tree:
    """Convert the model of any version to the layout of 3.x: roi_head, and train_cfg and test_cfg inside."""
    modern = dict(model)
    head = modern.get("bbox_head")
    for key in ("train_cfg", "test_cfg"):
        if not isinstance(modern.get(key) or {}, Mapping):
            raise InputError(f"MMDetection's model.{key} must be a mapping, got {modern[key]!r}")
        outside = config.get(key)
        if not modern.get(key) and isinstance(outside, Mapping) and "type" not in outside:
            modern[key] = outside
        if not modern.get(key) and isinstance(head, Mapping) and head.get(key):  # a head may carry its own
            modern[key] = head[key]
    if "roi_head" not in modern and modern.get("bbox_roi_extractor"):
        roi_head = {k: modern.pop(k) for k in _ROI_KEYS_OF_1X if k in modern}
        roi_head["type"] = _ROI_OF_1X.get(str(modern.get("type")), "StandardRoIHead")
        if weights := (modern.get("train_cfg") or {}).get("stage_loss_weights"):
            roi_head["stage_loss_weights"] = weights
        modern["roi_head"] = roi_head
    return modern


def _read_count(test: ConfigReader, *names: str, default: int) -> int:
    value = test.get_int(test.find_key(*names), default)
    return value if value > 0 else 100_000  # -1 is "all"
