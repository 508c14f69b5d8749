"""What the names and shapes of weights tell about an MMDetection detector whose config is not given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fusedet.errors import InputError
from fusedet.interop.weight_shapes import axis_size

Tree = dict[str, Any]
Weights = Mapping[str, Tensor]
_NMS = {"VFNetHead": 0.6}  # of MMDetection's configs, where it is not 0.5
_DEPTHS: dict[tuple[int, ...], int] = {(2, 2, 2, 2): 18, (3, 4, 6, 3): 34}
_DEEP: dict[tuple[int, ...], int] = {(3, 4, 6, 3): 50, (3, 4, 23, 3): 101, (3, 8, 36, 3): 152}


def infer_config(state: Weights, legacy: bool = False) -> tuple[Tree, list[str]]:
    """MMDetection's config of a state dict by 3.x's names, and what could not be told. legacy: the weights are of the 1.x line.

    Raises InputError for what is not here.
    """
    notes: list[str] = []
    head = _dense(state, notes)
    model: Tree = {
        "type": "SingleStageDetector",
        "bbox_head": head,
        "test_cfg": {"nms": {"iou_threshold": _NMS.get(str(head.get("type")), 0.5)}},
    }
    if not head:
        if "rpn_head.rpn_cls.weight" not in state or not any(k.startswith("roi_head.bbox_head.") for k in state):
            raise InputError(
                "the weights are of no detector that is known here by its names (RetinaNet, FCOS, VFNet, RepPoints, Faster, Mask, Cascade, "
                f"Grid R-CNN): the first is '{next(iter(state))}'; give --config, or another checkpoint"
            )
        model = {"type": "TwoStageDetector", "rpn_head": _rpn(state), "roi_head": _roi(state, notes)}
        if model["roi_head"]["type"] == "GridRoIHead":
            model["test_cfg"] = {"rcnn": {"score_thr": 0.03, "nms": {"iou_threshold": 0.3}}}
    model["backbone"], model["neck"] = (
        infer_backbone(state),
        _neck(state, "scales" if "bbox_head.scales.0.scale" in state else ""),
    )
    _anchors(model.get("rpn_head") or head, legacy)
    if model["backbone"]["depth"] >= 50:
        notes.append(
            "where bottlenecks have their stride cannot be told from the weights: style=pytorch is taken, give --config for caffe"
        )
    notes.append(
        "no config was given: thresholds, the scales of anchors, how images are resized and settings of the training are the usual ones"
    )
    return {"model": model}, notes


def _count(state: Weights, pattern: str) -> int:
    """One more than the largest number that the pattern finds in the names; 0 for none."""
    return max((int(m[1]) + 1 for key in state if (m := re.match(pattern, key))), default=0)


def infer_backbone(state: Weights) -> Tree:
    """ResNet or ResNeXt by the names `backbone.layer1.0.conv1.weight`, ..."""
    blocks = tuple(_count(state, rf"backbone\.layer{i}\.(\d+)\.") for i in (1, 2, 3, 4))
    deep = "backbone.layer1.0.conv3.weight" in state
    depth = (_DEEP if deep else _DEPTHS).get(blocks)
    if depth is None or "backbone.conv1.weight" not in state:
        raise InputError(
            f"the weights' body is no ResNet or ResNeXt that is known here: its four stages have {list(blocks)} blocks"
        )
    found: Tree = {"type": "ResNet", "depth": depth, "frozen_stages": 1, "norm_eval": True}
    width, inputs = (axis_size(state, "backbone.layer1.0.conv2.weight", i) for i in (0, 1))
    if deep and width != inputs:
        found |= {"type": "ResNeXt", "groups": width // inputs, "base_width": inputs}
    offsets = [
        next((k for k in state if re.match(rf"backbone\.layer{i}\.\d+\.conv2(_|\.conv_)offset.*weight", k)), None)
        for i in (1, 2, 3, 4)
    ]
    rows = [axis_size(state, k) for k in offsets if k is not None]
    if rows:
        found |= {
            "dcn": {"type": "DCNv2" if rows[0] == 27 else "DCN"},
            "stage_with_dcn": [k is not None for k in offsets],
        }
    return found


def _neck(state: Weights, points: str) -> Any:
    """FPN or PAFPN, with a BFP behind it."""
    many = "neck.0.lateral_convs.0.conv.weight" in state
    prefix = "neck.0." if many else "neck."
    laterals = _count(state, rf"{re.escape(prefix)}lateral_convs\.(\d+)\.")
    outputs = _count(state, rf"{re.escape(prefix)}fpn_convs\.(\d+)\.")
    if not laterals:
        raise InputError(
            "the weights' neck is none that is known here by its names: FPN, PAFPN and BFP behind them are"
        )
    found: Tree = {
        "type": "PAFPN" if f"{prefix}pafpn_convs.0.conv.weight" in state else "FPN",
        "out_channels": axis_size(state, f"{prefix}lateral_convs.0.conv.weight"),
        "start_level": 4 - laterals,
    }
    if f"{prefix}lateral_convs.0.gn.weight" in state:
        found["norm_cfg"] = {"type": "GN", "num_groups": 32}
    found["num_outs"] = outputs if outputs > laterals else 5
    if outputs > laterals:
        inputs = axis_size(state, f"{prefix}fpn_convs.{laterals}.conv.weight", 1)
        on_input = inputs == axis_size(state, f"{prefix}lateral_convs.{laterals - 1}.conv.weight", 1)
        # the heads that take P6 from P5 (FCOS, VFNet) have a ReLU before P7 in all of MMDetection's configs
        found |= {"add_extra_convs": "on_input" if on_input else "on_output", "relu_before_extra_convs": bool(points)}
    if not many:
        return found
    refine = (
        "conv"
        if "neck.1.refine.conv.weight" in state
        else "non_local"
        if any(k.startswith("neck.1.refine.") for k in state)
        else None
    )
    level = 1 if laterals == 3 else 2  # Libra's RetinaNet and Faster R-CNN
    return [found, {"type": "BFP", "num_levels": found["num_outs"], "refine_level": level, "refine_type": refine}]


def _dense(state: Weights, notes: list[str]) -> Tree:
    """The dense head, empty for two stages."""
    convs = _count(state, r"bbox_head\.cls_convs\.(\d+)\.")
    found: Tree = {"stacked_convs": convs}
    norm = {"type": "GN", "num_groups": 32} if "bbox_head.cls_convs.0.gn.weight" in state else None
    first = next((k for k in ("bbox_head.cls_convs.0.conv.weight", "bbox_head.cls_convs.0.weight") if k in state), None)
    found |= {"norm_cfg": norm, "feat_channels": 256 if first is None else axis_size(state, first)}
    last = f"bbox_head.cls_convs.{convs - 1}.conv.conv_offset.weight" in state
    if "bbox_head.retina_cls.weight" in state:
        anchors = axis_size(state, "bbox_head.retina_reg.weight") // 4
        if anchors != 9:
            raise InputError(
                f"RetinaNet with {anchors} anchors per cell: their scales and ratios cannot be told from the weights, give --config"
            )
        return found | {"type": "RetinaHead"}
    if "bbox_head.vfnet_cls.weight" in state:
        return found | {"type": "VFNetHead", "dcn_on_last_conv": last}
    if "bbox_head.reppoints_cls_out.weight" in state:
        method = "moment" if "bbox_head.moment_transfer" in state else "minmax"
        if method == "minmax":
            notes.append(
                "transform_method=minmax is taken; partial_minmax has the same weights: give --config if it was that"
            )
        points = "bbox_head.reppoints_pts_init_out.weight"
        return found | {
            "type": "RepPointsHead",
            "transform_method": method,
            "num_points": axis_size(state, points) // 2,
            "point_feat_channels": axis_size(state, points, 1),
        }
    if "bbox_head.conv_centerness.weight" in state or "bbox_head.fcos_centerness.weight" in state:
        notes.append(
            "norm_on_bbox and centerness_on_reg leave no trace in FCOS's weights: both are taken as false, give --config if they were not"
        )
        return found | {"type": "FCOSHead", "dcn_on_last_conv": last}
    return {}


def _rpn(state: Weights) -> Tree:
    anchors = axis_size(state, "rpn_head.rpn_cls.weight")
    if anchors != 3:
        raise InputError(
            f"an RPN with {anchors} anchors per cell: their scales and ratios cannot be told from the weights, give --config"
        )
    convs = _count(state, r"rpn_head\.rpn_conv\.(\d+)\.")
    return {
        "type": "RPNHead",
        "num_convs": max(convs, 1),
        "feat_channels": axis_size(state, "rpn_head.rpn_cls.weight", 1),
    }


def _anchors(head: Tree, legacy: bool) -> None:
    """The usual anchors, in the form of the line."""
    usual: dict[str, Tree] = {
        "RPNHead": {"scales": [8]},
        "RetinaHead": {"octave_base_scale": 4, "scales_per_octave": 3},
    }
    scales = usual.get(head["type"])
    if scales is None:
        return
    if legacy:
        head |= {"anchor_scales" if key == "scales" else key: value for key, value in scales.items()}
    else:
        head["anchor_generator"] = {"type": "AnchorGenerator", **scales}


def _roi(state: Weights, notes: list[str]) -> Tree:
    stages = _count(state, r"roi_head\.bbox_head\.(\d+)\.")
    prefixes = [f"roi_head.bbox_head.{i}." for i in range(stages)] or ["roi_head.bbox_head."]
    heads = [_stage(state, prefix) for prefix in prefixes]
    found: Tree = {"type": "StandardRoIHead", "bbox_head": heads[0]}
    if stages:
        stds = ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
        if stages != 3:
            raise InputError(
                f"a cascade of {stages} stages: how its codes are scaled cannot be told from the weights, give --config"
            )
        codes = [
            head | {"bbox_coder": {"type": "DeltaXYWHBBoxCoder", "target_stds": std}} for head, std in zip(heads, stds)
        ]
        found = {"type": "CascadeRoIHead", "bbox_head": codes, "stage_loss_weights": [1, 0.5, 0.25]}
    if masks := [
        k for k in state if k.startswith("roi_head.mask_head.") and k.endswith(("upsample.bias", "conv_logits.bias"))
    ]:
        convs = _count(state, r"roi_head\.mask_head\.(?:\d+\.)?convs\.(\d+)\.")
        width = next((axis_size(state, k) for k in masks if k.endswith("upsample.bias")), 256)
        found["mask_head"] = {"type": "FCNMaskHead", "num_convs": convs, "conv_out_channels": width}
    if "roi_head.grid_head.deconv1.weight" in state:
        points, width = (axis_size(state, f"roi_head.grid_head.deconv{i}.bias") for i in (2, 1))
        notes.append("how many groups Grid R-CNN's norms have cannot be told from the weights: 36 are taken")
        convs = _count(state, r"roi_head\.grid_head\.convs\.(\d+)\.")
        grid = {"type": "GridHead", "grid_points": points, "point_feat_channels": width // points, "num_convs": convs}
        found |= {"type": "GridRoIHead", "grid_head": grid}
    elif not stages:
        notes.append("Dynamic and Libra R-CNN's heads have Faster R-CNN's weights, and are taken for it")
    return found


def _stage(state: Weights, prefix: str) -> Tree:
    convs = _count(state, rf"{re.escape(prefix)}shared_convs\.(\d+)\.")
    found: Tree = {"type": "Shared4Conv1FCBBoxHead" if convs else "Shared2FCBBoxHead"}
    found["fc_out_channels"] = axis_size(state, f"{prefix}fc_cls.weight", 1)
    codes = f"{prefix}fc_reg.weight"
    return found | {"with_reg": codes in state, "reg_class_agnostic": codes in state and axis_size(state, codes) == 4}
