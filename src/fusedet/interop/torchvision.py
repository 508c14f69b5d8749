"""Convert torchvision's detection weights: RetinaNet v1 and v2, FCOS, Faster and Mask R-CNN v1 and v2.

- Background: softmax heads have its row first; here it comes last, and box and mask layers have no row of it.
- COCO: torchvision's 91 rows are category ids, of which 80 have instances; the others are left out. This is exact for
  the sigmoids of RetinaNet and FCOS, and for a softmax if it gives no probability to classes that never occurred.
- Batch norms of v2's necks, box and mask heads are folded into the convolutions before them, which is exact for
  prediction.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.interop.class_names import COCO, COCO_IDS
from fusedet.interop.mmdetection.infer_config import infer_backbone
from fusedet.interop.mmdetection.weight_names import Rule, rename_weight
from fusedet.interop.weight_shapes import axis_size

Tree = dict[str, Any]
Weights = dict[str, Tensor]
EPS = 1e-5
# Hashes in the names of files that were trained with frozen batch norms without epsilon.
_WITHOUT_EPS = ("258fb6c6", "bf2d0c1e", "eeacb38b")

COMMON: list[Rule] = [
    (r"^backbone\.body\.", "backbone.body."),
    (r"^backbone\.fpn\.inner_blocks\.(\d+)\.(?:0\.)?(weight|bias)$", r"neck.lateral.\1.\2"),
    (r"^backbone\.fpn\.layer_blocks\.(\d+)\.(?:0\.)?(weight|bias)$", r"neck.output.\1.\2"),
    (r"^backbone\.fpn\.extra_blocks\.p([67])\.", lambda m: f"neck.top.convs.{int(m[1]) - 6}."),
]
TWO_STAGE: list[Rule] = [
    (r"^rpn\.head\.conv\.(\d+)\.0\.", lambda m: f"head.tower.{2 * int(m[1])}."),
    (r"^rpn\.head\.conv\.(weight|bias)$", r"head.tower.0.\1"),
    (r"^rpn\.head\.cls_logits\.", "head.cls."),
    (r"^rpn\.head\.bbox_pred\.", "head.reg."),
    (r"^roi_heads\.box_head\.fc([67])\.", lambda m: f"stages.0.shared.{int(m[1]) - 6}."),
    (r"^roi_heads\.box_head\.(\d+)\.0\.", r"stages.0.convs.\1."),
    (r"^roi_heads\.box_head\.5\.", "stages.0.shared.0."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "stages.0.cls."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "stages.0.reg."),
    (r"^roi_heads\.mask_head\.(\d+)\.0\.", r"branches.0.0.convs.\1."),
    (r"^roi_heads\.mask_head\.mask_fcn(\d+)\.", lambda m: f"branches.0.0.convs.{int(m[1]) - 1}."),
    (r"^roi_heads\.mask_predictor\.conv5_mask\.", "branches.0.0.upsample."),
    (r"^roi_heads\.mask_predictor\.mask_fcn_logits\.", "branches.0.0.logits."),
]
_TOWER = {"classification": "cls", "regression": "reg"}


@dataclass(frozen=True)
class ConvertedWeights:
    """Converted weights.

    Attributes:
        tree: fusedet's config as a nested mapping.
        weights: Weights by the names of this project.
        sources: Names in the file by the names of this project.
        names: Class names.
        category_ids: Category ids of the classes.
        notes: Notes for the user.
    """

    tree: Tree
    weights: Weights
    sources: dict[str, str]
    names: list[str]
    category_ids: list[int]
    notes: list[str]


def is_torchvision(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights have the names of torchvision's detectors."""
    return any(key.startswith("backbone.body.") for key in state) and any(
        key.startswith(("rpn.head.", "head.classification_head.")) for key in state
    )


