"""Convert MMDetection's dense heads and RPN to fusedet's config."""

from collections.abc import Callable, Mapping
from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.anchor_config import (
    BOX_STDS,
    FOCAL_LOSS,
    MAX_CONVS,
    check_strides,
    convert_anchors,
    convert_box_loss,
    convert_square_anchors,
    read_box_stds,
)
from fusedet.interop.mmdetection.config_reader import ConfigReader
from fusedet.interop.mmdetection.matching_head_config import MATCHING_HEADS

Tree = dict[str, Any]
Keys = Mapping[str, Any]
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


def convert_dense_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree, keys: Keys) -> Tree:
    """Convert the head of a one-stage detector.

    Args:
        reader: Reader of `bbox_head`.
        train: Reader of `train_cfg`.
        pyramid: `model.pyramid` of the converted config.
        keys: Weights of the checkpoint; they show whether convolutions have biases.

    Raises:
        InputError: The head, or an option of it, is not supported.
    """
    kind = str(reader.get("type")).rpartition(".")[2]
    if kind not in _HEADS:
        raise InputError(
            f"MMDetection's {reader.path}.type={kind} is not supported: supported types are {', '.join(_HEADS)}"
        )
    convert, norm = _HEADS[kind]
    options = convert(reader, train, pyramid)
    reader.get_section("bbox_coder").require_value("clip_border", True)
    if norm != "BN":
        options["convs"] = reader.get_int("stacked_convs", 4, 0, MAX_CONVS)
        options |= _convert_width(reader, pyramid)
        options["norm"] = reader.require_norm("norm_cfg", norm, None, "GN") == "GN"
        if kind not in ("RepPointsHead", "TOODHead") and (options["norm"] or norm):
            # MMDetection's rule for these biases changed, so the checkpoint decides.
            names = ("bbox_head.cls_convs.0.conv.bias", "bbox_head.cls_convs.0.bias")
            options["bias"] = any(key in keys for key in names)
    reader.note_unread("loss_centerness", "loss_cls_fl", "use_vfl", "conv_bias")
    return options


def _convert_retina_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    reader.get_section("loss_cls").require_value("use_sigmoid", True)
    if (kind := reader.get_type("loss_cls", "FocalLoss")) != "FocalLoss":
        reader.notes.append(f"further training has the focal loss where MMDetection's {reader.path} has {kind}")
    if str(reader.get("type")).endswith("PISARetinaHead"):
        reader.notes.append("further training is without PISA's weights of the samples (ISR, CARL)")
    options: Tree = {"type": "retina"} | reader.get_options(FOCAL_LOSS) | convert_anchors(reader, pyramid, "octaves")
    read_box_stds(reader, [1.0] * 4)
    convert_box_loss(reader, "l1")
    return options | train.get_options(_MATCHING)


def _convert_fcos_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    check_strides(reader, "strides", pyramid)
    changes = {
        "center_sampling": ("center_sampling", False),
        "normalize_boxes": ("norm_on_bbox", False),
        "centerness_on_box": ("centerness_on_reg", False),
        "deformable_last": ("dcn_on_last_conv", False),
        "radius": ("center_sample_radius", 1.5),
    }
    options: Tree = {"type": "fcos"} | reader.get_changes(changes) | reader.get_options(FOCAL_LOSS)
    if ranges := reader.get_typed("regress_ranges", list[tuple[float, float]], []):
        options["ranges"] = [high for _, high in ranges[:-1]]
    losses = {"IoULoss": "iou", "GIoULoss": "giou"}
    if (loss := reader.get_type("loss_bbox", "IoULoss")) in losses:
        options["box_loss"] = losses[loss]
    else:
        reader.notes.append(f"further training has box_loss=iou where MMDetection's config has {loss}")
    return options


def _convert_vfnet_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    check_strides(reader, "strides", pyramid)
    reader.require_value("use_atss", True)
    reader.require_value("sync_num_pos", True, False)
    reader.get_section("anchor_generator").require_value("center_offset", 0.0)
    options: Tree = {"type": "vfnet", "box_norm": reader.require_value("bbox_norm_type", "reg_denom", "stride")}
    options |= reader.get_options(_VFNET) | train.get_options({"topk": ("assigner.topk", 9)})
    reader.read_keys |= {"center_sampling", "regress_ranges"}  # of FCOS; ATSS has none
    return options | reader.get_changes({"deformable_last": ("dcn_on_last_conv", False)})


def _convert_reppoints_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    check_strides(reader, "point_strides", pyramid)
    reader.require_value("use_grid_points", False)
    reader.require_value("center_init", True)
    reader.get_section("loss_cls").require_value("use_sigmoid", True)
    options: Tree = {"type": "reppoints"} | reader.get_options(_REPPOINTS | FOCAL_LOSS)
    options["transform_method"] = reader.require_value("transform_method", "moment", "minmax", "partial_minmax")
    return options | train.get_section("refine").get_options(_MATCHING)


def _convert_atss_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    read_box_stds(reader, BOX_STDS)
    weights = {
        "box_weight": ("loss_bbox.loss_weight", 2.0),
        "centerness_weight": ("loss_centerness.loss_weight", 1.0),
    }
    options: Tree = {"type": "atss"} | convert_square_anchors(reader, pyramid, plain=False)
    options |= reader.get_changes({"kernel": ("pred_kernel_size", 3, 1, 15)})
    return options | reader.get_options(FOCAL_LOSS | weights) | train.get_options(_TOPK)


