"""MMDetection's dense heads as fusedet's config says them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fusedet.errors import InputError, unknown
from fusedet.interop.mmdetection.config_reader import ConfigReader, read_norm_type

Tree = dict[str, Any]
Keys = Mapping[str, Any]
LAYERS = 100
"""How many convolutions a head of a config may have: what is built of it is bounded."""
_BOX_LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "BalancedL1Loss": "balanced_l1"}


def convert_dense_head(part: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """The head of a one-stage detector. keys: of the checkpoint, which tell about biases."""
    kind = str(part.get("type")).rpartition(".")[2]
    if kind not in HEADS:
        raise unknown("bbox_head of MMDetection", kind, HEADS)
    return HEADS[kind](part, train, pyramid, keys)


def convert_retina_head(part: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """RetinaHead."""
    found: Tree = {"type": "retina"} | _towers(part, pyramid, None)
    if found.get("norm"):
        found["bias"] = _has_bias(keys)
    loss = part.get_section("loss_cls")
    loss.require_value("use_sigmoid", True)
    found |= _focal(loss) | convert_anchors(part, pyramid, "octaves")
    read_box_stds(part, [1.0] * 4)
    assigner = train.get_section("assigner")
    found |= {"positive": assigner.get_float("pos_iou_thr", 0.5), "negative": assigner.get_float("neg_iou_thr", 0.4)}
    convert_box_loss(part, "l1")
    part.note_unread("train_cfg", "test_cfg", "target_means", "target_stds")
    return found


def convert_fcos_head(part: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """FCOSHead."""
    found: Tree = {"type": "fcos"} | _towers(part, pyramid, "GN")
    _strides(part, "strides", pyramid)
    found["bias"] = _has_bias(keys)
    names = {
        "center_sampling": "center_sampling",
        "normalize_boxes": "norm_on_bbox",
        "centerness_on_box": "centerness_on_reg",
        "deformable_last": "dcn_on_last_conv",
    }
    found |= {ours: True for ours, theirs in names.items() if part.get_bool(theirs, False)}
    radius = part.get_float("center_sample_radius", 1.5)
    if radius != 1.5:
        found["radius"] = radius
    ranges = part.get_typed("regress_ranges", list[tuple[float, float]], [])
    if ranges:
        found["ranges"] = [high for _, high in ranges[:-1]]
    found |= _focal(part.get_section("loss_cls"))
    kinds = {"IoULoss": "iou", "GIoULoss": "giou"}
    loss = part.get_section("loss_bbox")
    theirs = str(loss.get("type", "IoULoss")).rpartition(".")[2]
    if theirs in kinds:
        found["box_loss"] = kinds[theirs]
    else:
        part.notes.append(f"further training has box_loss=iou where MMDetection's config has {theirs}")
    part.note_unread("train_cfg", "test_cfg", "loss_centerness", "conv_bias", "bbox_coder")
    return found


def convert_vfnet_head(part: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """VFNetHead."""
    found: Tree = {"type": "vfnet"} | _towers(part, pyramid, "GN")
    _strides(part, "strides", pyramid)
    found["bias"] = _has_bias(keys)
    part.require_value("use_atss", True)
    part.require_value("sync_num_pos", True, False)
    if part.get_bool("dcn_on_last_conv", False):
        found["deformable_last"] = True
    found["gradient_mul"] = part.get_float("gradient_mul", 0.1)
    found["box_norm"] = part.require_value("bbox_norm_type", "reg_denom", "stride")
    anchor = part.get_section("anchor_generator")
    anchor.require_value("center_offset", 0.0)
    found["topk"] = train.get_section("assigner").get_int("topk", 9)
    loss = part.get_section("loss_cls")
    found |= {"alpha": loss.get_float("alpha", 0.75), "gamma": loss.get_float("gamma", 2.0)}
    found["box_weight"] = part.get_section("loss_bbox").get_float("loss_weight", 1.5)
    found["refine_weight"] = part.get_section("loss_bbox_refine").get_float("loss_weight", 2.0)
    part.note_unread(
        "train_cfg",
        "test_cfg",
        "use_vfl",
        "conv_bias",
        "center_sampling",
        "regress_ranges",
        "loss_cls_fl",
        "bbox_coder",
    )
    return found


def convert_reppoints_head(part: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """RepPointsHead."""
    found: Tree = {"type": "reppoints"} | _towers(part, pyramid, None)
    _strides(part, "point_strides", pyramid)
    part.require_value("use_grid_points", False)
    part.require_value("center_init", True)
    found |= {
        "point_channels": part.get_int("point_feat_channels", 256),
        "num_points": part.get_int("num_points", 9, 1),
        "transform_method": part.require_value("transform_method", "moment", "minmax", "partial_minmax"),
        "gradient_mul": part.get_float("gradient_mul", 0.1),
        "moment_mul": part.get_float("moment_mul", 0.01),
        "base_scale": part.get_float("point_base_scale", 4),
    }
    assigner = train.get_section("refine").get_section("assigner")
    found |= {"positive": assigner.get_float("pos_iou_thr", 0.5), "negative": assigner.get_float("neg_iou_thr", 0.4)}
    loss = part.get_section("loss_cls")
    loss.require_value("use_sigmoid", True)
    first, second = part.get_section("loss_bbox_init"), part.get_section("loss_bbox_refine")
    found |= _focal(loss) | {"beta": first.get_float("beta", 1 / 9)}
    found |= {"init_weight": first.get_float("loss_weight", 0.5), "refine_weight": second.get_float("loss_weight", 1.0)}
    part.note_unread("train_cfg", "test_cfg", "bbox_coder")
    return found


HEADS: dict[str, Callable[[ConfigReader, ConfigReader, Tree, Keys], Tree]] = {
    "RetinaHead": convert_retina_head,
    "FCOSHead": convert_fcos_head,
    "VFNetHead": convert_vfnet_head,
    "RepPointsHead": convert_reppoints_head,
}


def convert_rpn_head(
    part: ConfigReader, train: ConfigReader, proposal: ConfigReader, test: ConfigReader, pyramid: Tree
) -> Tree:
    """RPNHead; train, proposal, test: MMDetection's train_cfg.rpn, train_cfg.rpn_proposal and test_cfg.rpn."""
    part.require_type("RPNHead")
    found: Tree = {"type": "rpn"}
    if (convs := part.get_int("num_convs", 1, 1, LAYERS)) != 1:
        found["convs"] = convs
    if (channels := part.get_int("feat_channels", 256)) != pyramid["channels"]:
        found["channels"] = channels
    loss = part.get_section("loss_cls")
    loss.require_value("use_sigmoid", True)
    found |= convert_anchors(part, pyramid, "scale")
    read_box_stds(part, [1.0] * 4)
    assigner, sampler = train.get_section("assigner"), train.get_section("sampler")
    found |= {"positive": assigner.get_float("pos_iou_thr", 0.7), "negative": assigner.get_float("neg_iou_thr", 0.3)}
    found["min_positive"] = assigner.get_float("min_pos_iou", 0.3)
    found |= {"num": sampler.get_int("num", 256), "fraction": sampler.get_float("pos_fraction", 0.5)}
    if (most := sampler.get_float("neg_pos_ub", -1)) > 0:
        found["most_negatives"] = most
    if (border := train.get_float("allowed_border", -1)) >= 0:
        found["allowed_border"] = border
    found |= convert_box_loss(part, "l1", "smooth_l1")
    found["nms"], found["proposals"] = read_nms_threshold(test, 0.7), _most(test, 1000)
    found["train_proposals"], found["train_pre_nms"] = (
        _most(proposal, found["proposals"]),
        proposal.get_int("nms_pre", 2000),
    )
    part.note_unread("train_cfg", "test_cfg", "target_means", "target_stds")
    return found


