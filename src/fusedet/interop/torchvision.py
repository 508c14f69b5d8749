"""Convert torchvision's detection weights: RetinaNet v1 and v2, FCOS, Faster and Mask R-CNN v1 and v2.

- Background: softmax heads have its row first; here it comes last, and box and mask layers have no row of it.
- COCO: torchvision's 91 rows are category ids, of which 80 have instances; the others are left out. This is exact for
  the sigmoids of RetinaNet and FCOS, and for a softmax if it gives no probability to classes that never occurred.
- Batch norms of v2's necks, box and mask heads are folded into the convolutions before them, which is exact for
  prediction.
"""

import re
from collections.abc import Mapping
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
    """Return whether the weights have the names of torchvision's detectors."""
    return any(key.startswith("backbone.body.") for key in state) and any(
        key.startswith(("rpn.head.", "head.classification_head.")) for key in state
    )


def convert_torchvision_weights(state: Weights, file: str) -> ConvertedWeights:
    """Convert the weights of a torchvision detector.

    Args:
        state: State dict.
        file: Name of the file; it identifies the first published COCO weights.

    Raises:
        InputError: The detector is not supported.
    """
    notes: list[str] = []
    resnet = infer_backbone({re.sub(r"^backbone\.body\.", "backbone.", key): value for key, value in state.items()})
    name = f"resnet{resnet['depth']}"
    if "groups" in resnet:
        name = f"resnext{resnet['depth']}_{resnet['groups']}x{resnet['base_width']}d"
    backbone: Tree = {"name": f"{name}.tv_in1k", "pretrained": False, "frozen_stages": 1, "norm_eval": True}
    state = _subtract_eps(_fold_batch_norms(state, notes), file, notes)
    dense = any(key.startswith("head.classification_head.") for key in state)
    tree, rules, count, reordered = (_convert_one_stage if dense else _convert_two_stage)(state)
    tree["model"]["backbone"] = backbone
    tree["data"] = {"size": [800, 1333], "antialias": False}
    weights, sources = {}, {}
    for key, value in (state | reordered).items():
        new = rename_weight(key, COMMON + rules)
        weights[new], sources[new] = value, key
    if tree["model"]["head"]["type"] == "fcos":  # torchvision has no scales
        weights["head.scales"], sources["head.scales"] = torch.ones(5), "head.scales"
    if count < 1:
        raise InputError(f"the weights of {file} have no class but background: there is nothing to convert")
    if count == (91 if dense else 90):
        notes.append("of torchvision's 91 class rows, the 80 of COCO's classes are kept")
        return ConvertedWeights(tree, weights, sources, list(COCO), list(COCO_IDS), notes)
    notes.append(f"torchvision's weights have no class names: they are called class_0 to class_{count - 1}")
    ids = range(count) if dense else range(1, count + 1)
    return ConvertedWeights(tree, weights, sources, [f"class_{i}" for i in range(count)], list(ids), notes)


Parts = tuple[Tree, list[Rule], int, Weights]
"""Config, renaming rules, number of classes and reordered weights."""


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
    deltas = axis_size(state, "head.regression_head.bbox_reg.bias")
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
        if deltas != 36:
            raise InputError(
                "a torchvision RetinaNet needs 9 anchors per cell: the weights do not show the sizes of others"
            )
        head = {"type": "retina", "norm": normed, "bias": not normed, "round_anchors": True, "whole_sizes": True}
        test = {"score": 0.05, "nms": 0.5, "max_det": 300}
    anchors = max(deltas // 4, 1)
    logits = [f"head.classification_head.cls_logits.{kind}" for kind in ("weight", "bias")]
    reordered = {
        key: state[key].unflatten(0, (anchors, 91))[:, list(COCO_IDS)].flatten(0, 1)
        for key in logits
        if axis_size(state, key) == 91 * anchors
    }
    model = {"neck": "fpn", "pyramid": pyramid, "head": head}
    return {"model": model, "test": test}, rules, axis_size(state, logits[1]) // anchors, reordered


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
    rows = axis_size(state, "roi_heads.box_predictor.cls_score.bias")
    classes = list(COCO_IDS) if rows == 91 else list(range(1, rows))
    widths = {"box_predictor.cls_score": 1, "box_predictor.bbox_pred": 4, "mask_predictor.mask_fcn_logits": 1}
    reordered = {}
    for layer, width in widths.items():
        order = [*classes, 0] if layer.endswith("cls_score") else classes
        for key in (f"roi_heads.{layer}.{kind}" for kind in ("weight", "bias")):
            if key in state:
                if (size := axis_size(state, key)) != rows * width:
                    raise InputError(f"the weights' {key} has {size} rows: {rows} classes need {rows * width}")
                reordered[key] = state[key].unflatten(0, (rows, width))[order].flatten(0, 1)
    test = {"score": 0.05, "nms": 0.5, "max_det": 100}
    return {"model": model, "test": test, "train": {"lr": 0.02}}, TWO_STAGE, rows - 1, reordered


def _fold_batch_norms(state: Weights, notes: list[str]) -> Weights:
    """Fold batch norms outside the backbone into the convolutions before them."""
    folded = dict(state)
    norms = [k for k in state if k.endswith(".1.running_var") and not k.startswith("backbone.body.")]
    for key in norms:
        norm = key.removesuffix("running_var")
        conv = norm.removesuffix("1.") + "0."
        rows = axis_size(state, f"{conv}weight")
        names = [f"{norm}{part}" for part in ("weight", "bias", "running_mean", "running_var")]
        if any(axis_size(state, k) != rows or state[k].ndim != 1 for k in names) or state[f"{conv}weight"].ndim != 4:
            raise InputError(
                f"the weights' {norm}* is not a batch norm of {conv}weight: it must have one value per row of it"
            )
        weight, bias, mean, var = (folded.pop(name) for name in names)
        folded.pop(f"{norm}num_batches_tracked", None)
        scale = weight * (var + EPS).rsqrt()
        folded[f"{conv}weight"] = state[f"{conv}weight"] * scale.view(-1, 1, 1, 1)
        folded[f"{conv}bias"] = bias + (state.get(f"{conv}bias", 0) - mean) * scale
    if norms:
        notes.append(
            f"{len(norms)} batch norms outside the backbone are folded into their convolutions: further training has "
            "none"
        )
    return folded


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
