"""Compare with reference numbers of MMDetection: `python tests/parity/run.py FOLDER`.

It prints a line per case and fails on disagreement. FOLDER holds CASE.json (MMDetection's config, image shapes, losses,
gradient norms) and CASE.safetensors (weights, inputs, outputs). Cases agree with

- features and raw outputs within 1e-4 of the tensor's largest magnitude,
- each loss within 1e-4 relative,
- gradients within 1e-3 of their largest magnitude,
- the same set of predictions: label, coordinates within 0.01 pixel, score within 1e-4.

The layers of dense heads compute in float64, everything else in float32, as MMDetection's numbers.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))  # the other adapters, however this file is run
from anchor_free import DENSE, OTHERS
from atss_family import ATSS_FAMILY
from branches import BRANCH_ADAPTERS
from cases import LIMITS, Case, Errors, largest, renamed, unmatched
from roi import ROI_ADAPTERS
from trident import trident_stage

from fusedet.models.heads import FCOSHead, RepPointsHead, RetinaHead, VFNetHead
from fusedet.models.necks import BFP, FPN, PAFPN
from fusedet.models.ops.boxes import select_detections
from fusedet.models.ops.point_assigner import PointAssigner
from fusedet.types import Detections, Levels, Outputs


def fpn(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare FPN with its three kinds of top levels."""
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


def to_float32(outputs: Outputs) -> Outputs:
    """Convert a head's outputs to float32, in which assignment has MMDetection's ties.

    The layers before it compute in float64: a pre-activation of 1e-8 is rounded to either side of 0 by a float32
    convolution, depending on the processor, and a ReLU's gradient with it. `tood_head_initial` then differs by 1e-3.
    """
    priors = replace(outputs.priors, boxes=outputs.priors.boxes.float(), strides=outputs.priors.strides.float())
    return Outputs({name: [x.float() for x in levels] for name, levels in outputs.maps.items()}, priors)


def compare_dense(
    case: Case,
    head: nn.Module,
    renames: list[tuple[str, str]],
    losses: dict[str, str],
    maps: Callable[[dict[str, list[Tensor]]], list[list[Tensor]]],
    maps_eval: Callable[[dict[str, list[Tensor]]], list[list[Tensor]]] | None = None,
) -> tuple[Errors, dict[str, int]]:
    """Compare raw outputs, losses, gradients and predictions of a dense head.

    Args:
        case: The case.
        head: Our head.
        renames: Patterns from MMDetection's weight names to ours.
        losses: Our loss -> MMDetection's.
        maps: Converts our maps to MMDetection's raw outputs, in its order, in train mode.
        maps_eval: The same in eval mode.
    """
    head.load_state_dict(case.state(renames))
    head.double()
    for name, buffer in list(head.named_buffers(recurse=False)):  # anchors and the like
        setattr(head, name, buffer.float())
    features = [f.double().requires_grad_() for f in case.levels("in.features")]
    outputs = to_float32(head(features))
    errors = {"raw": 0.0, "losses": 0.0, "gradients": 0.0, "norms": 0.0}
    for i, ours in enumerate(maps(outputs.maps)):
        errors["raw"] = max(errors["raw"], largest(ours, case.levels(f"out.head.{i}")))
    terms = {k: v * head.loss_weights.get(k, 1.0) for k, v in head.loss(outputs, case.targets()).items()}
    for ours, theirs in losses.items():
        value = case.spec["losses"][theirs]
        value = sum(value) if isinstance(value, list) else value
        difference = abs(float(terms[ours].detach()) - value) / max(abs(value), 1e-12)
        errors["losses"] = max(errors["losses"], difference if math.isfinite(difference) else math.inf)
    sum(terms.values()).backward()
    gradients = [f.grad for f in features]
    errors["gradients"] = largest(gradients, case.levels("out.grad.features"))
    norms = case.spec["grad_norms"]
    for name, parameter in head.named_parameters():
        theirs = next(k for k in norms if renamed(k, renames) == name)
        errors["norms"] = max(
            errors["norms"], abs(float(parameter.grad.norm()) - norms[theirs]) / max(norms[theirs], 1e-12)
        )
    test = case.config["test_cfg"]
    head.eval()
    with torch.no_grad():
        outputs = to_float32(head(features))
        for i, ours in enumerate((maps_eval or maps)(outputs.maps)):
            errors["raw"] = max(errors["raw"], largest(ours, case.levels(f"out.head_eval.{i}")))
        nms = test["nms"]["iou_threshold"]
        options = {"score": test["score_thr"], "iou": nms, "pre_nms": test["nms_pre"], "max_det": test["max_per_img"]}
        select = getattr(head, "select", select_detections)
        chosen = select(head.decode(outputs), case.sizes, outputs.priors.counts, **options)
    wrong, total = 0, 0
    for i, n in enumerate(chosen.counts.tolist()):
        reference = [case.tensors[f"out.pred.{i}.{k}"] for k in ("bboxes", "scores", "labels")]
        wrong += unmatched(Detections(chosen.boxes[i, :n], chosen.scores[i, :n], chosen.labels[i, :n]), *reference)
        total += len(reference[0])
    return errors | {"unmatched": float(wrong)}, {"detections": total}


