"""Convert MMDetection's dense heads and RPN to fusedet's config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fusedet.errors import InputError, unknown
from fusedet.interop.mmdetection.config_reader import ConfigReader, read_norm_type

Tree = dict[str, Any]
Keys = Mapping[str, Any]
MAX_CONVS = 100
"""Most convolutions of a head; it bounds the size of the model that an untrusted config builds."""
_BOX_LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "BalancedL1Loss": "balanced_l1"}


def convert_dense_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """Convert the head of a one-stage detector.

    Args:
        reader: Reader of `bbox_head`.
        train: Reader of `train_cfg`.
        pyramid: `model.pyramid` of the converted config.
        keys: Weights of the checkpoint; they show whether convolutions have biases.
    """
    kind = str(reader.get("type")).rpartition(".")[2]
    if kind not in HEADS:
        raise unknown("bbox_head of MMDetection", kind, HEADS)
    return HEADS[kind](reader, train, pyramid, keys)


def convert_retina_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """Convert a RetinaHead."""
    options: Tree = {"type": "retina"} | _convert_towers(reader, pyramid, None)
    if options.get("norm"):
        options["bias"] = _has_bias(keys)
    loss = reader.get_section("loss_cls")
    loss.require_value("use_sigmoid", True)
    options |= _convert_focal_loss(loss) | convert_anchors(reader, pyramid, "octaves")
    read_box_stds(reader, [1.0] * 4)
    assigner = train.get_section("assigner")
    options |= {"positive": assigner.get_float("pos_iou_thr", 0.5), "negative": assigner.get_float("neg_iou_thr", 0.4)}
    convert_box_loss(reader, "l1")
    reader.note_unread("train_cfg", "test_cfg", "target_means", "target_stds")
    return options


def convert_fcos_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """Convert an FCOSHead."""
    options: Tree = {"type": "fcos"} | _convert_towers(reader, pyramid, "GN")
    _check_strides(reader, "strides", pyramid)
    options["bias"] = _has_bias(keys)
    names = {
        "center_sampling": "center_sampling",
        "normalize_boxes": "norm_on_bbox",
        "centerness_on_box": "centerness_on_reg",
        "deformable_last": "dcn_on_last_conv",
    }
    options |= {ours: True for ours, theirs in names.items() if reader.get_bool(theirs, False)}
    radius = reader.get_float("center_sample_radius", 1.5)
    if radius != 1.5:
        options["radius"] = radius
    ranges = reader.get_typed("regress_ranges", list[tuple[float, float]], [])
    if ranges:
        options["ranges"] = [high for _, high in ranges[:-1]]
    options |= _convert_focal_loss(reader.get_section("loss_cls"))
    kinds = {"IoULoss": "iou", "GIoULoss": "giou"}
    loss = reader.get_section("loss_bbox")
    theirs = str(loss.get("type", "IoULoss")).rpartition(".")[2]
    if theirs in kinds:
        options["box_loss"] = kinds[theirs]
    else:
        reader.notes.append(f"further training has box_loss=iou where MMDetection's config has {theirs}")
    reader.note_unread("train_cfg", "test_cfg", "loss_centerness", "conv_bias", "bbox_coder")
    return options


def convert_vfnet_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """Convert a VFNetHead."""
    options: Tree = {"type": "vfnet"} | _convert_towers(reader, pyramid, "GN")
    _check_strides(reader, "strides", pyramid)
    options["bias"] = _has_bias(keys)
    reader.require_value("use_atss", True)
    reader.require_value("sync_num_pos", True, False)
    if reader.get_bool("dcn_on_last_conv", False):
        options["deformable_last"] = True
    options["gradient_mul"] = reader.get_float("gradient_mul", 0.1)
    options["box_norm"] = reader.require_value("bbox_norm_type", "reg_denom", "stride")
    anchor = reader.get_section("anchor_generator")
    anchor.require_value("center_offset", 0.0)
    options["topk"] = train.get_section("assigner").get_int("topk", 9)
    loss = reader.get_section("loss_cls")
    options |= {"alpha": loss.get_float("alpha", 0.75), "gamma": loss.get_float("gamma", 2.0)}
    options["box_weight"] = reader.get_section("loss_bbox").get_float("loss_weight", 1.5)
    options["refine_weight"] = reader.get_section("loss_bbox_refine").get_float("loss_weight", 2.0)
    reader.note_unread(
        "train_cfg",
        "test_cfg",
        "use_vfl",
        "conv_bias",
        "center_sampling",
        "regress_ranges",
        "loss_cls_fl",
        "bbox_coder",
    )
    return options


def convert_reppoints_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """Convert a RepPointsHead."""
    options: Tree = {"type": "reppoints"} | _convert_towers(reader, pyramid, None)
    _check_strides(reader, "point_strides", pyramid)
    reader.require_value("use_grid_points", False)
    reader.require_value("center_init", True)
    options |= {
        "point_channels": reader.get_int("point_feat_channels", 256),
        "num_points": reader.get_int("num_points", 9, 1),
        "transform_method": reader.require_value("transform_method", "moment", "minmax", "partial_minmax"),
        "gradient_mul": reader.get_float("gradient_mul", 0.1),
        "moment_mul": reader.get_float("moment_mul", 0.01),
        "base_scale": reader.get_float("point_base_scale", 4),
    }
    assigner = train.get_section("refine").get_section("assigner")
    options |= {"positive": assigner.get_float("pos_iou_thr", 0.5), "negative": assigner.get_float("neg_iou_thr", 0.4)}
    loss = reader.get_section("loss_cls")
    loss.require_value("use_sigmoid", True)
    first, second = reader.get_section("loss_bbox_init"), reader.get_section("loss_bbox_refine")
    options |= _convert_focal_loss(loss) | {"beta": first.get_float("beta", 1 / 9)}
    options |= {
        "init_weight": first.get_float("loss_weight", 0.5),
        "refine_weight": second.get_float("loss_weight", 1.0),
    }
    reader.note_unread("train_cfg", "test_cfg", "bbox_coder")
    return options


HEADS: dict[str, Callable[[ConfigReader, ConfigReader, Tree, Keys], Tree]] = {
    "RetinaHead": convert_retina_head,
    "FCOSHead": convert_fcos_head,
    "VFNetHead": convert_vfnet_head,
    "RepPointsHead": convert_reppoints_head,
}


def convert_rpn_head(
    reader: ConfigReader, train: ConfigReader, proposal: ConfigReader, test: ConfigReader, pyramid: Tree
) -> Tree:
    """Convert an RPNHead.

    Args:
        reader: Reader of `rpn_head`.
        train: Reader of `train_cfg.rpn`.
        proposal: Reader of `train_cfg.rpn_proposal`.
        test: Reader of `test_cfg.rpn`.
        pyramid: `model.pyramid` of the converted config.
    """
    reader.require_type("RPNHead")
    options: Tree = {"type": "rpn"}
    if (convs := reader.get_int("num_convs", 1, 1, MAX_CONVS)) != 1:
        options["convs"] = convs
    if (channels := reader.get_int("feat_channels", 256)) != pyramid["channels"]:
        options["channels"] = channels
    loss = reader.get_section("loss_cls")
    loss.require_value("use_sigmoid", True)
    options |= convert_anchors(reader, pyramid, "scale")
    read_box_stds(reader, [1.0] * 4)
    assigner, sampler = train.get_section("assigner"), train.get_section("sampler")
    options |= {"positive": assigner.get_float("pos_iou_thr", 0.7), "negative": assigner.get_float("neg_iou_thr", 0.3)}
    options["min_positive"] = assigner.get_float("min_pos_iou", 0.3)
    options |= {"num": sampler.get_int("num", 256), "fraction": sampler.get_float("pos_fraction", 0.5)}
    if (most := sampler.get_float("neg_pos_ub", -1)) > 0:
        options["most_negatives"] = most
    if (border := train.get_float("allowed_border", -1)) >= 0:
        options["allowed_border"] = border
    options |= convert_box_loss(reader, "l1", "smooth_l1")
    options["nms"], options["proposals"] = read_nms_threshold(test, 0.7), _read_max_proposals(test, 1000)
    options["train_proposals"], options["train_pre_nms"] = (
        _read_max_proposals(proposal, options["proposals"]),
        proposal.get_int("nms_pre", 2000),
    )
    reader.note_unread("train_cfg", "test_cfg", "target_means", "target_stds")
    return options


def read_nms_threshold(test: ConfigReader, default: float) -> float:
    """Return the IoU threshold of a test_cfg's NMS."""
    inner = test.get_section("nms")
    kind = str(inner.get("type", "nms"))
    if kind != "nms":
        test.notes.append(f"{test.path}.nms is {kind}, here hard NMS with the same IoU threshold: detections differ")
    for key in ("iou_threshold", "iou_thr"):
        if inner.get(key) is not None:
            return inner.get_float(key, default)
    return test.get_float("nms_thr", default)


