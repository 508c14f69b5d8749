"""Parity adapters: MMDetection's RPN and its standard, cascade and dynamic RoI heads as our parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Errors, largest, relative, renamed, unmatched
from torch import Tensor, nn

from fusedet.interop.mmdetection.weight_names import STAGE, rename_weight
from fusedet.models.detectors.two_stage import TwoStage
from fusedet.models.heads import RPNHead
from fusedet.models.ops.assigners import BACKGROUND, gather_positives
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.ops.soft_nms import SoftNMS
from fusedet.models.roi import BoxStage, DoubleHeadStage, DynamicStage
from fusedet.types import Detections, Levels, Losses, Outputs, Proposals

LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "BalancedL1Loss": "balanced_l1"}
LAYERS = [(r"shared_fcs\.(\d)", r"shared.\1"), (r"fc_cls\.", "cls."), (r"fc_reg\.", "reg.")]


def rpn(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare the RPN: maps, losses, gradients and proposals."""
    c, train, test = case.config["head"], case.config["train_cfg"], case.config["test_cfg"]
    anchors, assigner = c["anchor_generator"], train["assigner"]
    head = RPNHead(
        Levels((c["in_channels"],) * len(anchors["strides"]), tuple(anchors["strides"])),
        channels=c["feat_channels"],
        scale=anchors["scales"][0],
        ratios=anchors["ratios"],
        positive=assigner["pos_iou_thr"],
        negative=assigner["neg_iou_thr"],
        min_positive=assigner["min_pos_iou"],
        num=train["sampler"]["num"],
        fraction=train["sampler"]["pos_fraction"],
        loss=LOSSES[c["loss_bbox"]["type"]],
        beta=c["loss_bbox"].get("beta", 1.0),
        nms=test["nms"]["iou_threshold"],
        proposals=test["max_per_img"],
    )
    renames = [(r"^rpn_conv\.", "tower.0."), (r"^rpn_(cls|reg)\.", r"\1.")]
    head.load_state_dict(case.state(renames))
    features = [f.requires_grad_() for f in case.levels("in.features")]
    outputs = head(features)
    raw = [largest(outputs.maps[k], case.levels(f"out.head.{i}")) for i, k in enumerate(("cls", "reg"))]
    losses = head.loss(outputs, case.targets())
    losses["loss_rpn_cls"] = losses["loss_rpn_cls"] + foreign_class_loss(head, outputs, case)
    names = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_box": "loss_rpn_bbox"}
    errors = {"raw": max(raw), "losses": wrong_losses(losses, case.spec["losses"], names)}
    errors |= gradients(case, head, features, losses, renames)
    proposals = head.propose(outputs, case.sizes, pre_nms=test["nms_pre"])
    wrong, total = 0, 0
    for i, n in enumerate(proposals.counts.tolist()):
        ours = Detections(proposals.boxes[i, :n], proposals.scores[i, :n], torch.zeros(n, dtype=torch.int64))
        wrong += unmatched(ours, *predicted(case, i))
        total += n
    return errors | {"unmatched": float(wrong)}, {"proposals": total}


def foreign_class_loss(head: RPNHead, outputs: Outputs, case: Case) -> Tensor:
    """Compute what several classes add to MMDetection's classification loss.

    MMDetection's detector sets all labels to 0 before its RPN sees them. Without a detector, as in these cases, the RPN
    takes positives of other classes for background: BCE(x, 0) - BCE(x, 1) = x more for each.
    """
    assigned = torch.stack([head.assigner.assign(outputs.priors, t) for t in case.targets()])
    counts = [(assigned >= 0).sum(dim=1), (assigned == BACKGROUND).sum(dim=1)]
    positives = gather_positives(assigned, case.targets())
    logits = flatten_maps(outputs.maps["cls"], 1)[positives.image, positives.prior, 0]
    return logits[positives.labels > 0].sum() / sum(n.clamp(min=1).sum() for n in counts)


