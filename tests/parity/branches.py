"""Parity adapters: MMDetection's mask and grid heads as our branches, behind a box stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from cases import Case, Errors, unmatched
from roi import LAYERS, Given, box_stage, gradients, predicted, wrong_losses
from torch import Tensor, nn

from fusedet.models.detectors.two_stage import TwoStage
from fusedet.models.roi import GridBranch, LevelPooling, MaskBranch
from fusedet.models.roi.pooling import PoolingFactory
from fusedet.types import Detections, Levels, Proposals

STAGE = [(r"^bbox_head\.", "stages.0."), *LAYERS]
MASK = [
    (r"^mask_head\.convs\.(\d+)\.conv\.", r"branches.0.0.convs.\1."),
    (r"^mask_head\.(?:conv_)?(\w+)\.", r"branches.0.0.\1."),
]
GRID = [
    (r"^grid_head\.convs\.(\d+)\.conv\.", lambda m: f"branches.0.0.convs.{3 * int(m[1])}."),
    (r"^grid_head\.convs\.(\d+)\.gn\.", lambda m: f"branches.0.0.convs.{3 * int(m[1]) + 1}."),
    (r"^grid_head\.deconv1\.", "branches.0.0.up."),
    (r"^grid_head\.norm1\.", "branches.0.0.norm."),
    (r"^grid_head\.deconv2\.", "branches.0.0.heat."),
    (r"^grid_head\.", "branches.0.0."),
]


def mask(case: Case) -> tuple[Errors, dict[str, int]]:
    """A box stage and a mask branch."""
    c, train = case.config["roi_head"], case.config["train_cfg"]
    head = c["mask_head"]
    levels, pooling, size = read_extractor(c["mask_roi_extractor"])
    branch = MaskBranch(
        levels,
        head["num_classes"],
        pooling,
        size,
        head["num_convs"],
        head["conv_out_channels"],
        head["loss_mask"]["loss_weight"],
    )
    model = TwoStage(
        *[build_given(case)] * 3, [box_stage(c, c["bbox_head"], train)], [[branch]], selection_options(case)
    )
    renames = [*STAGE, *MASK]
    parts = nn.ModuleDict({"stages": model.stages, "branches": model.branches})
    parts.load_state_dict(case.state(renames))
    batch = case.batch()
    masks = [case.tensors[f"in.gt_masks.{i}"].bool() for i in range(len(batch))]
    batch = replace(batch, targets=tuple(replace(t, masks=m) for t, m in zip(case.targets(), masks)))
    losses = {k: v * model.loss_weights[k] for k, v in model.loss(batch).items()}
    names = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_mask": "loss_mask"}
    errors = {"losses": wrong_losses(losses, case.spec["losses"], names)}
    errors |= gradients(case, parts, model.neck.features, losses, renames)
    wrong, total = 0, 0
    for i, detections in enumerate(model.eval().predict(batch)):
        wrong += unmatched(detections, *predicted(case, i)) + count_wrong_masks(
            detections, *predicted(case, i), case.tensors[f"out.pred.{i}.masks"]
        )
        total += len(detections)
    return errors | {"unmatched": float(wrong)}, {"detections with masks": total}


def grid(case: Case) -> tuple[Errors, dict[str, int]]:
    """A stage without box regression and a grid branch; predictions only, as the training of the grid is random."""
    c, train = case.config["roi_head"], case.config["train_cfg"]
    head = c["grid_head"]
    levels, pooling, size = read_extractor(c["grid_roi_extractor"])
    branch = GridBranch(
        levels,
        c["bbox_head"]["num_classes"],
        pooling,
        size,
        round(head["grid_points"] ** 0.5),
        head["num_convs"],
        head["point_feat_channels"],
        head["norm_cfg"]["num_groups"],
    )
    model = TwoStage(
        *[build_given(case)] * 3,
        [box_stage(c, c["bbox_head"], train, regress=False)],
        [[branch]],
        selection_options(case),
    )
    merge_edges(case, "forder", "first_order", branch.points)
    merge_edges(case, "sorder", "second_order", branch.points)
    nn.ModuleDict({"stages": model.stages, "branches": model.branches}).load_state_dict(case.state([*STAGE, *GRID]))
    wrong, total = 0, 0
    for i, detections in enumerate(model.eval().predict(case.batch())):
        wrong += unmatched(detections, *predicted(case, i))
        total += len(detections)
    return {"unmatched": float(wrong)}, {"detections": total}


def build_given(case: Case) -> Given:
    """Build the stand-in for backbone, neck and head from the case's features and proposals."""
    boxes = [case.tensors[f"in.proposals.{i}.bboxes"] for i in range(len(case.sizes))]
    padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    proposals = Proposals(padded, padded.new_zeros(padded.shape[:2]), torch.tensor([len(b) for b in boxes]))
    return Given([f.requires_grad_() for f in case.levels("in.features")], proposals)


def read_extractor(c: dict[str, Any]) -> tuple[Levels, PoolingFactory, int]:
    """Read levels, pooling and size from MMDetection's config of an RoI extractor."""
    levels = Levels((c["out_channels"],) * len(c["featmap_strides"]), tuple(c["featmap_strides"]))
    layer = c["roi_layer"]
    return levels, lambda size: LevelPooling(levels, size, samples=layer["sampling_ratio"]), layer["output_size"]


def selection_options(case: Case) -> dict[str, Any]:
    """Convert MMDetection's test settings to our options."""
    test = case.config["test_cfg"]
    return {"score": test["score_thr"], "iou": test["nms"]["iou_threshold"], "max_det": test["max_per_img"]}


def merge_edges(case: Case, theirs: str, ours: str, points: int) -> None:
    """Concatenate MMDetection's convolutions of the grid's edges to our two grouped ones."""
    for layer, name in enumerate(("depthwise", "pointwise")):
        for kind in ("weight", "bias"):
            keys = [f"state.grid_head.{theirs}_trans.{i}.{j}.{layer}.{kind}" for i in range(points) for j in range(4)]
            tensors = [case.tensors.pop(key) for key in keys if key in case.tensors]
            case.tensors[f"state.grid_head.{ours}.{name}.{kind}"] = torch.cat(tensors)


def count_wrong_masks(ours: Detections, boxes: Tensor, scores: Tensor, labels: Tensor, masks: Tensor) -> int:
    """Count our detections whose mask differs from their partner's in more than 0.1 % of both masks' pixels."""
    assert ours.masks is not None
    if ours.masks.shape[1:] != masks.shape[1:]:
        return len(ours)
    wrong = 0
    for box, score, label, mask in zip(ours.boxes, ours.scores, ours.labels, ours.masks):
        partners = masks[
            ((boxes - box).abs().amax(dim=1) <= 0.01) & ((scores - score).abs() <= 1e-4) & (labels == label)
        ]
        wrong += not any(int((mask ^ theirs).sum()) <= 1e-3 * int((mask | theirs).sum()) for theirs in partners)
    return wrong


BRANCH_ADAPTERS: dict[str, Callable[[Case], tuple[Errors, dict[str, int]]]] = {
    "StandardRoIHead with masks": mask,
    "GridRoIHead": grid,
}