def _read_max_proposals(test: ConfigReader, default: int) -> int:
    return next(
        (test.get_int(key, default) for key in ("max_per_img", "max_num", "nms_post") if test.get(key) is not None),
        default,
    )


def convert_anchors(reader: ConfigReader, pyramid: Tree, kind: str) -> Tree:
    """Convert an AnchorGenerator to the "octaves" (base_scale, scales_per_octave) or the one "scale" of a head."""
    inner = reader.get_section("anchor_generator")
    old = not inner  # 1.x has them in the head
    generator = reader if old else inner
    if not old:
        generator.require_type("AnchorGenerator", "LegacyAnchorGenerator")
    ratios = generator.get_floats("anchor_ratios" if old else "ratios", (0.5, 1.0, 2.0))
    _check_strides(generator, "anchor_strides" if old else "strides", pyramid)
    for key in () if old else ("base_sizes", "centers"):
        generator.require_value(key, None)
    if not old:
        generator.require_value("scale_major", True)
    scales = generator.get_floats("anchor_scales" if old else "scales")
    base, count = (
        generator.get_float("octave_base_scale", scales[0] if scales else 4),
        generator.get_int("scales_per_octave", len(scales) or 3, 1, 100),
    )
    octaves = [base * 2 ** (i / count) for i in range(count)]
    if any(abs(a - b) > 1e-4 * b for a, b in zip(scales, octaves)) or (kind == "scale" and count != 1):
        supported = (
            "one scale" if kind == "scale" else "the scales of octaves, octave_base_scale * 2^(i / scales_per_octave)"
        )
        raise InputError(f"MMDetection's {generator.path} has the scales {scales}: only {supported} can be converted")
    options: Tree = {"scale": base} if kind == "scale" else {"base_scale": base, "scales_per_octave": count}
    options["ratios"] = ratios
    legacy = old or generator.require_type("AnchorGenerator", "LegacyAnchorGenerator") == "LegacyAnchorGenerator"
    offset = 0.5 if old else generator.get_float("center_offset", 0.0)
    return options | ({"offset": offset} if offset else {}) | ({"round_anchors": True} if legacy else {})