def standard(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare a box stage."""
    c = case.config["roi_head"]
    stage = box_stage(c, c["bbox_head"], case.config["train_cfg"])
    renames = [(r"^bbox_head\.", "0."), *LAYERS]
    return compare_stages(
        case, [stage], renames, [case.spec["losses"]], {"loss_cls": "loss_cls", "loss_box": "loss_bbox"}
    )


def double_head(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare Double-Head's stage."""
    c = case.config["roi_head"]
    head = c["bbox_head"]
    stage = box_stage(
        c,
        head,
        case.config["train_cfg"],
        DoubleHeadStage,
        layers=head["num_fcs"],
        blocks=head["num_convs"],
        box_channels=head["conv_out_channels"],
        enlarge=c["reg_roi_scale_factor"],
        loss=LOSSES[head["loss_bbox"]["type"]],
        beta=head["loss_bbox"]["beta"],
        cls_weight=head["loss_cls"]["loss_weight"],
        box_weight=head["loss_bbox"]["loss_weight"],
    )
    renames = [(r"^bbox_head\.(.+)$", lambda m: f"0.{rename_weight(m[1], STAGE)}")]
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox"}
    # BatchNorm in channels_last sums its statistics on a CPU with an error that closes other ReLUs; float64 agrees
    return compare_stages(case, [stage], renames, [case.spec["losses"]], losses, torch.contiguous_format)


def cascade(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare several stages, each on the boxes of the one before."""
    c = case.config["roi_head"]
    options = zip(c["bbox_head"], case.config["train_cfg"], c["stage_loss_weights"], strict=True)
    parts = [box_stage(c, head, train, weight=weight) for head, train, weight in options]
    names = {
        f"s{i}_{ours}": f"s{i}.{theirs}"
        for i in range(len(parts))
        for ours, theirs in (("loss_cls", "loss_cls"), ("loss_box", "loss_bbox"))
    }
    return compare_stages(case, parts, [(r"^bbox_head\.", ""), *LAYERS], [case.spec["losses"]], names)


def dynamic(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare a dynamic stage: several losses in a row, then its threshold and beta."""
    c, train = case.config["roi_head"], case.config["train_cfg"]
    d = train["dynamic_rcnn"]
    options = {"interval": d["update_iter_interval"]} | {
        k: d[k] for k in ("iou_topk", "beta_topk", "initial_iou", "initial_beta")
    }
    stage = box_stage(c, c["bbox_head"], train, DynamicStage, **options)
    fresh = {f"0.{k}": v for k, v in stage.state_dict().items() if not k.startswith("box.")}
    case.tensors |= {f"state.{k}": v for k, v in fresh.items()}  # MMDetection does not save them
    steps = case.spec["losses"]["step"]
    renames = [(r"^bbox_head\.", "0.box."), *LAYERS]
    errors, sizes = compare_stages(case, [stage], renames, steps, {"loss_cls": "loss_cls", "loss_box": "loss_bbox"})
    for ours, theirs in ((stage.beta, "beta"), (stage.threshold, "iou")):
        errors["losses"] = max(errors["losses"], relative(ours, torch.tensor(case.spec["losses"][theirs])))
    return errors, sizes


def box_stage(
    roi: dict[str, Any], head: dict[str, Any], train: dict[str, Any], make: type[nn.Module] = BoxStage, **more: Any
) -> nn.Module:
    """Build the stage of MMDetection's config of a box head."""
    strides = tuple(roi["bbox_roi_extractor"]["featmap_strides"])
    options: dict[str, Any] = {
        "size": head["roi_feat_size"],
        "channels": head["fc_out_channels"],
        "class_agnostic": head["reg_class_agnostic"],
        "stds": tuple(head["bbox_coder"]["target_stds"]),
        "positive": train["assigner"]["pos_iou_thr"],
        "num": train["sampler"]["num"],
        "fraction": train["sampler"]["pos_fraction"],
    }
    if make is BoxStage:
        options |= {"loss": LOSSES[head["loss_bbox"]["type"]], "beta": head["loss_bbox"].get("beta", 1.0)}
    return make(Levels((head["in_channels"],) * len(strides), strides), head["num_classes"], **options, **more)


class Given(nn.Module):
    """Stand-in for backbone, neck and head: given features and proposals."""

    loss_weights: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, features: list[Tensor], proposals: Proposals) -> None:
        super().__init__()
        self.features, self.proposals = features, proposals
        self.scale, self.shift = torch.ones(3, 1, 1), torch.zeros(3, 1, 1)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, _: Any) -> list[Tensor]:
        return self.features

    def loss(self, *_: Any) -> Losses:
        return {}

    def propose(self, *_: Any, **__: Any) -> Proposals:
        return self.proposals