def _convert_gfl_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    weights = {
        "bins": ("reg_max", 16, 4, 1000),
        "beta": ("loss_cls.beta", 2.0),
        "box_weight": ("loss_bbox.loss_weight", 2.0),
        "dfl_weight": ("loss_dfl.loss_weight", 0.25),
    }
    options: Tree = {"type": "gfl"} | convert_square_anchors(reader, pyramid)
    return options | reader.get_options(weights) | train.get_options(_TOPK)


def _convert_paa_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    read_box_stds(reader, BOX_STDS)
    options: Tree = {"type": "paa"} | convert_square_anchors(reader, pyramid)
    options |= reader.get_options(FOCAL_LOSS | _PAA) | train.get_options({"positive": ("assigner.pos_iou_thr", 0.1)})
    reader.read_keys |= {"reg_decoded_bbox", "covariance_type"}
    return options


def _convert_ddod_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    read_box_stds(reader, BOX_STDS)
    exponents = {"cls_exponent": ("assigner.alpha", 0.8), "box_exponent": ("reg_assigner.alpha", 0.5)}
    options: Tree = {"type": "ddod"} | convert_square_anchors(reader, pyramid)
    return options | reader.get_options(FOCAL_LOSS | _DDOD) | train.get_options(_TOPK | exponents)


def _convert_tood_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    anchor_based = reader.require_value("anchor_type", "anchor_free", "anchor_based") == "anchor_based"
    read_box_stds(reader, BOX_STDS)
    options: Tree = {"type": "tood", "anchor_based": anchor_based} | convert_square_anchors(reader, pyramid)
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
    **MATCHING_HEADS,
}
"""Conversion and default normalization of each head; towers with BN convert their own options."""


def convert_rpn_head(reader: ConfigReader, train: ConfigReader, test: ConfigReader, pyramid: Tree) -> Tree:
    """Convert an RPNHead.

    Args:
        reader: Reader of `rpn_head`.
        train: Reader of `train_cfg`.
        test: Reader of `test_cfg.rpn`.
        pyramid: `model.pyramid` of the converted config.

    Raises:
        InputError: An option of the head is not supported.
    """
    reader.require_type("RPNHead")
    proposal, train = train.get_section("rpn_proposal"), train.get_section("rpn")
    reader.get_section("loss_cls").require_value("use_sigmoid", True)
    read_box_stds(reader, [1.0] * 4)
    options: Tree = {"type": "rpn"} | reader.get_changes({"convs": ("num_convs", 1, 1, MAX_CONVS)})
    options |= _convert_width(reader, pyramid) | convert_anchors(reader, pyramid, "scales")
    options |= train.get_options(_RPN_TRAINING) | convert_box_loss(reader, "l1", "smooth_l1")
    limits = {"most_negatives": ("sampler.neg_pos_ub", -1.0), "allowed_border": ("allowed_border", -1.0)}
    options |= {name: value for name, value in train.get_options(limits).items() if value >= 0}
    require_no_least_side(test)
    test.require_value("nms_across_levels", False)
    options["nms"], options["proposals"] = read_nms_threshold(test, 0.7), _read_max_proposals(test, 1000)
    options["train_proposals"] = _read_max_proposals(proposal, options["proposals"])
    options["train_pre_nms"] = proposal.get_int("nms_pre", 2000)
    reader.note_unread()
    return options


def read_nms_threshold(test: ConfigReader, default: float, soft: bool = False) -> float:
    """Return the IoU threshold of a test_cfg's NMS; soft: whether the detector also takes Soft-NMS.

    Raises:
        InputError: NMS is class-agnostic.
    """
    inner = test.get_section("nms")
    inner.require_value("class_agnostic", False)
    inner.note_unread("iou_threshold", "iou_thr", "method", "sigma", "min_score", "split_thr")
    kind = str(inner.get("type", "nms"))
    if kind != "nms" and not (soft and kind == "soft_nms"):
        test.notes.append(f"{test.path}.nms is {kind}, here hard NMS with the same IoU threshold: detections differ")
    default = 0.3 if kind == "soft_nms" and soft else test.get_float("nms_thr", default)  # of mmcv's soft_nms
    return inner.get_float(inner.find_key("iou_threshold", "iou_thr"), default)


def require_no_least_side(test: ConfigReader) -> None:
    """Raise InputError if a test_cfg removes boxes of small sides; those without area are always removed."""
    if (side := test.get_float("min_bbox_size", 0)) > 0:
        raise InputError(f"MMDetection's {test.path}.min_bbox_size={side:g} is not supported: it must be 0")


def read_soft_nms(test: ConfigReader) -> Tree:
    """Convert the Soft-NMS of a test_cfg to settings of `test`; empty without.

    Raises:
        InputError: The method is neither linear nor Gaussian.
    """
    inner = test.get_section("nms")
    if inner.get("type", "nms") != "soft_nms":
        return {}
    options = {"soft_nms": inner.require_value("method", "linear", "gaussian")}
    return options | inner.get_options({"soft_sigma": ("sigma", 0.5), "soft_min_score": ("min_score", 0.001)})


def _read_max_proposals(test: ConfigReader, default: int) -> int:
    return test.get_int(test.find_key("max_per_img", "max_num", "nms_post"), default)


def _convert_width(reader: ConfigReader, pyramid: Tree) -> Tree:
    channels = reader.get_int("feat_channels", 256)
    return {} if channels == pyramid.get("channels") else {"channels": channels}