def read_box_stds(reader: ConfigReader, stds: list[float] | None) -> list[float]:
    """Return the standard deviations of a head's box deltas, which must be `stds` if given."""
    coder = reader.get_section("bbox_coder")
    if coder:
        coder.require_type("DeltaXYWHBBoxCoder", "LegacyDeltaXYWHBBoxCoder")
        coder.require_value("add_ctr_clamp", False)
    source = coder or reader
    default_stds = stds or [0.1, 0.1, 0.2, 0.2]
    means, values = source.get_floats("target_means", [0.0] * 4), source.get_floats("target_stds", default_stds)
    if any(means):
        raise InputError(f"MMDetection's {reader.path} has target_means={means}: only zeros are supported")
    if stds and values != stds:
        raise InputError(f"MMDetection's {reader.path} has target_stds={values}: only {stds} is supported")
    return values


def convert_box_loss(reader: ConfigReader, *kinds: str) -> Tree:
    """Convert the loss of box deltas to the options loss and beta; another loss gives a note and the first kind."""
    loss = reader.get_section("loss_bbox")
    theirs = str(loss.get("type", "L1Loss")).rpartition(".")[2]
    ours = _BOX_LOSSES.get(theirs)
    if ours not in kinds:
        reader.notes.append(
            f"further training has the box loss {kinds[0]} where MMDetection's {reader.path} has {theirs}"
        )
        ours = kinds[0]
    beta = loss.get_float("beta", 1.0)
    if ours == "balanced_l1" and (shape := (loss.get_float("alpha", 0.5), loss.get_float("gamma", 1.5), beta)) != (
        0.5,
        1.5,
        1.0,
    ):
        reader.notes.append(
            "further training has the balanced L1 loss with alpha=0.5, gamma=1.5, beta=1.0 where MMDetection's "
            f"{reader.path} has alpha={shape[0]}, gamma={shape[1]}, beta={shape[2]}"
        )
    return {} if len(kinds) == 1 else {"loss": ours} | ({"beta": beta} if ours == "smooth_l1" else {})


def _convert_towers(reader: ConfigReader, pyramid: Tree, default_norm: str | None) -> Tree:
    options: Tree = {"convs": reader.get_int("stacked_convs", 4, 0, MAX_CONVS)}
    if (channels := reader.get_int("feat_channels", 256)) != pyramid["channels"]:
        options["channels"] = channels
    return options | {"norm": read_norm_type(reader, "norm_cfg", default_norm, None, "GN") == "GN"}


def _has_bias(keys: Keys) -> bool:
    """Whether the towers' convolutions have biases; MMDetection's rule for it changed, so the checkpoint decides."""
    return any(key in keys for key in ("bbox_head.cls_convs.0.conv.bias", "bbox_head.cls_convs.0.bias"))


def _convert_focal_loss(loss: ConfigReader) -> Tree:
    return {"alpha": loss.get_float("alpha", 0.25), "gamma": loss.get_float("gamma", 2.0)}


def _check_strides(reader: ConfigReader, key: str, pyramid: Tree) -> None:
    expected = [2.0**i for i in range(pyramid["finest"], pyramid["coarsest"] + 1)]
    strides = reader.get_floats(key, expected)
    if any(not math.isclose(a, b) for a, b in zip(strides, expected)) or len(strides) != len(expected):
        raise InputError(f"MMDetection's {reader.path}.{key}={strides} must be the neck's strides {expected}")
