"""Adapters of anchor-free and matching dense heads, necks and Soft-NMS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Errors, largest, relative
from torch import Tensor, nn

from fusedet.interop.mmdetection.weight_names import dense_head_rules, rename_weight
from fusedet.interop.mmdetection.weight_tables import NECK_RULES
from fusedet.models.heads import AutoAssignHead, FoveaHead, FreeAnchorHead, FSAFHead, YOLOFHead
from fusedet.models.necks import NASFPN, DyHead
from fusedet.models.ops.boxes import nms_keep_mask
from fusedet.models.ops.soft_nms import SoftNMS
from fusedet.types import Levels

DenseComparison = Callable[..., tuple[Errors, dict[str, int]]]


def dense_levels(c: dict[str, Any]) -> Levels:
    """Return the levels of a head's config."""
    strides = c["strides"] if "strides" in c else c["anchor_generator"]["strides"]
    return Levels((c["in_channels"],) * len(strides), tuple(strides))


def head_names(**spec: Any) -> list[tuple[str, Any]]:
    """Return the renames of a dense head: those of the conversion of checkpoints."""
    rules = dense_head_rules(spec)
    return [(r"^.+$", lambda m: rename_weight(f"bbox_head.{m[0]}", rules).removeprefix("head."))]


def neck_names(kind: str) -> list[tuple[str, Any]]:
    """Return the renames of a neck: those of the conversion of checkpoints."""
    return [(r"^.+$", lambda m: rename_weight(m[0], NECK_RULES[kind]))]


def two_maps(m: dict[str, list[Tensor]]) -> list[list[Tensor]]:
    """Return class logits and boxes."""
    return [m["cls"], m["reg"]]


BOTH = {"loss_cls": "loss_cls", "loss_box": "loss_bbox"}


def free_anchor(case: Case, compare: DenseComparison) -> tuple[Errors, dict[str, int]]:
    """Compare FreeAnchor's head."""
    c = case.config["head"]
    anchors = c["anchor_generator"]
    head = FreeAnchorHead(
        dense_levels(c),
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        base_scale=anchors["octave_base_scale"],
        scales_per_octave=anchors["scales_per_octave"],
        ratios=anchors["ratios"],
        beta=c["loss_bbox"]["beta"],
        box_weight=c["loss_bbox"]["loss_weight"],
    )
    losses = {"loss_positive": "positive_bag_loss", "loss_negative": "negative_bag_loss"}
    return compare(case, head, head_names(type="free_anchor"), losses, two_maps)


