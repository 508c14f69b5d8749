"""Convert MMDetection's heads of FreeAnchor, FoveaBox, FSAF, YOLOF and AutoAssign."""

from collections.abc import Callable
from typing import Any

from fusedet.errors import InputError
from fusedet.interop.mmdetection.anchor_config import (
    BOX_STDS,
    FOCAL_LOSS,
    MAX_CONVS,
    check_strides,
    convert_anchors,
    convert_square_anchors,
    read_box_stds,
)
from fusedet.interop.mmdetection.config_reader import ConfigReader

Tree = dict[str, Any]
_FREE_ANCHOR = {
    "topk": ("pre_anchor_topk", 50),
    "threshold": ("bbox_thr", 0.6),
    "alpha": ("alpha", 0.5),
    "gamma": ("gamma", 2.0),
    "beta": ("loss_bbox.beta", 0.11),
    "box_weight": ("loss_bbox.loss_weight", 0.75),
}
_FOVEA = {
    "sigma": ("sigma", 0.4),
    "align": ("with_deform", False),
    "alpha": ("loss_cls.alpha", 0.4),
    "gamma": ("loss_cls.gamma", 1.5),
    "beta": ("loss_bbox.beta", 0.11),
}
_YOLOF = {
    "cls_convs": ("num_cls_convs", 2, 1, MAX_CONVS),
    "convs": ("num_reg_convs", 4, 1, MAX_CONVS),
    "most_shift": ("bbox_coder.ctr_clamp", 32.0),
}
_YOLOF_TRAINING = {
    "topk": ("assigner.match_times", 4),
    "positive": ("assigner.pos_ignore_thr", 0.15),
    "negative": ("assigner.neg_ignore_thr", 0.7),
}
_AUTOASSIGN = {
    "positive_weight": ("pos_loss_weight", 0.25),
    "negative_weight": ("neg_loss_weight", 0.75),
    "center_weight": ("center_loss_weight", 0.75),
    "box_weight": ("loss_bbox.loss_weight", 5.0),
}


def _convert_free_anchor_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    read_box_stds(reader, BOX_STDS)
    return {"type": "free_anchor"} | convert_anchors(reader, pyramid, "octaves") | reader.get_options(_FREE_ANCHOR)


def _convert_fovea_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    strides = check_strides(reader, "strides", pyramid)
    sizes = reader.get_floats("base_edge_list", [2 * stride for stride in strides])
    if not sizes or sizes != [stride * sizes[0] / strides[0] for stride in strides]:
        raise InputError(
            f"MMDetection's {reader.path}.base_edge_list={sizes} must be one multiple of the strides {strides}"
        )
    options: Tree = {"type": "fovea", "base_scale": sizes[0] / strides[0]} | reader.get_options(_FOVEA)
    if ranges := reader.get_typed("scale_ranges", list[tuple[float, float]], []):
        options["ranges"] = [list(pair) for pair in ranges]
    reader.require_value("deform_groups", 4)
    return options


def _convert_fsaf_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    coder = reader.get_section("bbox_coder")
    coder.require_type("TBLRBBoxCoder")
    coder.require_value("normalizer", 4.0)
    if (anchors := convert_square_anchors(reader, pyramid)) != {"base_scale": 1.0}:
        raise InputError(f"MMDetection's {reader.path} has anchors of {anchors['base_scale']} strides: FSAF has 1.0")
    assigner = train.get_section("assigner")
    scale = assigner.get_float("pos_scale", 0.2)
    if assigner.get_float("neg_scale", scale) != scale:
        train.notes.append(f"further training has MMDetection's {assigner.path}.neg_scale equal to pos_scale={scale}")
    return {"type": "fsaf", "scale": scale} | reader.get_options(FOCAL_LOSS)


def _convert_yolof_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    reader.require_norm("norm_cfg", "BN", "BN")
    coder, anchors = reader.get_section("bbox_coder"), reader.get_section("anchor_generator")
    coder.require_value("add_ctr_clamp", True)
    for key, value in (("target_means", 0.0), ("target_stds", 1.0)):
        if (values := coder.get_floats(key, [value] * 4)) != [value] * 4:
            raise InputError(f"MMDetection's {coder.path}.{key}={values} must be {[value] * 4}")
    check_strides(anchors, "strides", pyramid)
    if (ratios := anchors.get_floats("ratios")) != [1.0]:
        raise InputError(f"MMDetection's {anchors.path}.ratios={ratios} must be [1.0]")
    anchors.require_value("center_offset", 0.0)
    options: Tree = {"type": "yolof", "scales": anchors.get_floats("scales")}
    return options | reader.get_options(_YOLOF | FOCAL_LOSS) | train.get_options(_YOLOF_TRAINING)


def _convert_autoassign_head(reader: ConfigReader, train: ConfigReader, pyramid: Tree) -> Tree:
    check_strides(reader, "strides", pyramid)
    reader.require_value("force_topk", False)
    reader.read_keys |= {"topk", "center_sampling", "regress_ranges", "norm_on_bbox", "centerness_on_reg"}
    return {"type": "autoassign"} | reader.get_options(_AUTOASSIGN)


MATCHING_HEADS: dict[str, tuple[Callable[[ConfigReader, ConfigReader, Tree], Tree], str | None]] = {
    "FreeAnchorRetinaHead": (_convert_free_anchor_head, None),
    "FoveaHead": (_convert_fovea_head, None),
    "FSAFHead": (_convert_fsaf_head, None),
    "YOLOFHead": (_convert_yolof_head, "BN"),
    "AutoAssignHead": (_convert_autoassign_head, "GN"),
}
"""Conversion and default normalization of each head."""
