"""Infer MMDetection's config of a detector from the names and shapes of its weights."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusedet.errors import InputError
from fusedet.interop.weight_shapes import axis_size

Tree = dict[str, Any]
Weights = Mapping[str, Tensor]
_DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
_DEEP: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}
"""Depths of ResNets by the blocks of their stages, with basic blocks and with bottlenecks."""
_NMS_06 = ("VFNetHead", "ATSSHead", "GFLHead", "TOODHead", "DDODHead", "YOLOFHead", "AutoAssignHead")
"""Heads whose NMS has an IoU threshold of 0.6."""
_RELU = ("FCOSHead", "VFNetHead", "AutoAssignHead")
"""Heads whose pyramids have a ReLU before P7."""


def infer_config(state: Weights, legacy: bool = False) -> tuple[Tree, list[str]]:
    """Infer MMDetection's config and note what was assumed.

    Args:
        state: State dict with the names of 3.x.
        legacy: Whether the weights are of MMDetection 1.x.

    Raises:
        InputError: The detector is not supported.
    """
    notes: list[str] = []
    if head := _infer_dense_head(state, notes, legacy):
        nms = 0.6 if head["type"] in _NMS_06 else 0.5  # of MMDetection's configs
        model: Tree = {"type": "SingleStageDetector", "bbox_head": head, "test_cfg": {"nms": {"iou_threshold": nms}}}
    elif "rpn_head.rpn_cls.weight" in state and any(k.startswith("roi_head.bbox_head.") for k in state):
        roi_head = _infer_roi_head(state, notes)
        model = {"type": "TwoStageDetector", "rpn_head": _infer_rpn(state, legacy), "roi_head": roi_head}
        if roi_head["type"] == "GridRoIHead":
            model["test_cfg"] = {"rcnn": {"score_thr": 0.03, "nms": {"iou_threshold": 0.3}}}
    else:
        raise InputError(
            "the weights are of no supported detector (RetinaNet, FCOS, VFNet, RepPoints, ATSS, GFL, TOOD, DDOD, "
            f"FoveaBox, FSAF, YOLOF, AutoAssign, Faster, Mask, Cascade, Grid and Double-Head R-CNN): the first is "
            f"'{next(iter(state))}'; use --config, or another "
            "checkpoint"
        )
    model["backbone"] = infer_backbone(state)
    model["neck"] = _infer_neck(state, bool(head) and head["type"] in _RELU, notes)
    if model["backbone"]["depth"] >= 50:
        notes.append(
            "the weights do not show which convolution of a bottleneck has the stride: style=pytorch is assumed, use "
            "--config for caffe"
        )
    notes.append(
        "no config was given: thresholds, anchor scales, resizing and training settings are MMDetection's defaults"
    )
    return {"model": model}, notes


def _count_layers(state: Weights, pattern: str) -> int:
    """Return one more than the largest number that the pattern matches in the names; 0 without a match."""
    return max((int(m[1]) + 1 for key in state if (m := re.match(pattern, key))), default=0)


def infer_backbone(state: Weights) -> Tree:
    """Infer a ResNet or ResNeXt from names such as `backbone.layer1.0.conv1.weight`.

    Raises:
        InputError: The numbers of blocks are those of no such backbone.
    """
    blocks = tuple(_count_layers(state, rf"backbone\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    deep = "backbone.layer1.0.conv3.weight" in state
    depth = (_DEEP if deep else _DEPTHS).get(blocks)
    if depth is None or "backbone.conv1.weight" not in state:
        raise InputError(
            f"the weights' backbone is no ResNet or ResNeXt that is supported: its stages have {list(blocks)} blocks"
        )
    config: Tree = {"type": "ResNet", "depth": depth, "frozen_stages": 1, "norm_eval": True}
    width, inputs = (axis_size(state, "backbone.layer1.0.conv2.weight", i) for i in (0, 1))
    if deep and width != inputs:
        config |= {"type": "ResNeXt", "groups": width // inputs, "base_width": inputs}
    offsets = [
        next((k for k in state if re.match(rf"backbone\.layer{i}\.\d+\.conv2(_|\.conv_)offset.*weight", k)), None)
        for i in (1, 2, 3, 4)
    ]
    rows = [axis_size(state, k) for k in offsets if k is not None]
    if rows:
        config |= {
            "dcn": {"type": "DCNv2" if rows[0] == 27 else "DCN"},
            "stage_with_dcn": [k is not None for k in offsets],
        }
    return config


def _infer_neck(state: Weights, relu: bool, notes: list[str]) -> Any:
    """Infer an FPN or PAFPN, and a BFP after it; relu: whether a ReLU precedes P7."""
    if "neck.dilated_encoder_blocks.0.conv1.conv.weight" in state:
        return _infer_dilated_encoder(state, notes)
    many = "neck.0.lateral_convs.0.conv.weight" in state
    prefix = "neck.0." if many else "neck."
    laterals = _count_layers(state, rf"{re.escape(prefix)}lateral_convs\.(\d+)\.")
    outputs = _count_layers(state, rf"{re.escape(prefix)}fpn_convs\.(\d+)\.")
    if not laterals:
        raise InputError("the weights' neck is not supported: supported are FPN and PAFPN, and BFP after them")
    config: Tree = {
        "type": "PAFPN" if f"{prefix}pafpn_convs.0.conv.weight" in state else "FPN",
        "out_channels": axis_size(state, f"{prefix}lateral_convs.0.conv.weight"),
        "start_level": 4 - laterals,
    }
    if f"{prefix}lateral_convs.0.gn.weight" in state:
        config["norm_cfg"] = {"type": "GN", "num_groups": 32}
    config["num_outs"] = outputs if outputs > laterals else 5
    if outputs > laterals:
        inputs = axis_size(state, f"{prefix}fpn_convs.{laterals}.conv.weight", 1)
        on_input = inputs == axis_size(state, f"{prefix}lateral_convs.{laterals - 1}.conv.weight", 1)
        # Detectors that compute P6 from P5 (FCOS, VFNet) have a ReLU before P7 in all of MMDetection's configs.
        config |= {"add_extra_convs": "on_input" if on_input else "on_output", "relu_before_extra_convs": relu}
    if not many:
        return config
    if blocks := _count_layers(state, r"neck\.1\.dyhead_blocks\.(\d+)\."):
        return [config, {"type": "DyHead", "num_blocks": blocks}]
    refine = next((k for k in state if k.startswith("neck.1.refine.")), "")
    kind = "conv" if refine.startswith("neck.1.refine.conv.") else "non_local" if refine else None
    level = 1 if laterals == 3 else 2  # Libra's RetinaNet and Faster R-CNN
    return [config, {"type": "BFP", "num_levels": config["num_outs"], "refine_level": level, "refine_type": kind}]


def _infer_dilated_encoder(state: Weights, notes: list[str]) -> Tree:
    blocks = _count_layers(state, r"neck\.dilated_encoder_blocks\.(\d+)\.")
    notes.append("the weights do not show the dilations of YOLOF's encoder: 2, 4, 6, ... are assumed")
    return {
        "type": "DilatedEncoder",
        "out_channels": axis_size(state, "neck.lateral_conv.weight"),
        "block_mid_channels": axis_size(state, "neck.dilated_encoder_blocks.0.conv1.conv.weight"),
        "num_residual_blocks": blocks,
        "block_dilations": [2 * i for i in range(1, blocks + 1)],
    }


def _infer_dense_head(state: Weights, notes: list[str], legacy: bool) -> Tree:
    """Infer the dense head; empty for a two-stage detector."""
    convs = _count_layers(state, r"bbox_head\.cls_convs\.(\d+)\.")
    norm = {"type": "GN", "num_groups": 32} if "bbox_head.cls_convs.0.gn.weight" in state else None
    first = next((k for k in ("bbox_head.cls_convs.0.conv.weight", "bbox_head.cls_convs.0.weight") if k in state), None)
    width = 256 if first is None else axis_size(state, first)
    config: Tree = {"stacked_convs": convs, "norm_cfg": norm, "feat_channels": width}
    last = f"bbox_head.cls_convs.{convs - 1}.conv.conv_offset.weight" in state
    if "bbox_head.retina_cls.weight" in state:
        anchors = axis_size(state, "bbox_head.retina_reg.weight") // 4
        if anchors == 1:
            single = _make_anchors(octave_base_scale=1, scales_per_octave=1, ratios=[1.0])
            return config | single | {"type": "FSAFHead", "bbox_coder": {"type": "TBLRBBoxCoder"}}
        if anchors != 9:
            raise InputError(
                f"RetinaNet with {anchors} anchors per cell: the weights do not show scales and ratios, use --config"
            )
        scales = {"octave_base_scale": 4, "scales_per_octave": 3}
        return config | {"type": "RetinaHead"} | (scales if legacy else _make_anchors(**scales))
    if head := _infer_matching_head(state):
        return config | head
    if family := _infer_atss_family(state, notes):
        return config | family
    if "bbox_head.vfnet_cls.weight" in state:
        return config | {"type": "VFNetHead", "dcn_on_last_conv": last}
    if "bbox_head.reppoints_cls_out.weight" in state:
        method = "moment" if "bbox_head.moment_transfer" in state else "minmax"
        if method == "minmax":
            notes.append("transform_method=minmax is assumed; partial_minmax has the same weights: use --config for it")
        points = "bbox_head.reppoints_pts_init_out.weight"
        return config | {
            "type": "RepPointsHead",
            "transform_method": method,
            "num_points": axis_size(state, points) // 2,
            "point_feat_channels": axis_size(state, points, 1),
        }
    if "bbox_head.conv_centerness.weight" in state or "bbox_head.fcos_centerness.weight" in state:
        notes.append(
            "FCOS's weights do not show norm_on_bbox and centerness_on_reg: both are assumed to be false, use --config "
            "otherwise"
        )
        return config | {"type": "FCOSHead", "dcn_on_last_conv": last}
    return {}


def _infer_matching_head(state: Weights) -> Tree:
    """Infer the head of AutoAssign, FoveaBox or YOLOF; empty for another."""
    if "bbox_head.center_prior.mean" in state:
        return {"type": "AutoAssignHead"}
    if "bbox_head.conv_reg.weight" in state and "bbox_head.conv_centerness.weight" not in state:
        convs = _count_layers(state, r"bbox_head\.reg_convs\.(\d+)\.")
        width = axis_size(state, "bbox_head.conv_reg.weight", 1)
        align = "bbox_head.feature_adaption.conv_offset.weight" in state
        return {"type": "FoveaHead", "with_deform": align, "stacked_convs": convs, "feat_channels": width}
    if "bbox_head.object_pred.weight" in state:
        anchors = axis_size(state, "bbox_head.object_pred.weight")
        return {
            "type": "YOLOFHead",
            "num_cls_convs": _count_layers(state, r"bbox_head\.cls_subnet\.(\d+)\."),
            "num_reg_convs": _count_layers(state, r"bbox_head\.bbox_subnet\.(\d+)\."),
            "norm_cfg": {"type": "BN"},
            "bbox_coder": {"add_ctr_clamp": True},
            **_make_anchors(ratios=[1.0], scales=[2.0**i for i in range(anchors)]),
        }
    return {}


def _infer_atss_family(state: Weights, notes: list[str]) -> Tree:
    """Infer the head of ATSS, GFL, TOOD or DDOD; empty for another."""
    anchors = _make_anchors(octave_base_scale=8, scales_per_octave=1, ratios=[1.0])
    if "bbox_head.gfl_cls.weight" in state:
        return anchors | {"type": "GFLHead", "reg_max": axis_size(state, "bbox_head.gfl_reg.weight") // 4 - 1}
    if "bbox_head.tood_cls.weight" in state:
        notes.append("TOOD's weights do not show anchor_type: anchor_free is assumed, use --config otherwise")
        offsets = r"bbox_head\.inter_convs\.(\d+)\.conv\.conv_offset\."
        return anchors | {
            "type": "TOODHead",
            "stacked_convs": _count_layers(state, r"bbox_head\.inter_convs\.(\d+)\."),
            "num_dcn": _count_layers(state, offsets),
            "norm_cfg": {"type": "GN", "num_groups": 32},
            "feat_channels": axis_size(state, "bbox_head.inter_convs.0.conv.weight"),
        }
    if "bbox_head.atss_iou.weight" in state:
        offset = "bbox_head.cls_convs.0.conv.conv_offset.weight"
        return anchors | {"type": "DDODHead", "use_dcn": offset in state}
    if "bbox_head.atss_cls.weight" in state:
        notes.append("PAA has the same weights as ATSS, which is assumed: use --config for PAA")
        return anchors | {"type": "ATSSHead", "pred_kernel_size": axis_size(state, "bbox_head.atss_cls.weight", 2)}
    return {}


def _make_anchors(**scales: Any) -> Tree:
    return {"anchor_generator": {"type": "AnchorGenerator", **scales}}


def _infer_rpn(state: Weights, legacy: bool) -> Tree:
    anchors = axis_size(state, "rpn_head.rpn_cls.weight")
    if anchors != 3:
        raise InputError(
            f"an RPN with {anchors} anchors per cell: the weights do not show their scales and ratios, use --config"
        )
    return {
        "type": "RPNHead",
        "num_convs": max(_count_layers(state, r"rpn_head\.rpn_conv\.(\d+)\."), 1),
        "feat_channels": axis_size(state, "rpn_head.rpn_cls.weight", 1),
        **({"anchor_scales": [8]} if legacy else _make_anchors(scales=[8])),
    }


def _infer_roi_head(state: Weights, notes: list[str]) -> Tree:
    stages = _count_layers(state, r"roi_head\.bbox_head\.(\d+)\.")
    prefixes = [f"roi_head.bbox_head.{i}." for i in range(stages)] or ["roi_head.bbox_head."]
    heads = [_infer_stage(state, prefix) for prefix in prefixes]
    config: Tree = {"type": "StandardRoIHead", "bbox_head": heads[0]}
    if stages:
        if stages != 3:
            raise InputError(
                f"a cascade of {stages} stages: the weights do not show the scale of its box deltas, use --config"
            )
        for head, std in zip(heads, ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])):
            head["bbox_coder"] = {"type": "DeltaXYWHBBoxCoder", "target_stds": std}
        config = {"type": "CascadeRoIHead", "bbox_head": heads, "stage_loss_weights": [1, 0.5, 0.25]}
    if masks := [
        k for k in state if k.startswith("roi_head.mask_head.") and k.endswith(("upsample.bias", "conv_logits.bias"))
    ]:
        convs = _count_layers(state, r"roi_head\.mask_head\.(?:\d+\.)?convs\.(\d+)\.")
        width = next((axis_size(state, k) for k in masks if k.endswith("upsample.bias")), 256)
        config["mask_head"] = {"type": "FCNMaskHead", "num_convs": convs, "conv_out_channels": width}
    if "roi_head.grid_head.deconv1.weight" in state:
        points, width = (axis_size(state, f"roi_head.grid_head.deconv{i}.bias") for i in (2, 1))
        notes.append("the weights do not show the groups of Grid R-CNN's GroupNorm: 36 are assumed")
        convs = _count_layers(state, r"roi_head\.grid_head\.convs\.(\d+)\.")
        grid = {"type": "GridHead", "grid_points": points, "point_feat_channels": width // points, "num_convs": convs}
        config |= {"type": "GridRoIHead", "grid_head": grid}
    elif "roi_head.bbox_head.res_block.conv1.conv.weight" in state:
        config["type"] = "DoubleHeadRoIHead"
    elif not stages:
        notes.append("Dynamic and Libra R-CNN have the same weights as Faster R-CNN, which is assumed")
    return config


def _infer_stage(state: Weights, prefix: str) -> Tree:
    deltas = f"{prefix}fc_reg.weight"
    if f"{prefix}res_block.conv1.conv.weight" in state:
        return {
            "type": "DoubleConvFCBBoxHead",
            "num_convs": _count_layers(state, rf"{re.escape(prefix)}conv_branch\.(\d+)\."),
            "num_fcs": _count_layers(state, rf"{re.escape(prefix)}fc_branch\.(\d+)\."),
            "fc_out_channels": axis_size(state, f"{prefix}fc_cls.weight", 1),
            "conv_out_channels": axis_size(state, deltas, 1),
            "reg_class_agnostic": axis_size(state, deltas) == 4,
            "loss_bbox": {"type": "SmoothL1Loss"},
        }
    convs = _count_layers(state, rf"{re.escape(prefix)}shared_convs\.(\d+)\.")
    config: Tree = {"type": "Shared4Conv1FCBBoxHead" if convs else "Shared2FCBBoxHead"}
    config["fc_out_channels"] = axis_size(state, f"{prefix}fc_cls.weight", 1)
    return config | {
        "with_reg": deltas in state,
        "reg_class_agnostic": deltas in state and axis_size(state, deltas) == 4,
    }
