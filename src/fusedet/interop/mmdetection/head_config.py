"""Convert MMDetection's dense heads and RPN to fusedet's config."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from fusedet.errors import InputError, unknown
from fusedet.interop.mmdetection.config_reader import ConfigReader

Tree = dict[str, Any]
Keys = Mapping[str, Any]
MAX_CONVS = 100
"""Most convolutions of a head; it bounds the size of the model that an untrusted config builds."""
_BOX_LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "BalancedL1Loss": "balanced_l1"}
_FOCAL_LOSS = {"alpha": ("loss_cls.alpha", 0.25), "gamma": ("loss_cls.gamma", 2.0)}
_MATCHING = {"positive": ("assigner.pos_iou_thr", 0.5), "negative": ("assigner.neg_iou_thr", 0.4)}
_VFNET = {
    "gradient_mul": ("gradient_mul", 0.1),
    "alpha": ("loss_cls.alpha", 0.75),
    "gamma": ("loss_cls.gamma", 2.0),
    "box_weight": ("loss_bbox.loss_weight", 1.5),
    "refine_weight": ("loss_bbox_refine.loss_weight", 2.0),
}
_REPPOINTS = {
    "point_channels": ("point_feat_channels", 256),
    "num_points": ("num_points", 9, 1),
    "gradient_mul": ("gradient_mul", 0.1),
    "moment_mul": ("moment_mul", 0.01),
    "base_scale": ("point_base_scale", 4.0),
    "beta": ("loss_bbox_init.beta", 1 / 9),
    "init_weight": ("loss_bbox_init.loss_weight", 0.5),
    "refine_weight": ("loss_bbox_refine.loss_weight", 1.0),
}
_RPN_TRAINING = {
    "positive": ("assigner.pos_iou_thr", 0.7),
    "negative": ("assigner.neg_iou_thr", 0.3),
    "min_positive": ("assigner.min_pos_iou", 0.3),
    "num": ("sampler.num", 256),
    "fraction": ("sampler.pos_fraction", 0.5),
}


_PAA = {
    "box_weight": ("loss_bbox.loss_weight", 1.3),
    "iou_weight": ("loss_centerness.loss_weight", 0.5),
    "voting": ("score_voting", True),
    "topk": ("topk", 9),
}
_DDOD = {
    "box_weight": ("loss_bbox.loss_weight", 2.0),
    "iou_weight": ("loss_iou.loss_weight", 1.0),
    "deformable_first": ("use_dcn", True),
}
_TOOD = {
    "alpha": ("initial_loss_cls.alpha", 0.25),
    "gamma": ("initial_loss_cls.gamma", 2.0),
    "beta": ("loss_cls.beta", 2.0),
    "box_weight": ("loss_bbox.loss_weight", 2.0),
    "deformable": ("num_dcn", 0, 0, MAX_CONVS),
}
_TOOD_TRAINING = {
    "initial_epochs": ("initial_epoch", 4),
    "topk": ("initial_assigner.topk", 9),
    "aligned_topk": ("assigner.topk", 13),
    "metric_alpha": ("alpha", 1.0),
    "metric_beta": ("beta", 6.0),
}
_TOPK = {"topk": ("assigner.topk", 9)}
ANCHOR_STDS = [0.1, 0.1, 0.2, 0.2]
"""Standard deviations of the box deltas of ATSS and the heads built on it."""


def convert_dense_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """Convert the head of a one-stage detector.

    Args:
        reader: Reader of `bbox_head`.
        train: Reader of `train_cfg`.
        pyramid: `model.pyramid` of the converted config.
        keys: Weights of the checkpoint; they show whether convolutions have biases.
    """
    kind = str(reader.get("type")).rpartition(".")[2]
    if kind not in _HEADS:
        raise unknown("bbox_head of MMDetection", kind, _HEADS)
    convert, norm = _HEADS[kind]
    towers: Tree = {"convs": reader.get_int("stacked_convs", 4, 0, MAX_CONVS)} | _convert_width(reader, pyramid)
    towers["norm"] = reader.require_norm("norm_cfg", norm, None, "GN") == "GN"
    if kind not in ("RepPointsHead", "TOODHead") and (towers["norm"] or norm):
        # MMDetection's rule for these biases changed, so the checkpoint decides.
        towers["bias"] = any(key in keys for key in ("bbox_head.cls_convs.0.conv.bias", "bbox_head.cls_convs.0.bias"))
    options = convert(reader, train, pyramid) | towers
    reader.note_unread("loss_centerness", "loss_cls_fl", "use_vfl", "conv_bias")
    return options


def _convert_retina_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    reader.get_section("loss_cls").require_value("use_sigmoid", True)
    if (kind := reader.get_type("loss_cls", "FocalLoss")) != "FocalLoss":
        reader.notes.append(f"further training has the focal loss where MMDetection's {reader.path} has {kind}")
    if str(reader.get("type")).endswith("PISARetinaHead"):
        reader.notes.append("further training is without PISA's weights of the samples (ISR, CARL)")
    options: Tree = {"type": "retina"} | reader.get_options(_FOCAL_LOSS) | convert_anchors(reader, pyramid, "octaves")
    read_box_stds(reader, [1.0] * 4)
    convert_box_loss(reader, "l1")
    return options | train.get_options(_MATCHING)


def _convert_fcos_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    _check_strides(reader, "strides", pyramid)
    changes = {
        "center_sampling": ("center_sampling", False),
        "normalize_boxes": ("norm_on_bbox", False),
        "centerness_on_box": ("centerness_on_reg", False),
        "deformable_last": ("dcn_on_last_conv", False),
        "radius": ("center_sample_radius", 1.5),
    }
    options: Tree = {"type": "fcos"} | reader.get_changes(changes) | reader.get_options(_FOCAL_LOSS)
    if ranges := reader.get_typed("regress_ranges", list[tuple[float, float]], []):
        options["ranges"] = [high for _, high in ranges[:-1]]
    losses = {"IoULoss": "iou", "GIoULoss": "giou"}
    if (loss := reader.get_type("loss_bbox", "IoULoss")) in losses:
        options["box_loss"] = losses[loss]
    else:
        reader.notes.append(f"further training has box_loss=iou where MMDetection's config has {loss}")
    return options


def _convert_vfnet_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    _check_strides(reader, "strides", pyramid)
    reader.require_value("use_atss", True)
    reader.require_value("sync_num_pos", True, False)
    reader.get_section("anchor_generator").require_value("center_offset", 0.0)
    options: Tree = {"type": "vfnet", "box_norm": reader.require_value("bbox_norm_type", "reg_denom", "stride")}
    options |= reader.get_options(_VFNET) | train.get_options({"topk": ("assigner.topk", 9)})
    reader.read_keys |= {"center_sampling", "regress_ranges"}  # of FCOS; ATSS has none
    return options | reader.get_changes({"deformable_last": ("dcn_on_last_conv", False)})


def _convert_reppoints_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    _check_strides(reader, "point_strides", pyramid)
    reader.require_value("use_grid_points", False)
    reader.require_value("center_init", True)
    reader.get_section("loss_cls").require_value("use_sigmoid", True)
    options: Tree = {"type": "reppoints"} | reader.get_options(_REPPOINTS | _FOCAL_LOSS)
    options["transform_method"] = reader.require_value("transform_method", "moment", "minmax", "partial_minmax")
    return options | train.get_section("refine").get_options(_MATCHING)


def _convert_square_anchors(reader: ConfigReader, pyramid: Tree) -> Tree:
    """Convert the single square anchor of each cell to its side in strides."""
    anchors = convert_anchors(reader, pyramid, "scale")
    if unsupported := {key: anchors[key] for key in ("offset", "round_anchors") if key in anchors}:
        raise InputError(f"MMDetection's {reader.path}.anchor_generator has {unsupported}: this head has neither")
    if anchors["ratios"] != [1.0]:
        raise InputError(
            f"MMDetection's {reader.path} has anchors of the ratios {anchors['ratios']}: only [1.0] is supported"
        )
    reader.require_value("pred_kernel_size", 3)
    return {"base_scale": anchors["scale"]}


def _convert_atss_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    read_box_stds(reader, ANCHOR_STDS)
    weights = {
        "box_weight": ("loss_bbox.loss_weight", 2.0),
        "centerness_weight": ("loss_centerness.loss_weight", 1.0),
    }
    options: Tree = {"type": "atss"} | _convert_square_anchors(reader, pyramid)
    options |= reader.get_changes({"kernel": ("pred_kernel_size", 3, 1, 15)})
    return options | reader.get_options(_FOCAL_LOSS | weights) | train.get_options(_TOPK)


def _convert_gfl_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    weights = {
        "bins": ("reg_max", 16, 4, 1000),
        "beta": ("loss_cls.beta", 2.0),
        "box_weight": ("loss_bbox.loss_weight", 2.0),
        "dfl_weight": ("loss_dfl.loss_weight", 0.25),
    }
    options: Tree = {"type": "gfl"} | _convert_square_anchors(reader, pyramid)
    return options | reader.get_options(weights) | train.get_options(_TOPK)


def _convert_paa_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    read_box_stds(reader, ANCHOR_STDS)
    options: Tree = {"type": "paa"} | _convert_square_anchors(reader, pyramid)
    options |= reader.get_options(_FOCAL_LOSS | _PAA) | train.get_options({"positive": ("assigner.pos_iou_thr", 0.1)})
    reader.read_keys |= {"reg_decoded_bbox", "covariance_type"}
    return options


def _convert_ddod_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    read_box_stds(reader, ANCHOR_STDS)
    exponents = {"cls_exponent": ("assigner.alpha", 0.8), "box_exponent": ("reg_assigner.alpha", 0.5)}
    options: Tree = {"type": "ddod"} | _convert_square_anchors(reader, pyramid)
    return options | reader.get_options(_FOCAL_LOSS | _DDOD) | train.get_options(_TOPK | exponents)


def _convert_tood_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    anchor_based = reader.require_value("anchor_type", "anchor_free", "anchor_based") == "anchor_based"
    read_box_stds(reader, ANCHOR_STDS)
    options: Tree = {"type": "tood", "anchor_based": anchor_based} | _convert_square_anchors(reader, pyramid)
    return options | reader.get_options(_TOOD) | train.get_options(_TOOD_TRAINING)


_HEADS: dict[str, tuple[Callable[[ConfigReader, ConfigReader, Tree], Tree], str | None]] = {
    "RetinaHead": (_convert_retina_head, None),
    "PISARetinaHead": (_convert_retina_head, None),
    "FCOSHead": (_convert_fcos_head, "GN"),
    "VFNetHead": (_convert_vfnet_head, "GN"),
    "RepPointsHead": (_convert_reppoints_head, None),
    "ATSSHead": (_convert_atss_head, "GN"),
    "GFLHead": (_convert_gfl_head, "GN"),
    "PAAHead": (_convert_paa_head, "GN"),
    "DDODHead": (_convert_ddod_head, "GN"),
    "TOODHead": (_convert_tood_head, "GN"),
}
"""Conversion and default normalization of each head."""


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
    reader.get_section("loss_cls").require_value("use_sigmoid", True)
    read_box_stds(reader, [1.0] * 4)
    options: Tree = {"type": "rpn"} | reader.get_changes({"convs": ("num_convs", 1, 1, MAX_CONVS)})
    options |= _convert_width(reader, pyramid) | convert_anchors(reader, pyramid, "scale")
    options |= train.get_options(_RPN_TRAINING) | convert_box_loss(reader, "l1", "smooth_l1")
    limits = {"most_negatives": ("sampler.neg_pos_ub", -1.0), "allowed_border": ("allowed_border", -1.0)}
    options |= {name: value for name, value in train.get_options(limits).items() if value >= 0}
    options["nms"], options["proposals"] = read_nms_threshold(test, 0.7), _read_max_proposals(test, 1000)
    options["train_proposals"] = _read_max_proposals(proposal, options["proposals"])
    options["train_pre_nms"] = proposal.get_int("nms_pre", 2000)
    reader.note_unread()
    return options


def read_nms_threshold(test: ConfigReader, default: float) -> float:
    """Return the IoU threshold of a test_cfg's NMS."""
    inner = test.get_section("nms")
    kind = str(inner.get("type", "nms"))
    if kind != "nms":
        test.notes.append(f"{test.path}.nms is {kind}, here hard NMS with the same IoU threshold: detections differ")
    return inner.get_float(inner.find_key("iou_threshold", "iou_thr"), test.get_float("nms_thr", default))


