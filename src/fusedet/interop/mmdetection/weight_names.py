"""Rename and match MMDetection's weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fusedet.config import Model
from fusedet.errors import InputError, shorten_list
from fusedet.interop.mmdetection.backbone_weights import STEMS, backbone_rules
from fusedet.interop.mmdetection.weight_tables import NECK_RULES, OUTPUTS, Rule

Weights = dict[str, Tensor]

RPN: list[Rule] = [
    (r"^(?:rpn|bbox)_head\.rpn_conv\.(weight|bias)$", r"head.tower.0.\1"),
    (r"^(?:rpn|bbox)_head\.rpn_conv\.(\d+)\.conv\.", lambda m: f"head.tower.{2 * int(m[1])}."),
    (r"^(?:rpn|bbox)_head\.rpn_(cls|reg)\.", r"head.\1."),
]


def as_mapping(spec: Any) -> Mapping[str, Any]:
    """Return a part's spec, a name or a mapping with the key `type`, as a mapping."""
    return {"type": spec} if isinstance(spec, str) else spec


def build_rules(model: Model, levels: int) -> list[Rule]:
    """Build the renaming rules of a detector.

    Args:
        model: Model section of the config.
        levels: Number of feature levels from the backbone to the first neck.
    """
    rules = backbone_rules(model.backbone) + dense_head_rules(as_mapping(model.head))
    rules += _roi_rules(model.roi) if model.roi else []
    necks = model.neck if isinstance(model.neck, list) else [model.neck]
    for i, neck in enumerate(map(as_mapping, necks)):
        theirs, ours = (rf"^neck\.{i}\.", f"neck.necks.{i}.") if len(necks) > 1 else (r"^neck\.", "neck.")
        rules += _prefix_rules(theirs, ours, _neck_rules(neck["type"], neck, levels))
    return rules


def _neck_rules(kind: Any, options: Mapping[str, Any], levels: int) -> list[Rule]:
    if kind in NECK_RULES:
        return NECK_RULES[kind]
    if kind == "identity":  # no neck at all
        return []
    if kind == "bfp":
        if options.get("refine") == "conv":
            return [(r"refine\.conv\.", "refine.0.")]
        return [(r"refine\.conv_out\.conv\.", "refine.out."), (r"refine\.(g|theta|phi)\.conv\.", r"refine.\1.")]
    if kind not in ("fpn", "pafpn"):
        raise InputError(
            f"model.neck '{kind}' does not exist in MMDetection: fpn, pafpn, bfp, {', '.join(NECK_RULES)} do"
        )
    inner = "fpn." if kind == "pafpn" else ""
    rules: list[Rule] = []
    for theirs, ours in ((r"\.conv\.", ".0." if options.get("norm") else "."), (r"\.gn\.", ".1.")):
        rules += [(rf"fpn_convs\.{levels + i}{theirs}", f"top.convs.{i}{ours}") for i in range(4)]
        rules += [
            (rf"lateral_convs\.(\d+){theirs}", rf"{inner}lateral.\1{ours}"),
            (rf"fpn_convs\.(\d+){theirs}", rf"{inner}output.\1{ours}"),
        ]
    return [*rules, (r"downsample_convs\.(\d+)\.conv\.", r"down.\1."), (r"pafpn_convs\.(\d+)\.conv\.", r"output.\1.")]


def dense_head_rules(spec: Mapping[str, Any]) -> list[Rule]:
    """Build the renaming rules of a dense head, from `bbox_head` or `rpn_head` to `head`."""
    kind = spec["type"]
    if kind == "rpn":
        return RPN
    # A tower layer is convolution, normalization if any, ReLU.
    step = 3 if spec.get("norm", kind in NORMALIZED) else 2
    tower = r"^bbox_head\.(cls|reg)_convs\.(\d+)\."

    def rename(suffix: str, shift: int = 0) -> Callable[[re.Match[str]], str]:
        return lambda m: f"head.towers.{m[1]}.{step * int(m[2]) + shift}.{suffix}"

    aligned: list[Rule] = []
    if spec.get("align"):  # of FoveaBox
        aligned = [
            (r"^bbox_head\.cls_convs\.(\d+)\.conv\.", lambda m: f"head.align.tower.{step * int(m[1])}."),
            (r"^bbox_head\.cls_convs\.(\d+)\.gn\.", lambda m: f"head.align.tower.{step * int(m[1]) + 1}."),
        ]
    return [
        *aligned,
        (tower + r"conv\.conv_offset\.", rename("offset.")),
        (tower + r"(?:conv\.)?(?=(weight|bias)$)", rename("")),
        (tower + r"gn\.", rename("", 1)),
        *OUTPUTS.get(kind, []),
    ]


NORMALIZED = ("fcos", "vfnet", "atss", "gfl", "paa", "ddod", "tood", "autoassign")
"""Heads whose towers have GroupNorm by default."""


