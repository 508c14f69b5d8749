"""MMDetection's two-stage heads by our parts: RPN, standard, cascade and dynamic box heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Errors, largest, relative, renamed, unmatched
from torch import Tensor, nn

from fusedet.models.detectors.two_stage import TwoStage
from fusedet.models.heads import RPNHead
from fusedet.models.ops.assigners import BACKGROUND, gather_positives
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.roi import BoxStage, DynamicStage
from fusedet.types import Detections, Levels, Losses, Outputs, Proposals

LOSSES = {"L1Loss": "l1", "SmoothL1Loss": "smooth_l1", "BalancedL1Loss": "balanced_l1"}
LAYERS = [(r"shared_fcs\.(\d)", r"shared.\1"), (r"fc_cls\.", "cls."), (r"fc_reg\.", "reg.")]


def rpn(case: Case) -> tuple[Errors, dict[str, int]]:
    """The RPN: maps, losses, gradients and proposals."""
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
    losses["loss_rpn_cls"] = losses["loss_rpn_cls"] + others_as_background(head, outputs, case)
    names = {"loss_rpn_cls": "loss_rpn_cls", "loss_rpn_box": "loss_rpn_bbox"}
    errors = {"raw": max(raw), "losses": wrong_losses(losses, case.spec["losses"], names)}
    errors |= gradients(case, head, features, losses, renames)
    found = head.propose(outputs, case.sizes, pre_nms=test["nms_pre"])
    wrong, total = 0, 0
    for i, n in enumerate(found.counts.tolist()):
        ours = Detections(found.boxes[i, :n], found.scores[i, :n], torch.zeros(n, dtype=torch.int64))
        wrong += unmatched(ours, *predicted(case, i))
        total += n
    return errors | {"unmatched": float(wrong)}, {"proposals": total}


def others_as_background(head: RPNHead, outputs: Outputs, case: Case) -> Tensor:
    """What a case with several classes adds to the classification loss.

    MMDetection's detector sets all labels to 0 before its RPN sees them; alone, as in these cases, that head scores class 0 only and
    takes positives of other classes for background: BCE(x, 0) - BCE(x, 1) = x more for each.
    """
    owners = torch.stack([head.assigner.assign(outputs.priors, t) for t in case.targets()])
    drawn = [(owners >= 0).sum(dim=1), (owners == BACKGROUND).sum(dim=1)]
    found = gather_positives(owners, case.targets())
    logits = flatten_maps(outputs.maps["cls"], 1)[found.image, found.prior, 0]
    return logits[found.labels > 0].sum() / sum(n.clamp(min=1).sum() for n in drawn)


def standard(case: Case) -> tuple[Errors, dict[str, int]]:
    """One stage of boxes."""
    c = case.config["roi_head"]
    stage = box_stage(c, c["bbox_head"], case.config["train_cfg"])
    renames = [(r"^bbox_head\.", "0."), *LAYERS]
    return stages(case, [stage], renames, [case.spec["losses"]], {"loss_cls": "loss_cls", "loss_box": "loss_bbox"})


def cascade(case: Case) -> tuple[Errors, dict[str, int]]:
    """Several stages, each on the boxes of the one before."""
    c = case.config["roi_head"]
    parts = zip(c["bbox_head"], case.config["train_cfg"], c["stage_loss_weights"], strict=True)
    found = [box_stage(c, head, train, weight=weight) for head, train, weight in parts]
    names = {
        f"s{i}_{ours}": f"s{i}.{theirs}"
        for i in range(len(found))
        for ours, theirs in (("loss_cls", "loss_cls"), ("loss_box", "loss_bbox"))
    }
    return stages(case, found, [(r"^bbox_head\.", ""), *LAYERS], [case.spec["losses"]], names)


def dynamic(case: Case) -> tuple[Errors, dict[str, int]]:
    """A stage with a memory: several losses in a row, then what it remembers."""
    c, train = case.config["roi_head"], case.config["train_cfg"]
    d = train["dynamic_rcnn"]
    options = {"interval": d["update_iter_interval"]} | {
        k: d[k] for k in ("iou_topk", "beta_topk", "initial_iou", "initial_beta")
    }
    stage = box_stage(c, c["bbox_head"], train, DynamicStage, **options)
    fresh = {f"0.{k}": v for k, v in stage.state_dict().items() if not k.startswith("box.")}
    case.tensors |= {f"state.{k}": v for k, v in fresh.items()}  # MMDetection does not save its memory
    steps = case.spec["losses"]["step"]
    renames = [(r"^bbox_head\.", "0.box."), *LAYERS]
    errors, sizes = stages(case, [stage], renames, steps, {"loss_cls": "loss_cls", "loss_box": "loss_bbox"})
    for ours, theirs in ((stage.beta, "beta"), (stage.threshold, "iou")):
        errors["losses"] = max(errors["losses"], relative(ours, torch.tensor(case.spec["losses"][theirs])))
    return errors, sizes


def box_stage(
    roi: dict[str, Any], head: dict[str, Any], train: dict[str, Any], make: type[nn.Module] = BoxStage, **more: Any
) -> nn.Module:
    """The stage that MMDetection's config of a box head describes."""
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
    """In a neck's, body's and head's place: features and proposals that are given."""

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


