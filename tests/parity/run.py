"""Compare with reference numbers of MMDetection: `python tests/parity/run.py FOLDER` prints a line per case and fails on disagreement.

FOLDER holds CASE.json (MMDetection's config, image shapes, losses, gradient norms) and CASE.safetensors (weights, inputs, outputs).
Agreement: features and raw outputs within 1e-4 of the tensor's largest magnitude, each loss within 1e-4 relative, gradients within 1e-3 of
their largest magnitude, predictions the same set (label, coordinates within 0.01 pixel, score within 1e-4).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fusedet.heads import RetinaHead
from fusedet.necks import FPN
from fusedet.ops.boxes import select
from fusedet.types import Detections, Levels, Target

Errors = dict[str, float]
LIMITS = {"features": 1e-4, "raw": 1e-4, "losses": 1e-4, "gradients": 1e-3, "norms": 1e-3, "unmatched": 0.0}


class Case:
    """One case's numbers."""

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.sizes = torch.tensor(self.spec["image_shapes"])
        self.config = self.spec["config"]

    def state(self, renames: list[tuple[str, str]]) -> dict[str, Tensor]:
        """MMDetection's weights by our names."""
        found = {}
        for key, tensor in self.tensors.items():
            if key.startswith("state."):
                name = key.removeprefix("state.")
                for old, new in renames:
                    name = re.sub(old, new, name)
                found[name] = tensor
        return found

    def levels(self, prefix: str) -> list[Tensor]:
        """The tensors PREFIX.0, PREFIX.1, ..."""
        found = []
        while (key := f"{prefix}.{len(found)}") in self.tensors:
            found.append(self.tensors[key])
        return found

    def targets(self) -> list[Target]:
        """One target per picture."""
        shapes = range(len(self.sizes))
        return [Target(self.tensors[f"in.gt.{i}.boxes"], self.tensors[f"in.gt.{i}.labels"]) for i in shapes]


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference over the largest magnitude."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf")
    ours = ours.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest `relative` over levels; both sides must have as many."""
    return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


def unmatched(ours: Detections, boxes: Tensor, scores: Tensor, labels: Tensor) -> int:
    """How many detections of either side have no partner of the other."""
    close = (ours.boxes[:, None] - boxes[None]).abs().amax(dim=2) <= 0.01
    close &= (ours.scores[:, None] - scores[None]).abs() <= 1e-4
    close &= ours.labels[:, None] == labels[None]
    pairs = 0
    for row in close:  # each detection has one partner at most
        free = row.nonzero()
        if len(free):
            close[:, free[0]] = False
            pairs += 1
    return len(ours) + len(boxes) - 2 * pairs


def fpn(case: Case) -> tuple[Errors, dict[str, int]]:
    """FPN with its three tops."""
    c = case.config["neck"]
    inputs = case.levels("in.features")
    strides = tuple(4 * 2**i for i in range(len(inputs)))
    finest = 2 + c.get("start_level", 0)
    top = c.get("add_extra_convs", "max_pool")
    neck = FPN(Levels(tuple(c["in_channels"]), strides), c["out_channels"], finest, finest + c["num_outs"] - 1, top)
    used = len(neck.lateral)
    extra = [(rf"fpn_convs\.{used + i}\.conv", f"top.convs.{i}") for i in range(len(neck.top.convs))]
    renames = [*extra, (r"lateral_convs\.(\d+)\.conv", r"lateral.\1"), (r"fpn_convs\.(\d+)\.conv", r"output.\1")]
    neck.load_state_dict(case.state(renames))
    with torch.no_grad():
        outputs = neck(inputs)
    reference = case.levels("out.features")
    return {"features": largest(outputs, reference)}, {"levels": len(reference)}


def dense(
    case: Case, head: nn.Module, renames: list[tuple[str, str]], maps: list[str], losses: dict[str, str]
) -> tuple[Errors, dict[str, int]]:
    """Raw outputs, losses, gradients and predictions of a dense head.

    maps: ours, in the order of MMDetection's raw outputs. losses: our loss -> MMDetection's.
    """
    head.load_state_dict(case.state(renames))
    features = [f.requires_grad_() for f in case.levels("in.features")]
    outputs = head(features)
    errors = {"raw": 0.0, "losses": 0.0, "gradients": 0.0, "norms": 0.0}
    for i, name in enumerate(maps):
        errors["raw"] = max(errors["raw"], largest(outputs.maps[name], case.levels(f"out.head.{i}")))
    found = head.loss(outputs, case.targets())
    for ours, theirs in losses.items():
        value = case.spec["losses"][theirs]
        value = sum(value) if isinstance(value, list) else value
        difference = abs(float(found[ours].detach()) - value) / max(abs(value), 1e-12)
        errors["losses"] = max(errors["losses"], difference if math.isfinite(difference) else math.inf)
    sum(found.values()).backward()
    gradients = [f.grad for f in features]
    errors["gradients"] = largest(gradients, case.levels("out.grad.features"))
    norms = case.spec["grad_norms"]
    for name, parameter in head.named_parameters():
        theirs = next(k for k in norms if _renamed(k, renames) == name)
        errors["norms"] = max(errors["norms"], abs(float(parameter.grad.norm()) - norms[theirs]) / max(norms[theirs], 1e-12))
    test = case.config["test_cfg"]
    head.eval()
    with torch.no_grad():
        outputs = head(features)
        for i, name in enumerate(maps):
            errors["raw"] = max(errors["raw"], largest(outputs.maps[name], case.levels(f"out.head_eval.{i}")))
        boxes, scores = head.decode(outputs)
        nms = test["nms"]["iou_threshold"]
        options = {"score": test["score_thr"], "iou": nms, "pre_nms": test["nms_pre"], "max_det": test["max_per_img"]}
        chosen = select(boxes, scores, case.sizes, outputs.priors.counts, **options)
    wrong, total = 0, 0
    for i, n in enumerate(chosen.counts.tolist()):
        reference = [case.tensors[f"out.pred.{i}.{k}"] for k in ("bboxes", "scores", "labels")]
        wrong += unmatched(Detections(chosen.boxes[i, :n], chosen.scores[i, :n], chosen.labels[i, :n]), *reference)
        total += len(reference[0])
    return errors | {"unmatched": float(wrong)}, {"detections": total}


def _renamed(name: str, renames: list[tuple[str, str]]) -> str:
    for old, new in renames:
        name = re.sub(old, new, name)
    return name


def retina(case: Case) -> tuple[Errors, dict[str, int]]:
    """RetinaNet's head."""
    c, train = case.config["head"], case.config["train_cfg"]["assigner"]
    anchors = c["anchor_generator"]
    levels = Levels((c["in_channels"],) * len(anchors["strides"]), tuple(anchors["strides"]))
    head = RetinaHead(
        levels,
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        base_scale=anchors["octave_base_scale"],
        scales_per_octave=anchors["scales_per_octave"],
        ratios=anchors["ratios"],
        positive=train["pos_iou_thr"],
        negative=train["neg_iou_thr"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
    )
    renames = [
        (r"^(cls|reg)_convs\.(\d+)\.conv", lambda m: f"towers.{m[1]}.{2 * int(m[2])}"),
        (r"^retina_(cls|reg)\.", r"\1."),
    ]
    return dense(case, head, renames, ["cls", "reg"], {"loss_cls": "loss_cls", "loss_box": "loss_bbox"})


def agrees(errors: Errors) -> bool:
    """Whether every error is within its limit."""
    return all(value <= LIMITS[kind] for kind, value in errors.items())


ADAPTERS: dict[str, Callable[[Case], tuple[Errors, dict[str, int]]]] = {"FPN": fpn, "RetinaHead": retina}


def run(folder: Path) -> dict[str, str]:
    """Compare every case of a folder; gives "ok", "FAIL" or "absent" by case, and prints a line for each."""
    cases = sorted(folder.glob("*.json"))
    verdicts = {}
    for path in cases:
        case = Case(path)
        kind = next(iter(case.config.get(k, {}).get("type") for k in ("neck", "head", "roi_head") if k in case.config), None)
        if kind not in ADAPTERS:
            verdicts[path.stem] = "absent"
            print(f"{path.stem:20} absent  ({kind} is not in this version)")
            continue
        errors, sizes = ADAPTERS[kind](case)
        verdicts[path.stem] = "ok" if agrees(errors) else "FAIL"
        numbers = [f"{k} {v:.1e}" for k, v in errors.items()] + [f"{v} {k}" for k, v in sizes.items()]
        print(f"{path.stem:20} {verdicts[path.stem]:7} {', '.join(numbers)}")
    return verdicts


if __name__ == "__main__":
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: run.py FOLDER (with CASE.json and CASE.safetensors)")
    found = run(Path(sys.argv[1]))
    if not found:
        sys.exit(f"no cases in {sys.argv[1]}")
    sys.exit(1 if "FAIL" in found.values() else 0)