def fovea(case: Case, compare: DenseComparison) -> tuple[Errors, dict[str, int]]:
    """Compare FoveaBox's head, with and without alignment."""
    c = case.config["head"]
    norm = bool(c.get("norm_cfg"))
    head = FoveaHead(
        dense_levels(c),
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        norm=norm,
        bias=not norm,
        align=c["with_deform"],
        sigma=c["sigma"],
        base_scale=c["base_edge_list"][0] / c["strides"][0],
        ranges=c["scale_ranges"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
        beta=c["loss_bbox"]["beta"],
    )
    return compare(case, head, head_names(type="fovea", norm=norm, align=c["with_deform"]), BOTH, two_maps)


def fsaf(case: Case, compare: DenseComparison) -> tuple[Errors, dict[str, int]]:
    """Compare FSAF's head."""
    c = case.config["head"]
    head = FSAFHead(
        dense_levels(c),
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        scale=case.config["train_cfg"]["assigner"]["pos_scale"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
    )
    return compare(case, head, head_names(type="fsaf"), BOTH, two_maps)


def yolof(case: Case, compare: DenseComparison) -> tuple[Errors, dict[str, int]]:
    """Compare YOLOF's head."""
    c, train = case.config["head"], case.config["train_cfg"]["assigner"]
    head = YOLOFHead(
        dense_levels(c),
        c["num_classes"],
        scales=c["anchor_generator"]["scales"],
        positive=train["pos_ignore_thr"],
        negative=train["neg_ignore_thr"],
        most_shift=c["bbox_coder"]["ctr_clamp"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
    )
    return compare(case, head, head_names(type="yolof"), BOTH, two_maps)


def autoassign(case: Case, compare: DenseComparison) -> tuple[Errors, dict[str, int]]:
    """Compare AutoAssign's head; MMDetection's boxes are in pixels."""
    c = case.config["head"]
    indices = range(len(c["strides"]))
    case.tensors["state.scales"] = torch.stack([case.tensors.pop(f"state.scales.{i}.scale") for i in indices])
    norms = case.spec["grad_norms"]
    norms["scales"] = math.hypot(*(norms.pop(f"scales.{i}.scale") for i in indices))
    head = AutoAssignHead(
        dense_levels(c),
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        box_weight=c["loss_bbox"]["loss_weight"],
    )
    losses = {f"loss_{ours}": f"loss_{theirs}" for ours, theirs in (("positive", "pos"), ("negative", "neg"))}

    def maps(m: dict[str, list[Tensor]]) -> list[list[Tensor]]:
        return [m["cls"], [r * stride for r, stride in zip(m["reg"], c["strides"])], m["centerness"]]

    return compare(case, head, head_names(type="autoassign"), losses | {"loss_center": "loss_center"}, maps)


DENSE = {
    "FreeAnchorRetinaHead": free_anchor,
    "FoveaHead": fovea,
    "FSAFHead": fsaf,
    "YOLOFHead": yolof,
    "AutoAssignHead": autoassign,
}
"""Adapters of dense heads, which get `run.compare_dense`."""


def soft_nms(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare Soft-NMS and hard NMS: which boxes are selected, in which order, and their scores."""
    boxes, scores, labels = (case.tensors[f"in.{k}"][None] for k in ("boxes", "scores", "labels"))
    worst, total = 0.0, 0
    for name, options in case.config["op"]["variants"].items():
        theirs, order = case.tensors[f"out.{name}.dets"], case.tensors[f"out.{name}.inds"]
        iou = options["iou_threshold"]
        if options["method"] == "naive":
            kept = nms_keep_mask(boxes, scores, iou)[0] & (scores[0] >= options["min_score"])
            index = torch.where(kept, scores[0], -1).argsort(descending=True, stable=True)[: int(kept.sum())]
            values = scores[0, index]
        else:
            own = labels if name.startswith("batched") else torch.zeros_like(labels)
            soft = SoftNMS(options["method"], options["sigma"], options["min_score"])
            values, index = (x[0] for x in soft.select(boxes, scores, own, iou, boxes.shape[1]))
            index, values = index[values >= 0], values[values >= 0]
        same = index.shape == order.shape and torch.equal(index, order)
        worst = max(worst, relative(values, theirs[:, 4]) if same else float("inf"))
        total += len(order)
    return {"features": worst}, {"detections": total}


def compare_neck(case: Case, neck: nn.Module, renames: list[tuple[str, Any]]) -> tuple[Errors, dict[str, int]]:
    """Compare the outputs of a neck in eval mode."""
    neck.load_state_dict(case.state(renames))
    with torch.no_grad():
        outputs = neck.eval()(case.levels("in.features"))
    reference = case.levels("out.features")
    return {"features": largest(outputs, reference)}, {"levels": len(reference)}


def dyhead(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare DyHead."""
    c = case.config["neck"]
    strides = tuple(8 * 2**i for i in range(len(case.levels("in.features"))))
    neck = DyHead(Levels((c["in_channels"],) * len(strides), strides), c["num_blocks"])
    return compare_neck(case, neck, neck_names("dyhead"))


def nas_fpn(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare NAS-FPN."""
    c = case.config["neck"]
    finest = 2 + c["start_level"]
    levels = Levels(tuple(c["in_channels"]), tuple(4 * 2**i for i in range(len(c["in_channels"]))))
    neck = NASFPN(levels, c["out_channels"], finest, finest + c["num_outs"] - 1, c["stack_times"])
    return compare_neck(case, neck, neck_names("nas_fpn"))


OTHERS = {"soft_nms": soft_nms, "DyHead": dyhead, "NASFPN": nas_fpn}
"""Adapters of everything else."""