def compare_stages(
    case: Case,
    parts: list[nn.Module],
    renames: list[tuple[str, Any]],
    steps: list[dict[str, float]],
    names: dict[str, str],
    memory_format: torch.memory_format = torch.channels_last,
) -> tuple[Errors, dict[str, int]]:
    """Compare losses, gradients of the last step, and detections; names: our loss -> MMDetection's."""
    features = [f.requires_grad_() for f in case.levels("in.features")]
    boxes = [case.tensors[f"in.proposals.{i}.bboxes"] for i in range(len(case.sizes))]
    padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    proposals = Proposals(padded, padded.new_zeros(padded.shape[:2]), torch.tensor([len(b) for b in boxes]))
    given = Given(features, proposals)
    test = case.config["test_cfg"]
    options = {"score": test["score_thr"], "iou": test["nms"]["iou_threshold"], "max_det": test["max_per_img"]}
    if test["nms"]["type"] == "soft_nms":
        options["soft"] = SoftNMS(**{k: v for k, v in test["nms"].items() if k not in ("type", "iou_threshold")})
    model = TwoStage(given, given, given, parts, [], options)
    model.stages.load_state_dict(case.state(renames))
    model.stages.to(memory_format=memory_format)
    batch = case.batch()
    errors = {"losses": 0.0}
    for wanted in steps:
        losses = {k: v * model.loss_weights[k] for k, v in model.loss(batch).items()}
        errors["losses"] = max(errors["losses"], wrong_losses(losses, wanted, names))
    errors |= gradients(case, model.stages, features, losses, renames)
    wrong, total = 0, 0
    model.eval()
    for i, detections in enumerate(model.predict(batch)):
        wrong += unmatched(detections, *predicted(case, i))
        total += len(detections)
    return errors | {"unmatched": float(wrong)}, {"detections": total}


def predicted(case: Case, image: int) -> list[Tensor]:
    """Return MMDetection's boxes, scores and labels."""
    return [case.tensors[f"out.pred.{image}.{k}"] for k in ("bboxes", "scores", "labels")]


def wrong_losses(ours: Losses, theirs: dict[str, Any], names: dict[str, str]) -> float:
    """Return the largest relative difference; each of their losses must have a partner."""
    assert {k for k in theirs if "loss" in k} == set(names.values())
    worst = 0.0
    for mine, name in names.items():
        value = sum(theirs[name]) if isinstance(theirs[name], list) else theirs[name]
        difference = abs(float(ours[mine].detach()) - value) / max(abs(value), 1e-12)
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def gradients(
    case: Case, module: nn.Module, features: list[Tensor], losses: Losses, renames: list[tuple[str, Any]]
) -> Errors:
    """Compare the gradients of the summed losses: of the features, and the norms of the parameters'."""
    sum(losses.values()).backward()  # type: ignore[union-attr]
    norms = {renamed(k, renames): v for k, v in case.spec["grad_norms"].items()}
    worst = 0.0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        worst = max(worst, abs(float(parameter.grad.norm()) - norms[name]) / max(norms[name], 1e-12))
    # the last level serves the RPN only
    ours = [f.grad if f.grad is not None else torch.zeros_like(f) for f in features]
    return {"gradients": largest(ours, case.levels("out.grad.features")), "norms": worst}


ROI_ADAPTERS: dict[str, Callable[[Case], tuple[Errors, dict[str, int]]]] = {
    "RPNHead": rpn,
    "StandardRoIHead": standard,
    "CascadeRoIHead": cascade,
    "DynamicRoIHead": dynamic,
    "DoubleHeadRoIHead": double_head,
}