def stages(
    case: Case,
    parts: list[nn.Module],
    renames: list[tuple[str, Any]],
    steps: list[dict[str, float]],
    names: dict[str, str],
) -> tuple[Errors, dict[str, int]]:
    """Losses, gradients of the last step, and detections of stages on given proposals. names: our loss -> MMDetection's."""
    features = [f.requires_grad_() for f in case.levels("in.features")]
    boxes = [case.tensors[f"in.proposals.{i}.bboxes"] for i in range(len(case.sizes))]
    padded = nn.utils.rnn.pad_sequence(boxes, batch_first=True)
    proposals = Proposals(padded, padded.new_zeros(padded.shape[:2]), torch.tensor([len(b) for b in boxes]))
    given = Given(features, proposals)
    test = case.config["test_cfg"]
    options = {"score": test["score_thr"], "iou": test["nms"]["iou_threshold"], "max_det": test["max_per_img"]}
    model = TwoStage(given, given, given, parts, [], options)
    model.stages.load_state_dict(case.state(renames))
    batch = case.batch()
    errors = {"losses": 0.0}
    for wanted in steps:
        losses = {k: v * model.loss_weights[k] for k, v in model.loss(batch).items()}
        errors["losses"] = max(errors["losses"], wrong_losses(losses, wanted, names))
    errors |= gradients(case, model.stages, features, losses, renames)
    wrong, total = 0, 0
    for i, found in enumerate(model.predict(batch)):
        wrong += unmatched(found, *predicted(case, i))
        total += len(found)
    return errors | {"unmatched": float(wrong)}, {"detections": total}


def predicted(case: Case, image: int) -> list[Tensor]:
    """MMDetection's boxes, scores and labels."""
    return [case.tensors[f"out.pred.{image}.{k}"] for k in ("bboxes", "scores", "labels")]


def wrong_losses(ours: Losses, theirs: dict[str, Any], names: dict[str, str]) -> float:
    """The largest relative difference; every loss of theirs must have a partner."""
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
    """Of the summed losses, for the features and for the norms of the parameters' gradients."""
    sum(losses.values()).backward()  # type: ignore[union-attr]
    norms = {renamed(k, renames): v for k, v in case.spec["grad_norms"].items()}
    worst = 0.0
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        worst = max(worst, abs(float(parameter.grad.norm()) - norms[name]) / max(norms[name], 1e-12))
    found = [
        f.grad if f.grad is not None else torch.zeros_like(f) for f in features
    ]  # the last level only serves the RPN
    return {"gradients": largest(found, case.levels("out.grad.features")), "norms": worst}


ROI_ADAPTERS: dict[str, Callable[[Case], tuple[Errors, dict[str, int]]]] = {
    "RPNHead": rpn,
    "StandardRoIHead": standard,
    "CascadeRoIHead": cascade,
    "DynamicRoIHead": dynamic,
}