def convert_weights(state: Weights, file: str) -> ConvertedWeights:
    """Convert the weights of a torchvision detector.

    Args:
        state: State dict.
        file: Name of the file; it identifies the first published COCO weights.

    Raises:
        InputError: The detector is not supported.
    """
    notes: list[str] = []
    resnet = infer_backbone({re.sub(r"^backbone\.body\.", "backbone.", key): value for key, value in state.items()})
    name = (
        f"resnext{resnet['depth']}_{resnet['groups']}x{resnet['base_width']}d"
        if "groups" in resnet
        else f"resnet{resnet['depth']}"
    )
    backbone: Tree = {"name": f"{name}.tv_in1k", "pretrained": False, "frozen_stages": 1, "norm_eval": True}
    state = _fold_batch_norms(state, notes)
    state = _subtract_eps(state, file, notes)
    dense = any(key.startswith("head.classification_head.") for key in state)
    model, test, rules, reorder_rows = (_convert_one_stage if dense else _convert_two_stage)(state)
    weights, sources = {}, {}
    for key, value in reorder_rows(state).items():
        new = rename_weight(key, COMMON + rules)
        weights[new], sources[new] = value, key
    if model["head"]["type"] == "fcos":  # torchvision has no scales
        weights["head.scales"], sources["head.scales"] = torch.ones(5), "head.scales"
    count = _count_classes(state, dense)
    if count < 1:
        raise InputError(f"the weights of {file} have no class but background: there is nothing to convert")
    coco = count == (91 if dense else 90)
    if coco:
        notes.append("of torchvision's 91 class rows, the 80 of COCO's classes are kept")
    else:
        notes.append(f"torchvision's weights have no class names: they are called class_0 to class_{count - 1}")
    names = list(COCO) if coco else [f"class_{i}" for i in range(count)]
    ids = list(COCO_IDS) if coco else list(range(0 if dense else 1, count + (0 if dense else 1)))
    tree = {"model": {"backbone": backbone, **model}, "data": {"size": [800, 1333], "antialias": False}, "test": test}
    if not dense:
        tree["train"] = {"lr": 0.02}
    return ConvertedWeights(tree, weights, sources, names, ids, notes)


Parts = tuple[Tree, Tree, list[Rule], Callable[[Weights], Weights]]


def _count_classes(state: Weights, dense: bool) -> int:
    """Count the classes: rows of a dense head per anchor, or rows of the box head without background."""
    if not dense:
        return axis_size(state, "roi_heads.box_predictor.cls_score.bias") - 1
    return axis_size(state, "head.classification_head.cls_logits.bias") // max(
        axis_size(state, "head.regression_head.bbox_reg.bias") // 4, 1
    )


def _convert_one_stage(state: Weights) -> Parts:
    """Convert a RetinaNet or FCOS."""
    fcos = "head.regression_head.bbox_ctrness.weight" in state
    normed = fcos or "head.classification_head.conv.0.1.weight" in state
    # FCOS and the first RetinaNet have the layers of a tower in one sequence.
    flat = not any(re.match(r"head\.classification_head\.conv\.\d+\.0\.", key) for key in state)
    step = 3 if normed else 2

    def rename_tower(m: re.Match[str]) -> str:
        inner = step * int(m[2]) + int(m[3]) if m[3] else int(m[2])
        return f"head.towers.{_TOWER[m[1]]}.{inner}."

    rules: list[Rule] = [
        (r"^head\.(classification|regression)_head\.conv\.(\d+)\." + ("()?" if flat else r"(\d+)\."), rename_tower),
        (r"^head\.classification_head\.cls_logits\.", "head.cls."),
        (r"^head\.regression_head\.bbox_reg\.", "head.reg."),
        (r"^head\.regression_head\.bbox_ctrness\.", "head.centerness."),
    ]
    p6 = "backbone.fpn.extra_blocks.p6.weight"
    on_input = axis_size(state, p6, 1) != axis_size(state, p6)
    pyramid = {"channels": 256, "finest": 3, "coarsest": 7, "top": "on_input_relu" if on_input else "on_output"}
    if fcos:
        head: Tree = {
            "type": "fcos",
            "normalize_boxes": True,
            "centerness_on_box": True,
            "box_loss": "giou",
            "center_sampling": True,
            "offset": 0.0,
        }
        # torchvision's scores are square roots of those here, and so is its threshold 0.2.
        test = {"score": 0.04, "nms": 0.6, "max_det": 100}
    else:
        if axis_size(state, "head.regression_head.bbox_reg.bias") != 36:
            raise InputError(
                "a torchvision RetinaNet needs 9 anchors per cell: the weights do not show the sizes of others"
            )
        head = {"type": "retina", "norm": normed, "bias": not normed, "round_anchors": True, "whole_sizes": True}
        test = {"score": 0.05, "nms": 0.5, "max_det": 300}
    anchors = 1 if fcos else 9

    def reorder_rows(given: Weights) -> Weights:
        kept = dict(given)
        for kind in ("weight", "bias"):
            key = f"head.classification_head.cls_logits.{kind}"
            if axis_size(given, key) == 91 * anchors:
                kept[key] = given[key].unflatten(0, (anchors, 91))[:, list(COCO_IDS)].flatten(0, 1)
        return kept

    return {"neck": "fpn", "pyramid": pyramid, "head": head}, test, rules, reorder_rows


