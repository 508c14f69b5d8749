"""Rename and match MMDetection's weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedet.config import Model
from fusedet.errors import InputError

Weights = dict[str, Tensor]
Rule = tuple[str, str | Callable[[re.Match[str]], str]]

BACKBONE: list[Rule] = [
    # Offsets of deformable convolutions: 1.0 has them beside the convolution, later versions inside it, and modulated
    # ones had another name for some time.
    (r"^backbone\.(.*\.conv2)(?:_offset|\.conv_offset(?:_mask)?)\.", r"backbone.body.\1.offset."),
    (r"^backbone\.", "backbone.body."),
]
RPN: list[Rule] = [
    (r"^rpn_head\.rpn_conv\.(weight|bias)$", r"head.tower.0.\1"),
    (r"^rpn_head\.rpn_conv\.(\d+)\.conv\.", lambda m: f"head.tower.{2 * int(m[1])}."),
    (r"^rpn_head\.rpn_(cls|reg)\.", r"head.\1."),
]


def build_rules(model: Model, levels: int) -> list[Rule]:
    """Build the renaming rules of a detector.

    Args:
        model: Model section of the config.
        levels: Number of feature levels from the backbone to the first neck.
    """
    return (
        BACKBONE
        + _neck_chain_rules(model.neck, levels)
        + _dense_head_rules(model.head)
        + (_roi_rules(model.roi) if model.roi else [])
    )


def _neck_chain_rules(spec: Any, levels: int) -> list[Rule]:
    specs = spec if isinstance(spec, list) else [spec]
    rules: list[Rule] = []
    for i, item in enumerate(specs):
        kind, options = (item, {}) if isinstance(item, str) else (item.get("type"), item)
        theirs, ours = (rf"^neck\.{i}\.", f"neck.necks.{i}.") if len(specs) > 1 else (r"^neck\.", "neck.")
        rules += [(theirs + pattern, ours + name) for pattern, name in _neck_rules(kind, options, levels)]
    return rules


def _neck_rules(kind: Any, options: Mapping[str, Any], levels: int) -> list[tuple[str, str]]:
    if kind == "bfp":
        non_local = [(r"refine\.conv_out\.conv\.", "refine.out."), (r"refine\.(g|theta|phi)\.conv\.", r"refine.\1.")]
        return [(r"refine\.conv\.", "refine.0.")] if options.get("refine") == "conv" else non_local
    if kind not in ("fpn", "pafpn"):
        raise InputError(f"model.neck '{kind}' does not exist in MMDetection: fpn, pafpn and bfp do")
    inner = "fpn." if kind == "pafpn" else ""
    rules = []
    for theirs, ours in ((r"\.conv\.", ".0." if options.get("norm") else "."), (r"\.gn\.", ".1.")):
        rules += [(rf"fpn_convs\.{levels + i}{theirs}", f"top.convs.{i}{ours}") for i in range(4)]
        rules += [
            (rf"lateral_convs\.(\d+){theirs}", rf"{inner}lateral.\1{ours}"),
            (rf"fpn_convs\.(\d+){theirs}", rf"{inner}output.\1{ours}"),
        ]
    return [*rules, (r"downsample_convs\.(\d+)\.conv\.", r"down.\1."), (r"pafpn_convs\.(\d+)\.conv\.", r"output.\1.")]


def _dense_head_rules(spec: Any) -> list[Rule]:
    kind, options = (spec, {}) if isinstance(spec, str) else (spec.get("type"), spec)
    if kind == "rpn":
        return RPN
    # A tower layer is convolution, normalization if any, ReLU.
    step = 3 if options.get("norm", kind in ("fcos", "vfnet")) else 2
    tower: list[Rule] = [
        (
            r"^bbox_head\.(cls|reg)_convs\.(\d+)\.conv\.conv_offset\.",
            lambda m: f"head.towers.{m[1]}.{step * int(m[2])}.offset.",
        ),
        (
            r"^bbox_head\.(cls|reg)_convs\.(\d+)\.(?:conv\.)?(weight|bias)$",
            lambda m: f"head.towers.{m[1]}.{step * int(m[2])}.{m[3]}",
        ),
        (r"^bbox_head\.(cls|reg)_convs\.(\d+)\.gn\.", lambda m: f"head.towers.{m[1]}.{step * int(m[2]) + 1}."),
    ]
    return tower + OUTPUTS.get(str(kind), [])


OUTPUTS: dict[str, list[Rule]] = {
    "retina": [(r"^bbox_head\.retina_(cls|reg)\.", r"head.\1.")],
    "fcos": [
        (r"^bbox_head\.(?:conv|fcos)_(cls|reg|centerness)\.", r"head.\1."),
        (r"^bbox_head\.(scales)$", r"head.\1"),
    ],
    "vfnet": [
        (r"^bbox_head\.vfnet_reg_conv\.conv\.", "head.reg_conv.0."),
        (r"^bbox_head\.vfnet_reg_conv\.gn\.", "head.reg_conv.1."),
        (r"^bbox_head\.vfnet_reg_refine_dconv\.", "head.refine_star."),
        (r"^bbox_head\.vfnet_cls_dconv\.", "head.cls_star."),
        (r"^bbox_head\.vfnet_reg_refine\.", "head.refine."),
        (r"^bbox_head\.vfnet_(cls|reg)\.", r"head.\1."),
        (r"^bbox_head\.(scales|scales_refine)$", r"head.\1"),
    ],
    "reppoints": [
        (r"^bbox_head\.reppoints_(cls|pts_init|pts_refine)_conv\.", r"head.\1_conv."),
        (r"^bbox_head\.reppoints_(cls|pts_init|pts_refine)_out\.", r"head.\1."),
        (r"^bbox_head\.moment_transfer$", "head.moment_transfer"),
    ],
}


def _roi_rules(spec: Mapping[str, Any]) -> list[Rule]:
    kinds = [stage if isinstance(stage, str) else stage.get("type") for stage in spec.get("stages", [])]
    rules: list[Rule] = []
    for i, kind in enumerate(kinds):
        number, ours = rf"(?:{i}\.)" if len(kinds) > 1 else "", f"stages.{i}." + ("box." if kind == "dynamic" else "")
        rules += [
            (rf"^roi_head\.bbox_head\.{number}shared_fcs\.", f"{ours}shared."),
            (rf"^roi_head\.bbox_head\.{number}shared_convs\.(\d+)\.conv\.", rf"{ours}convs.\1."),
            (rf"^roi_head\.bbox_head\.{number}fc_(cls|reg)\.", rf"{ours}\1."),
        ]
    for k, branch in enumerate(spec.get("branches") or []):
        kind = branch if isinstance(branch, str) else branch.get("type")
        for i in range(len(kinds)):
            number, ours = rf"(?:{i}\.)" if len(kinds) > 1 else "", f"branches.{k}.{i}."
            rules += [
                (rf"^roi_head\.{kind}_head\.{number}{a}", ours + b if isinstance(b, str) else _prefix_result(ours, b))
                for a, b in BRANCHES.get(str(kind), [])
            ]
    return rules


def _prefix_result(prefix: str, name: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
    return lambda m: prefix + name(m)


BRANCHES: dict[str, list[Rule]] = {
    "mask": [(r"convs\.(\d+)\.conv\.", r"convs.\1."), (r"conv_logits\.", "logits."), (r"upsample\.", "upsample.")],
    "grid": [
        (r"convs\.(\d+)\.conv\.", lambda m: f"convs.{3 * int(m[1])}."),
        (r"convs\.(\d+)\.gn\.", lambda m: f"convs.{3 * int(m[1]) + 1}."),
        (r"deconv1\.", "up."),
        (r"norm1\.", "norm."),
        (r"deconv2\.", "heat."),
        (r"(first_order|second_order)\.", r"\1."),
    ],
}


def rename_weight(key: str, table: list[Rule]) -> str:
    """Rename a weight by the first rule that matches; return the name itself without a match."""
    for pattern, name in table:
        new, count = re.subn(pattern, name, key, count=1)
        if count:
            return new
    return key


def join_weights(state: Weights) -> Weights:
    """Join MMDetection's scalars and single convolutions to the tensors of this project.

    - scales.0.scale, scales.1.scale, ... of a head become scales (L,).
    - The convolutions of the edges of Grid R-CNN's grid become grouped convolutions.
    """
    joined = dict(state)
    for name in ("bbox_head.scales", "bbox_head.scales_refine"):
        numbers = sorted(int(m[1]) for key in state if (m := re.fullmatch(rf"{re.escape(name)}\.(\d+)\.scale", key)))
        if numbers and all(state[f"{name}.{i}.scale"].numel() == 1 for i in numbers):
            joined[name] = torch.stack([joined.pop(f"{name}.{i}.scale").reshape(()) for i in numbers])
    edge = re.compile(r"(roi_head\.grid_head\.(?:\d+\.)?)(f|s)order_trans\.(\d+)\.(\d+)\.(0|1)\.(weight|bias)")
    groups: dict[str, list[tuple[int, int, str]]] = {}
    for key in state:
        if m := edge.fullmatch(key):
            layer = "depthwise" if m[5] == "0" else "pointwise"
            name = f"{m[1]}{'first' if m[2] == 'f' else 'second'}_order.{layer}.{m[6]}"
            groups.setdefault(name, []).append((int(m[3]), int(m[4]), key))
    for name, parts in groups.items():
        if len({state[key].shape[1:] for _, _, key in parts}) > 1 or any(state[key].ndim == 0 for _, _, key in parts):
            continue  # left as they are, so that `match_weights` reports them
        joined[name] = torch.cat([joined.pop(key) for _, _, key in sorted(parts)])
    return joined


def flip_stem_channels(state: Weights) -> Weights:
    """Convert weights for BGR images to RGB: reverse the input channels of the first convolution."""
    stem = "backbone.conv1.weight"
    return state | {stem: state[stem].flip(1)} if stem in state and state[stem].ndim == 4 else state


def match_weights(
    renamed: Mapping[str, Tensor],
    sources: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    source: Any,
    unsaved: tuple[str, ...] = (),
) -> Weights:
    """Match weights with a detector's state dict; every key of either side must have a counterpart.

    Args:
        renamed: Weights by the names of this project.
        sources: The names in the file, by the names of this project.
        wanted: State dict of the detector.
        source: Name of the file in messages.
        unsaved: Prefixes of buffers that the other project does not save; these keep the detector's values, as do batch
            counters, which old checkpoints lack.

    Raises:
        InputError: Weights are missing, left over or of another shape; the message lists them.
    """
    result = {}
    for key, own in wanted.items():
        if key in renamed:
            result[key] = renamed[key].to(own.dtype)
        elif key.endswith("num_batches_tracked") or key.startswith(unsaved or "\0"):
            result[key] = own
    left_over = [sources.get(key, key) for key in renamed if key not in wanted]
    missing = [key for key in wanted if key not in result]
    shapes = [
        f"{sources.get(k, k)} {tuple(v.shape)}, here {tuple(wanted[k].shape)}"
        for k, v in result.items()
        if v.shape != wanted[k].shape
    ]
    problems = [
        _list_items("in the file without a counterpart", left_over),
        _list_items("of the detector without weights in the file", missing),
        _list_items("of another shape", shapes),
    ]
    if any(problems):
        raise InputError(f"{source} does not match: " + "; ".join(p for p in problems if p))
    return result


def _list_items(what: str, items: list[str], limit: int = 10) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {what}: {', '.join(items[:limit])}{more}" if items else ""
