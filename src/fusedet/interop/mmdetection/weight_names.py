"""MMDetection's names of weights, and the names that the same weights have here."""

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

BODY: list[Rule] = [
    # the offsets of deformable convolutions: 1.0 beside the convolution, later inside it, modulated ones once under a name of their own
    (r"^backbone\.(.*\.conv2)(?:_offset|\.conv_offset(?:_mask)?)\.", r"backbone.body.\1.offset."),
    (r"^backbone\.", "backbone.body."),
]
RPN: list[Rule] = [
    (r"^rpn_head\.rpn_conv\.(weight|bias)$", r"head.tower.0.\1"),
    (r"^rpn_head\.rpn_conv\.(\d+)\.conv\.", lambda m: f"head.tower.{2 * int(m[1])}."),
    (r"^rpn_head\.rpn_(cls|reg)\.", r"head.\1."),
]


def build_rules(model: Model, levels: int) -> list[Rule]:
    """The renaming for a detector of this config, whose body gives so many levels to its first neck."""
    return BODY + _necks(model.neck, levels) + _head(model.head) + (_roi(model.roi) if model.roi else [])


def _necks(spec: Any, levels: int) -> list[Rule]:
    specs = spec if isinstance(spec, list) else [spec]
    found: list[Rule] = []
    for i, one in enumerate(specs):
        kind, options = (one, {}) if isinstance(one, str) else (one.get("type"), one)
        theirs, ours = (rf"^neck\.{i}\.", f"neck.necks.{i}.") if len(specs) > 1 else (r"^neck\.", "neck.")
        found += [(theirs + pattern, ours + name) for pattern, name in _neck(kind, options, levels)]
    return found


def _neck(kind: Any, options: Mapping[str, Any], levels: int) -> list[tuple[str, str]]:
    if kind == "bfp":
        non_local = [(r"refine\.conv_out\.conv\.", "refine.out."), (r"refine\.(g|theta|phi)\.conv\.", r"refine.\1.")]
        return [(r"refine\.conv\.", "refine.0.")] if options.get("refine") == "conv" else non_local
    if kind not in ("fpn", "pafpn"):
        raise InputError(f"model.neck '{kind}' has no counterpart in MMDetection: fpn, pafpn and bfp have")
    inner = "fpn." if kind == "pafpn" else ""
    found = []
    for theirs, ours in ((r"\.conv\.", ".0." if options.get("norm") else "."), (r"\.gn\.", ".1.")):
        found += [(rf"fpn_convs\.{levels + i}{theirs}", f"top.convs.{i}{ours}") for i in range(4)]
        found += [
            (rf"lateral_convs\.(\d+){theirs}", rf"{inner}lateral.\1{ours}"),
            (rf"fpn_convs\.(\d+){theirs}", rf"{inner}output.\1{ours}"),
        ]
    return [*found, (r"downsample_convs\.(\d+)\.conv\.", r"down.\1."), (r"pafpn_convs\.(\d+)\.conv\.", r"output.\1.")]


def _head(spec: Any) -> list[Rule]:
    kind, options = (spec, {}) if isinstance(spec, str) else (spec.get("type"), spec)
    if kind == "rpn":
        return RPN
    # convolution, norm if any, ReLU
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


def _roi(spec: Mapping[str, Any]) -> list[Rule]:
    kinds = [one if isinstance(one, str) else one.get("type") for one in spec.get("stages", [])]
    found: list[Rule] = []
    for i, kind in enumerate(kinds):
        number, ours = rf"(?:{i}\.)" if len(kinds) > 1 else "", f"stages.{i}." + ("box." if kind == "dynamic" else "")
        found += [
            (rf"^roi_head\.bbox_head\.{number}shared_fcs\.", f"{ours}shared."),
            (rf"^roi_head\.bbox_head\.{number}shared_convs\.(\d+)\.conv\.", rf"{ours}convs.\1."),
            (rf"^roi_head\.bbox_head\.{number}fc_(cls|reg)\.", rf"{ours}\1."),
        ]
    for k, one in enumerate(spec.get("branches") or []):
        kind = one if isinstance(one, str) else one.get("type")
        for i in range(len(kinds)):
            number, ours = rf"(?:{i}\.)" if len(kinds) > 1 else "", f"branches.{k}.{i}."
            found += [
                (rf"^roi_head\.{kind}_head\.{number}{a}", ours + b if isinstance(b, str) else _behind(ours, b))
                for a, b in BRANCHES.get(str(kind), [])
            ]
    return found