def read_nms_threshold(test: ConfigReader, default: float) -> float:
    """The overlap of a test_cfg's suppression."""
    inner = test.get_section("nms")
    kind = str(inner.get("type", "nms"))
    if kind != "nms":
        test.notes.append(f"{test.where}.nms is {kind}, here plain suppression at the same overlap: detections differ")
    for key in ("iou_threshold", "iou_thr"):
        if inner.get(key) is not None:
            return inner.get_float(key, default)
    return test.get_float("nms_thr", default)


def _most(test: ConfigReader, default: int) -> int:
    return next(
        (test.get_int(key, default) for key in ("max_per_img", "max_num", "nms_post") if test.get(key) is not None),
        default,
    )


def convert_anchors(part: ConfigReader, pyramid: Tree, form: str) -> Tree:
    """An AnchorGenerator's settings, as the one list of "octaves" or the one "scale" that the head here takes."""
    inner = part.get_section("anchor_generator")
    old = not inner  # 1.x writes them into the head
    generator = part if old else inner
    if not old:
        generator.require_type("AnchorGenerator", "LegacyAnchorGenerator")
    ratios = generator.get_floats("anchor_ratios" if old else "ratios", (0.5, 1.0, 2.0))
    _strides(generator, "anchor_strides" if old else "strides", pyramid)
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
    if any(abs(a - b) > 1e-4 * b for a, b in zip(scales, octaves)) or (form == "scale" and count != 1):
        right = (
            "one scale" if form == "scale" else "the scales of octaves, octave_base_scale * 2^(i / scales_per_octave)"
        )
        raise InputError(f"MMDetection's {generator.where} has the scales {scales}: what can be converted has {right}")
    found: Tree = {"scale": base} if form == "scale" else {"base_scale": base, "scales_per_octave": count}
    found["ratios"] = ratios
    legacy = old or generator.require_type("AnchorGenerator", "LegacyAnchorGenerator") == "LegacyAnchorGenerator"
    offset = 0.5 if old else generator.get_float("center_offset", 0.0)
    return found | ({"offset": offset} if offset else {}) | ({"round_anchors": True} if legacy else {})