def _convert_two_stage(state: Weights) -> Parts:
    """Convert a Faster or Mask R-CNN."""
    convs = sum(bool(re.fullmatch(r"roi_heads\.box_head\.\d+\.0\.weight", key)) for key in state)
    depth = sum(bool(re.fullmatch(r"rpn\.head\.conv\.\d+\.0\.weight", key)) for key in state)
    if axis_size(state, "rpn.head.cls_logits.bias") != 3:
        raise InputError("a torchvision RPN needs 3 anchors per cell: the weights do not show the sizes of others")
    pooling = {"type": "level", "samples": 2, "aligned": False}
    stage: Tree = {"type": "box", "pooling": pooling} | ({"convs": convs, "layers": 1} if convs else {})
    masks = any(key.startswith("roi_heads.mask_predictor.") for key in state)
    model: Tree = {
        "neck": "fpn",
        "pyramid": {"channels": 256, "finest": 2, "coarsest": 6, "top": "max_pool"},
        "head": {"type": "rpn", "round_anchors": True, "loss": "smooth_l1"} | ({"convs": depth} if depth > 1 else {}),
        "roi": {"stages": [stage], "branches": [{"type": "mask", "pooling": dict(pooling)}] if masks else []},
    }

    def reorder_rows(given: Weights) -> Weights:
        kept = dict(given)
        keep = list(COCO_IDS) if axis_size(given, "roi_heads.box_predictor.cls_score.bias") == 91 else None
        for kind in ("weight", "bias"):
            for layer, width in (
                ("box_predictor.cls_score", 1),
                ("box_predictor.bbox_pred", 4),
                ("mask_predictor.mask_fcn_logits", 1),
            ):
                key = f"roi_heads.{layer}.{kind}"
                if key in given:
                    if (
                        axis_size(given, key)
                        != (count := axis_size(given, "roi_heads.box_predictor.cls_score.bias")) * width
                    ):
                        raise InputError(
                            f"the weights' {key} has {axis_size(given, key)} rows: {count} classes need {count * width}"
                        )
                    by_class = given[key].unflatten(0, (-1, width))
                    classes = by_class[keep] if keep else by_class[1:]
                    kept[key] = (
                        torch.cat([classes, by_class[:1]]) if layer.endswith("cls_score") else classes
                    ).flatten(0, 1)
        return kept

    return model, {"score": 0.05, "nms": 0.5, "max_det": 100}, TWO_STAGE, reorder_rows


def _fold_batch_norms(state: Weights, notes: list[str]) -> Weights:
    """Fold batch norms outside the backbone into the convolutions before them."""
    folded_state = dict(state)
    folded = 0
    for key in state:
        if not key.endswith(".1.running_var") or key.startswith("backbone.body."):
            continue
        norm = key.removesuffix("running_var")
        conv = norm.removesuffix("1.") + "0."
        parts = [f"{norm}{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if (
            any(axis_size(state, name) != axis_size(state, f"{conv}weight") or state[name].ndim != 1 for name in parts)
            or state[f"{conv}weight"].ndim != 4
        ):
            raise InputError(
                f"the weights' {norm}* is not a batch norm of {conv}weight: it must have one value per row of it"
            )
        scale = state[f"{norm}weight"] * (state[key] + EPS).rsqrt()
        folded_state[f"{conv}weight"] = state[f"{conv}weight"] * scale.view(-1, 1, 1, 1)
        folded_state[f"{conv}bias"] = (
            state[f"{norm}bias"] + (state.get(f"{conv}bias", 0) - state[f"{norm}running_mean"]) * scale
        )
        for name in (*parts, f"{norm}num_batches_tracked"):
            folded_state.pop(name, None)
        folded += 1
    if folded:
        notes.append(
            f"{folded} batch norms outside the backbone are folded into their convolutions: further training has none"
        )
    return folded_state


def _subtract_eps(state: Weights, file: str, notes: list[str]) -> Weights:
    """Subtract the epsilon that batch norms here add from the variances of weights that were trained without it."""
    frozen = "backbone.body.bn1.running_var" in state and "backbone.body.bn1.num_batches_tracked" not in state
    first = any(hash_ in file for hash_ in _WITHOUT_EPS) or "backbone.fpn.inner_blocks.0.weight" in state
    if not (frozen and first):
        return state
    notes.append(
        "the backbone's batch norms are those of torchvision's first weights, without an epsilon: it is subtracted "
        "from the variances"
    )
    return {k: v - EPS if k.startswith("backbone.body.") and k.endswith("running_var") else v for k, v in state.items()}