def retina(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare RetinaNet's head."""
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
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox"}
    return compare_dense(case, head, renames, losses, lambda m: [m["cls"], m["reg"]])


def pafpn(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare PAFPN in MMDetection's variant."""
    c = case.config["neck"]
    levels = Levels(tuple(c["in_channels"]), tuple(4 * 2**i for i in range(len(c["in_channels"]))))
    finest = 2 + c.get("start_level", 0)
    neck = PAFPN(levels, c["out_channels"], finest, finest + c["num_outs"] - 1, c.get("add_extra_convs", "max_pool"))
    used = len(neck.fpn.lateral)
    extra = [(rf"^fpn_convs\.{used + i}\.conv", f"top.convs.{i}") for i in range(len(neck.top.convs))]
    renames = [
        *extra,
        (r"^lateral_convs\.(\d+)\.conv", r"fpn.lateral.\1"),
        (r"^fpn_convs\.(\d+)\.conv", r"fpn.output.\1"),
        (r"^downsample_convs\.(\d+)\.conv", r"down.\1"),
        (r"^pafpn_convs\.(\d+)\.conv", r"output.\1"),
    ]
    return compare_neck(case, neck, renames)


def bfp(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare Libra R-CNN's balanced feature pyramid."""
    c = case.config["neck"]
    levels = Levels((c["in_channels"],) * c["num_levels"], tuple(4 * 2**i for i in range(c["num_levels"])))
    neck = BFP(levels, c["refine_level"], c["refine_type"] or "none")
    return compare_neck(
        case, neck, [(r"^refine\.conv_out\.conv", "refine.out"), (r"^refine\.(g|theta|phi)\.conv", r"refine.\1")]
    )


def compare_neck(case: Case, neck: nn.Module, renames: list[tuple[str, str]]) -> tuple[Errors, dict[str, int]]:
    """Compare the outputs of a neck."""
    neck.load_state_dict(case.state(renames))
    with torch.no_grad():
        outputs = neck(case.levels("in.features"))
    reference = case.levels("out.features")
    return {"features": largest(outputs, reference)}, {"levels": len(reference)}


def vfnet(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare VFNet's head."""
    c, train = case.config["head"], case.config["train_cfg"]["assigner"]
    stack_scales(case, "scales")
    stack_scales(case, "scales_refine")
    head = VFNetHead(
        Levels((c["in_channels"],) * len(c["strides"]), tuple(c["strides"])),
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        deformable_last=c["dcn_on_last_conv"],
        topk=train["topk"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
        box_weight=c["loss_bbox"]["loss_weight"],
        refine_weight=c["loss_bbox_refine"]["loss_weight"],
    )
    renames = [
        (r"^(cls|reg)_convs\.(\d+)\.conv", lambda m: f"towers.{m[1]}.{3 * int(m[2])}"),
        (r"^(cls|reg)_convs\.(\d+)\.gn", lambda m: f"towers.{m[1]}.{3 * int(m[2]) + 1}"),
        (r"^vfnet_reg_conv\.conv", "reg_conv.0"),
        (r"^vfnet_reg_conv\.gn", "reg_conv.1"),
        (r"^vfnet_(reg_refine|cls)_dconv\.", lambda m: m[1].removeprefix("reg_") + "_star."),
        (r"^vfnet_reg_refine\.", "refine."),
        (r"^vfnet_(cls|reg)\.", r"\1."),
    ]
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_refine": "loss_bbox_rf"}
    return compare_dense(
        case, head, renames, losses, lambda m: [m["cls"], m["reg"], m["refine"]], lambda m: [m["cls"], m["refine"]]
    )


def fcos(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare FCOS's head, plain and with the improvements of 2020."""
    c = case.config["head"]
    levels = Levels((c["in_channels"],) * len(c["strides"]), tuple(c["strides"]))
    stack_scales(case, "scales")
    normalized = c.get("norm_on_bbox", False)
    head = FCOSHead(
        levels,
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        bias=c.get("conv_bias", False),  # MMDetection's default before a norm layer
        center_sampling=c.get("center_sampling", False),
        normalize_boxes=normalized,
        centerness_on_box=c.get("centerness_on_reg", False),
        box_loss={"IoULoss": "iou", "GIoULoss": "giou"}[c["loss_bbox"]["type"]],
        ranges=tuple(high for _, high in c["regress_ranges"][:-1]),
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
    )
    renames = [
        (r"^(cls|reg)_convs\.(\d+)\.conv", lambda m: f"towers.{m[1]}.{3 * int(m[2])}"),
        (r"^(cls|reg)_convs\.(\d+)\.gn", lambda m: f"towers.{m[1]}.{3 * int(m[2]) + 1}"),
        (r"^conv_(cls|reg|centerness)\.", r"\1."),
    ]
    losses = {"loss_cls": "loss_cls", "loss_box": "loss_bbox", "loss_centerness": "loss_centerness"}
    units = c["strides"] if normalized else [1] * len(levels)  # MMDetection's eval mode gives pixels

    def trained(m: dict[str, list[Tensor]]) -> list[list[Tensor]]:
        return [m["cls"], m["reg"], m["centerness"]]

    def evaluated(m: dict[str, list[Tensor]]) -> list[list[Tensor]]:
        return [m["cls"], [r * unit for r, unit in zip(m["reg"], units)], m["centerness"]]

    return compare_dense(case, head, renames, losses, trained, evaluated)


def stack_scales(case: Case, name: str) -> None:
    """Stack MMDetection's scalars NAME.0.scale, NAME.1.scale, ... to our vector NAME, and their gradients' norms."""
    indices = range(sum(bool(re.match(rf"state\.{name}\.\d+\.scale$", key)) for key in case.tensors))
    case.tensors[f"state.{name}"] = torch.stack([case.tensors.pop(f"state.{name}.{i}.scale") for i in indices])
    norms = case.spec["grad_norms"]
    norms[name] = math.hypot(*(norms.pop(f"{name}.{i}.scale") for i in indices))


def reppoints(case: Case) -> tuple[Errors, dict[str, int]]:
    """Compare RepPoints' head."""
    c, train = case.config["head"], case.config["train_cfg"]
    head = RepPointsHead(
        Levels((c["in_channels"],) * len(c["point_strides"]), tuple(c["point_strides"])),
        c["num_classes"],
        convs=c["stacked_convs"],
        channels=c["feat_channels"],
        point_channels=c["point_feat_channels"],
        norm=bool(c.get("norm_cfg")),
        num_points=c["num_points"],
        transform_method=c["transform_method"],
        gradient_mul=c["gradient_mul"],
        moment_mul=c.get("moment_mul", 0.01),
        base_scale=c["point_base_scale"],
        positive=train["refine"]["assigner"]["pos_iou_thr"],
        negative=train["refine"]["assigner"]["neg_iou_thr"],
        beta=c["loss_bbox_init"]["beta"],
        init_weight=c["loss_bbox_init"]["loss_weight"],
        refine_weight=c["loss_bbox_refine"]["loss_weight"],
        alpha=c["loss_cls"]["alpha"],
        gamma=c["loss_cls"]["gamma"],
    )
    first = train["init"]["assigner"]
    head.init_assigner = PointAssigner(first["scale"], first["pos_num"])
    step = 3 if c.get("norm_cfg") else 2
    renames = [
        (r"^(cls|reg)_convs\.(\d+)\.conv", lambda m: f"towers.{m[1]}.{step * int(m[2])}"),
        (r"^(cls|reg)_convs\.(\d+)\.gn", lambda m: f"towers.{m[1]}.{step * int(m[2]) + 1}"),
        (r"^reppoints_(cls|pts_init|pts_refine)_conv\.", r"\1_conv."),
        (r"^reppoints_(cls|pts_init|pts_refine)_out\.", r"\1."),
    ]
    losses = {"loss_cls": "loss_cls", "loss_init": "loss_pts_init", "loss_refine": "loss_pts_refine"}

    def boxes(m: dict[str, list[Tensor]]) -> list[Tensor]:
        return [head.pseudo_boxes(points.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for points in m["pts_refine"]]

    return compare_dense(
        case,
        head,
        renames,
        losses,
        lambda m: [m["cls"], m["pts_init"], m["pts_refine"]],
        lambda m: [m["cls"], boxes(m)],
    )


def atss_family(
    compare: Callable[..., tuple[Errors, dict[str, int]]],
) -> Callable[[Case], tuple[Errors, dict[str, int]]]:
    """Give an adapter of the ATSS family what it compares with."""

    def adapter(case: Case) -> tuple[Errors, dict[str, int]]:
        stack_scales(case, "scales")
        return compare(case, compare_dense)

    return adapter


def agrees(errors: Errors) -> bool:
    """Check that every error is within its limit."""
    return all(value <= LIMITS[kind] for kind, value in errors.items())


ADAPTERS: dict[str, Callable[[Case], tuple[Errors, dict[str, int]]]] = {
    "FPN": fpn,
    "PAFPN": pafpn,
    "BFP": bfp,
    "RetinaHead": retina,
    "FCOSHead": fcos,
    "VFNetHead": vfnet,
    "RepPointsHead": reppoints,
    **{kind: atss_family(compare) for kind, compare in ATSS_FAMILY.items()},
    **{kind: partial(adapter, compare=compare_dense) for kind, adapter in DENSE.items()},
    **OTHERS,
    **ROI_ADAPTERS,
    **BRANCH_ADAPTERS,
    "TridentResLayer": trident_stage,
}


def run(folder: Path) -> dict[str, str]:
    """Compare every case of a folder: print a line for each, return "ok", "FAIL" or "absent" by case."""
    cases = sorted(folder.glob("*.json"))
    verdicts = {}
    for path in cases:
        case = Case(path)
        kind = next(
            iter(
                case.config.get(k, {}).get("type")
                for k in ("neck", "head", "roi_head", "op", "layer")
                if k in case.config
            ),
            None,
        )
        if "mask_head" in case.config.get("roi_head", {}):
            kind = f"{kind} with masks"
        if kind == "StandardRoIHead" and case.config["roi_head"]["bbox_head"]["type"] == "SABLHead":
            kind = "SABLHead"
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
    verdicts = run(Path(sys.argv[1]))
    if not verdicts:
        sys.exit(f"no cases in {sys.argv[1]}")
    sys.exit(1 if "FAIL" in verdicts.values() else 0)