def _read_max_proposals(test: ConfigReader, default: int) -> int:
    return test.get_int(test.find_key("max_per_img", "max_num", "nms_post"), default)


def convert_anchors(reader: ConfigReader, pyramid: Tree, kind: str) -> Tree:
    """Convert an AnchorGenerator to the "octaves" (base_scale, scales_per_octave) or the one "scale" of a head."""
    generator, prefix, legacy, offset = reader, "anchor_", True, 0.5  # 1.x has them in the head
    if section := reader.get_section("anchor_generator"):
        generator, prefix = section, ""
        legacy = section.require_type("AnchorGenerator", "LegacyAnchorGenerator") == "LegacyAnchorGenerator"
        offset = section.get_float("center_offset", 0.0)
        for key, value in (("base_sizes", None), ("centers", None), ("scale_major", True)):
            section.require_value(key, value)
    _check_strides(generator, f"{prefix}strides", pyramid)
    options: Tree = {"ratios": generator.get_floats(f"{prefix}ratios", (0.5, 1.0, 2.0))}
    scales = generator.get_floats(f"{prefix}scales")
    base = generator.get_float("octave_base_scale", scales[0] if scales else 4.0)
    count = generator.get_int("scales_per_octave", len(scales) or 3, 1, 100)
    octaves = [base * 2 ** (i / count) for i in range(count)]
    if any(abs(a - b) > 1e-4 * b for a, b in zip(scales, octaves)) or (kind == "scale" and count != 1):
        supported = (
            "one scale" if kind == "scale" else "the scales of octaves, octave_base_scale * 2^(i / scales_per_octave)"
        )
        raise InputError(f"MMDetection's {generator.path} has the scales {scales}: only {supported} can be converted")
    options |= {"scale": base} if kind == "scale" else {"base_scale": base, "scales_per_octave": count}
    return options | ({"offset": offset} if offset else {}) | ({"round_anchors": True} if legacy else {})