def _behind(prefix: str, name: Callable[[re.Match[str]], str]) -> Callable[[re.Match[str]], str]:
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
    """A name by the first rule that fits it; the name itself where none does."""
    for pattern, name in table:
        new, count = re.subn(pattern, name, key, count=1)
        if count:
            return new
    return key


def join_weights(state: Weights) -> Weights:
    """MMDetection's scalars and single convolutions as the joint tensors that they are here.

    A head's scales.0.scale, scales.1.scale, ... become scales (L,); the convolutions of each edge of Grid R-CNN's grid become grouped ones.
    """
    found = dict(state)
    for name in ("bbox_head.scales", "bbox_head.scales_refine"):
        numbers = sorted(int(m[1]) for key in state if (m := re.fullmatch(rf"{re.escape(name)}\.(\d+)\.scale", key)))
        if numbers and all(state[f"{name}.{i}.scale"].numel() == 1 for i in numbers):
            found[name] = torch.stack([found.pop(f"{name}.{i}.scale").reshape(()) for i in numbers])
    edge = re.compile(r"(roi_head\.grid_head\.(?:\d+\.)?)(f|s)order_trans\.(\d+)\.(\d+)\.(0|1)\.(weight|bias)")
    groups: dict[str, list[tuple[int, int, str]]] = {}
    for key in state:
        if m := edge.fullmatch(key):
            layer = "depthwise" if m[5] == "0" else "pointwise"
            name = f"{m[1]}{'first' if m[2] == 'f' else 'second'}_order.{layer}.{m[6]}"
            groups.setdefault(name, []).append((int(m[3]), int(m[4]), key))
    for name, parts in groups.items():
        if len({state[key].shape[1:] for _, _, key in parts}) > 1 or any(state[key].ndim == 0 for _, _, key in parts):
            continue  # left as they are, and told of as without a place
        found[name] = torch.cat([found.pop(key) for _, _, key in sorted(parts)])
    return found


def flip_stem_channels(state: Weights) -> Weights:
    """Weights that take BGR, taking RGB: the input channels of the first convolution turned round."""
    stem = "backbone.conv1.weight"
    return state | {stem: state[stem].flip(1)} if stem in state and state[stem].ndim == 4 else state


def match_weights(
    found: Mapping[str, Tensor],
    sources: Mapping[str, str],
    wanted: Mapping[str, Tensor],
    source: Any,
    fresh: tuple[str, ...] = (),
) -> Weights:
    """The weights for a detector whose state dict is `wanted`, every key of either side with its partner.

    sources: by the names here, those in the file. fresh: what begins the names of buffers that the other project does not save, which
    keep the detector's values; so do counters of batches that old checkpoints lack. Raises InputError that lists what has no partner.
    """
    result = {}
    for key, own in wanted.items():
        if key in found:
            result[key] = found[key].to(own.dtype)
        elif key.endswith("num_batches_tracked") or key.startswith(fresh or "\0"):
            result[key] = own
    lost = [sources.get(key, key) for key in found if key not in wanted]
    lacking = [key for key in wanted if key not in result]
    shapes = [
        f"{sources.get(k, k)} {tuple(v.shape)}, here {tuple(wanted[k].shape)}"
        for k, v in result.items()
        if v.shape != wanted[k].shape
    ]
    problems = [
        _listed("in the file without a place here", lost),
        _listed("of the detector without weights in the file", lacking),
        _listed("of another shape", shapes),
    ]
    if any(problems):
        raise InputError(f"{source} does not match: " + "; ".join(p for p in problems if p))
    return result


def _listed(what: str, items: list[str], limit: int = 10) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{len(items)} {what}: {', '.join(items[:limit])}{more}" if items else ""