def read_box_stds(part: ConfigReader, stds: list[float] | None) -> list[float]:
    """The standard deviations of a head's box code, which must be these where some are given."""
    coder = part.get_section("bbox_coder")
    if coder:
        coder.require_type("DeltaXYWHBBoxCoder", "LegacyDeltaXYWHBBoxCoder")
        coder.require_value("add_ctr_clamp", False)
    source = coder or part
    usual = stds or [0.1, 0.1, 0.2, 0.2]
    means, found = source.get_floats("target_means", [0.0] * 4), source.get_floats("target_stds", usual)
    if any(means):
        raise InputError(f"MMDetection's {part.where} has target_means={means}: what can be converted has zeros")
    if stds and found != stds:
        raise InputError(f"MMDetection's {part.where} has target_stds={found}: what can be converted has {stds}")
    return found


def convert_box_loss(part: ConfigReader, *kinds: str) -> Tree:
    """The options loss and beta of a loss of codes; where it is none of these kinds, a note and the first of them."""
    loss = part.get_section("loss_bbox")
    theirs = str(loss.get("type", "L1Loss")).rpartition(".")[2]
    ours = _BOX_LOSSES.get(theirs)
    if ours not in kinds:
        part.notes.append(
            f"further training has the loss of codes {kinds[0]} where MMDetection's {part.where} has {theirs}"
        )
        ours = kinds[0]
    beta = loss.get_float("beta", 1.0)
    if ours == "balanced_l1" and (shape := (loss.get_float("alpha", 0.5), loss.get_float("gamma", 1.5), beta)) != (
        0.5,
        1.5,
        1.0,
    ):
        part.notes.append(
            f"further training has the balanced L1 loss with alpha=0.5, gamma=1.5, beta=1.0 where MMDetection's {part.where} has "
            f"alpha={shape[0]}, gamma={shape[1]}, beta={shape[2]}"
        )
    return {} if len(kinds) == 1 else {"loss": ours} | ({"beta": beta} if ours == "smooth_l1" else {})


def _towers(part: ConfigReader, pyramid: Tree, default_norm: str | None) -> Tree:
    found: Tree = {"convs": part.get_int("stacked_convs", 4, 0, LAYERS)}
    if (channels := part.get_int("feat_channels", 256)) != pyramid["channels"]:
        found["channels"] = channels
    return found | {"norm": read_norm_type(part, "norm_cfg", default_norm, None, "GN") == "GN"}


def _has_bias(keys: Keys) -> bool:
    """Whether the towers' convolutions have biases: MMDetection's rule for it changed, the checkpoint knows."""
    return any(key in keys for key in ("bbox_head.cls_convs.0.conv.bias", "bbox_head.cls_convs.0.bias"))


def _focal(loss: ConfigReader) -> Tree:
    return {"alpha": loss.get_float("alpha", 0.25), "gamma": loss.get_float("gamma", 2.0)}


def _strides(part: ConfigReader, key: str, pyramid: Tree) -> None:
    right = [2.0**i for i in range(pyramid["finest"], pyramid["coarsest"] + 1)]
    found = part.get_floats(key, right)
    if any(not math.isclose(a, b) for a, b in zip(found, right)) or len(found) != len(right):
        raise InputError(f"MMDetection's {part.where}.{key}={found} must be the neck's strides {right}")