def _roi_rules(spec: Mapping[str, Any]) -> list[Rule]:
    kinds = [as_mapping(stage)["type"] for stage in spec.get("stages", [])]
    rules: list[Rule] = []
    for i, (kind, stage) in enumerate(zip(kinds, spec.get("stages", []))):
        number = rf"(?:{i}\.)" if len(kinds) > 1 else ""
        rules.append((r"^roi_head\.shared_head\.layer4\.", f"stages.{i}.pooling.last_stage.blocks."))
        convolutions = _convolution_rules("shared_", as_mapping(stage))
        ours = f"stages.{i}.{'box.' * (kind == 'dynamic')}"
        rules += _prefix_rules(rf"^roi_head\.bbox_head\.{number}", ours, convolutions + STAGE)
        for k, branch in enumerate(map(as_mapping, spec.get("branches") or [])):
            theirs = rf"^roi_head\.{branch['type']}_head\.{number}"
            own = BRANCHES.get(branch["type"], [])
            own = _convolution_rules("", branch) + own if branch["type"] == "mask" else own
            rules += _prefix_rules(theirs, f"branches.{k}.{i}.", own)
    return rules


def _convolution_rules(prefix: str, options: Mapping[str, Any]) -> list[Rule]:
    first = "0." if options.get("norm") else ""
    return [
        (rf"{prefix}convs\.(\d+)\.conv\.", rf"convs.\1.{first}"),
        (rf"{prefix}convs\.(\d+)\.(?:gn|bn)\.", r"convs.\1.1."),
    ]


def _prefix_rules(theirs: str, ours: str, rules: list[Rule]) -> list[Rule]:
    def prefix(name: str | Callable[[re.Match[str]], str]) -> str | Callable[[re.Match[str]], str]:
        return ours + name if isinstance(name, str) else lambda m: ours + name(m)

    return [(theirs + pattern, prefix(name)) for pattern, name in rules]


STAGE: list[Rule] = [
    (r"shared_fcs\.", "shared."),
    (r"fc_(cls|reg)\.", r"\1."),
    # Double-Head
    (r"fc_branch\.", "shared."),
    (r"res_block\.conv_identity\.(conv|bn)\.", lambda m: f"widen.shortcut.{int(m[1] == 'bn')}."),
    (r"res_block\.conv(\d)\.(conv|bn)\.", lambda m: f"widen.layers.{int(m[1]) - 1}.{int(m[2] == 'bn')}."),
    (
        r"conv_branch\.(\d+)\.(conv|bn)(\d)\.",
        lambda m: f"blocks.{m[1]}.layers.{int(m[3]) - 1}.{int(m[2] == 'bn')}.",
    ),
]
BRANCHES: dict[str, list[Rule]] = {
    "mask": [(r"conv_logits\.", "logits."), (r"upsample\.", "upsample.")],
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
    edge = re.compile(r"(roi_head\.grid_head\.(?:\d+\.)?)(f|s)order_trans\.(\d+)\.(\d+)\.(0|1)\.(weight|bias)")
    groups: dict[str, list[tuple[int, int, str]]] = {}
    for key in state:
        if m := re.fullmatch(r"(bbox_head\.scales(?:_refine)?)\.(\d+)\.scale", key):
            groups.setdefault(m[1], []).append((int(m[2]), 0, key))
        elif m := edge.fullmatch(key):
            layer = "depthwise" if m[5] == "0" else "pointwise"
            name = f"{m[1]}{'first' if m[2] == 'f' else 'second'}_order.{layer}.{m[6]}"
            groups.setdefault(name, []).append((int(m[3]), int(m[4]), key))
    for name, parts in groups.items():
        tensors = [
            state[key].reshape(1) if key.endswith(".scale") and state[key].numel() == 1 else state[key]
            for *_, key in sorted(parts)
        ]
        if len({tensor.shape[1:] for tensor in tensors}) > 1 or any(tensor.ndim == 0 for tensor in tensors):
            continue  # left as they are, so that `match_weights` reports them
        joined[name] = torch.cat(tensors)
        for *_, key in parts:
            del joined[key]
    return joined


def flip_stem_channels(state: Weights) -> Weights:
    """Convert weights for BGR images to RGB: reverse the input channels of the first convolution."""
    stem = next((name for name in STEMS if name in state and state[name].ndim == 4), None)
    return state | {stem: state[stem].flip(1)} if stem else state


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
        unsaved: Buffers that the other project does not save; these keep the detector's values, as do batch counters,
            which old checkpoints lack.

    Raises:
        InputError: Weights are missing, left over or of another shape; the message lists them.
    """
    kept = {k: v for k, v in wanted.items() if k in unsaved or k.endswith("num_batches_tracked")}
    result = {k: renamed[k].to(v.dtype) if k in renamed else kept.get(k) for k, v in wanted.items()}
    problems = {
        "in the file without a counterpart": [sources[k] for k in renamed if k not in wanted],
        "of the detector without weights in the file": [k for k, v in result.items() if v is None],
        "of another shape": [
            f"{sources[k]} {tuple(v.shape)}, here {tuple(wanted[k].shape)}"
            for k, v in renamed.items()
            if k in wanted and v.shape != wanted[k].shape
        ],
    }
    listed = [f"{len(items)} {what}: {shorten_list(items, 10)}" for what, items in problems.items() if items]
    if listed:
        raise InputError(f"{source} does not match: " + "; ".join(listed))
    return {k: v for k, v in result.items() if v is not None}