def read_box_stds(reader: ConfigReader, stds: list[float] | None) -> list[float]:
    """Return the standard deviations of a head's box deltas, which must be `stds` if given."""
    if coder := reader.get_section("bbox_coder"):
        coder.require_type("DeltaXYWHBBoxCoder", "LegacyDeltaXYWHBBoxCoder")
        coder.require_value("add_ctr_clamp", False)
    source = coder or reader
    means = source.get_floats("target_means", [0.0] * 4)
    values = source.get_floats("target_stds", stds or [0.1, 0.1, 0.2, 0.2])
    if any(means):
        raise InputError(f"MMDetection's {reader.path} has target_means={means}: only zeros are supported")
    if stds and values != stds:
        raise InputError(f"MMDetection's {reader.path} has target_stds={values}: only {stds} is supported")
    return values


def convert_box_loss(reader: ConfigReader, *kinds: str) -> Tree:
    """Convert the loss of box deltas to the options loss and beta; another loss gives a note and the first kind."""
    loss, theirs = reader.get_section("loss_bbox"), reader.get_type("loss_bbox", "L1Loss")
    ours = _BOX_LOSSES.get(theirs)
    if ours not in kinds:
        reader.notes.append(
            f"further training has the box loss {kinds[0]} where MMDetection's {reader.path} has {theirs}"
        )
        ours = kinds[0]
    shape = loss.get_options({"alpha": ("alpha", 0.5), "gamma": ("gamma", 1.5), "beta": ("beta", 1.0)})
    if ours == "balanced_l1" and tuple(shape.values()) != (0.5, 1.5, 1.0):
        given = ", ".join(f"{name}={value}" for name, value in shape.items())
        reader.notes.append(
            "further training has the balanced L1 loss with alpha=0.5, gamma=1.5, beta=1.0 where MMDetection's "
            f"{reader.path} has {given}"
        )
    return {} if len(kinds) == 1 else {"loss": ours} | ({"beta": shape["beta"]} if ours == "smooth_l1" else {})


def _convert_width(reader: ConfigReader, pyramid: Tree) -> Tree:
    channels = reader.get_int("feat_channels", 256)
    return {} if channels == pyramid["channels"] else {"channels": channels}


def _check_strides(reader: ConfigReader, key: str, pyramid: Tree) -> None:
    expected = [2.0**i for i in range(pyramid["finest"], pyramid["coarsest"] + 1)]
    strides = reader.get_floats(key, expected)
    if len(strides) != len(expected) or not all(map(math.isclose, strides, expected)):
        raise InputError(f"MMDetection's {reader.path}.{key}={strides} must be the neck's strides {expected}")
