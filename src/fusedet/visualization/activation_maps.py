"""Heat maps of a detector's features and what its modules' gates and weights are, level by level, for one image.

The maps are LayerCAM's: "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", Jiang et al., 2021: every activation
times the positive part of its own gradient, summed over the channels, the positive part of the sum. MSIL's paper (2023) shows such maps
in its Figures 4 and 6 and says neither by which method nor of which score, so that what is differentiated is a choice:

- classification: the class's log-odds at every place (an anchor, a point, a region), each place weighted with its own score, which is
  taken as given. A single detection's score depends on a few cells around one place alone; the whole image's score shows more.
- regression: how far each side of the boxes lies outward, in the box's own width or height, weighted alike; the mean of four maps, one a
  side. So the heat is where the features push sides outward.
- objectness and proposals, in two stages: the same of what proposes regions, which knows no classes; no gradient comes to it from the
  last stage, whose scores and boxes are followed back to the pyramid.

A cell's value is divided by its area, so that levels of all strides compare: the sum over an image's pixels is what a level adds in all.

Features are read by forward hooks on the parts, chosen by their types; nothing in the parts is changed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.models.detectors import Detector, NeckChain, OneStage
from fusedet.models.heads.towers import TwinTowers
from fusedet.models.modules import INTERACTIONS, MSFM, MSIL
from fusedet.models.necks import MSEFPN, NECKS, SMSL
from fusedet.models.necks.gates import CAG, CAM, GCG, CoordinateAttention
from fusedet.models.ops.boxes import clip, iou
from fusedet.types import Batch, Candidates, Features

KINDS = ("classification", "regression", "objectness", "proposals")
"""Of what there are heat maps: the class, the boxes; in two stages also whether anything is there, and the proposed boxes."""

PARTS = ("msfm", "neck", "branches", "msil", "gate", "smsl")
"""What can be shown: features before and after MSFM, before and after each neck, of the dense head's branches before and after their
interaction; the gates of MSIL and of MSE-FPN (GCG or another); SMSL's weights."""

ROWS = (
    "before msfm",
    "after msfm",
    "body",
    "neck",
    "pyramid",
    "tower",
    "branch before",
    "branch",
    "msil classification",
    "msil regression",
    "gate",
)
"""The rows' keys from the body to the head; necks before the last are numbered, as in "neck #0"."""


class Row(NamedTuple):
    """Maps of one place in the detector, (h, w) of a level by its stride; key is one of ROWS, caption says what stands there.

    Heat is per square pixel of the network's input, gates are means over the channels.
    """

    key: str
    caption: str
    part: str
    maps: dict[int, Tensor]


class LevelWeights(NamedTuple):
    """SMSL's weights A (T, L, C) of eq. 11: how much target t takes of level l in each channel; the last of T = L + 1 is the global one."""

    weights: Tensor
    strides: tuple[int, ...]


@dataclass(frozen=True)
class ActivationMaps:
    """What one detector shows of one image.

    score: the class's highest. heat: rows of maps, from 0, for those of KINDS that there are. gates: rows of maps in 0..1.
    level_weights: of each SMSL.
    """

    score: float
    heat: dict[str, list[Row]]
    gates: list[Row]
    level_weights: list[LevelWeights]

    @property
    def parts(self) -> set[str]:
        """Those of PARTS that are there."""
        rows = [row for rows in [*self.heat.values(), self.gates] for row in rows]
        return {row.part for row in rows} | ({"smsl"} if self.level_weights else set())

    @property
    def missing(self) -> list[str]:
        """What this detector does not have: some of PARTS, and regression, where boxes are read off maps of points (Grid R-CNN)."""
        return [part for part in PARTS if part not in self.parts] + [
            kind for kind in KINDS[:2] if kind not in self.heat
        ]


def layer_cam(feature: Tensor, gradient: Tensor) -> Tensor:
    """A feature (N, C, H, W) and a score's gradient by it to maps (N, H, W), 0 or more."""
    return (gradient.relu() * feature).sum(dim=1).relu()


def compute_activation_maps(detector: Detector, batch: Batch, label: int, alone: bool = False) -> ActivationMaps:
    """What a detector in eval mode shows of a batch of one image.

    label: the class, 0..K-1. alone: of the class's best place only, instead of all places, each weighted with its score.
    """
    watched = [m for m in detector.modules() if isinstance(m, (TwinTowers, MSFM, *_GATES, *_NECKS, *_INTERACTIONS))]
    watched += [] if isinstance(detector, OneStage) else [detector.head.tower]
    with torch.enable_grad(), record_calls(watched) as calls:
        outputs: Any = detector(batch.images, batch.sizes)
        if isinstance(detector, OneStage):
            candidates = detector.head.decode(outputs)
        else:
            candidates = detector.stages[-1].decode(outputs.raw, outputs.rois, outputs.counts)
        found = _Target.of(candidates, batch.sizes, label, alone)
        targets = {"classification": [found.odds], "regression": found.sides}
        if not isinstance(detector, OneStage):
            candidates = detector.head.decode(outputs.outputs)
            proposed = _Target.of(candidates, batch.sizes, 0, alone, found.box if alone else None)
            targets |= {"objectness": [proposed.odds], "proposals": proposed.sides}
        heat = {
            kind: _maps(_places(detector, calls, kind, batch), ts)
            for kind, ts in targets.items()
            if ts[0].requires_grad
        }
    with torch.no_grad():
        gates = [*_msil_gates(detector, calls), *_lateral_gates(detector, calls)]
        chosen = [m for m in calls if isinstance(m, SMSL)]
        weights = [LevelWeights(m.weights(calls[m][0].inputs)[0].cpu(), m.levels.strides) for m in chosen]
    return ActivationMaps(found.score, heat, gates, weights)


def resize_map(heat: Tensor, stride: int, size: tuple[int, int], shown: tuple[int, int]) -> Tensor:
    """A level's map (h, w), cells of `stride` pixels, over the image of `size` inside its padding, as a map of size `shown`."""
    h, w = heat.shape
    whole = F.interpolate(heat[None, None], size=(h * stride, w * stride), mode="bilinear", align_corners=False)
    return F.interpolate(
        whole[..., : size[0], : size[1]], size=shown, mode="bilinear", antialias=True, align_corners=False
    )[0, 0]


def heat_share_inside(heat: Tensor, boxes: Tensor) -> tuple[float, float]:
    """The shares of a map's heat (NaN for none) and of its area that lie in the union of boxes.

    heat (H, W); boxes (B, 4) in its pixels. A pixel is inside where its middle is.
    """
    y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in heat.shape)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)  # (B, 1) each
    inside = (((y1 < y) & (y < y2))[:, :, None] & ((x1 < x) & (x < x2))[:, None]).any(dim=0)
    total = float(heat.sum())
    return float(heat[inside].sum()) / total if total else math.nan, float(inside.double().mean())


class Call(NamedTuple):
    """The tensors that a module took and gave in one call, lists of them made flat."""

    inputs: Features
    outputs: Features


@contextmanager
def record_calls(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, list[Call]]]:
    """The calls of the modules while the context lasts, in order; each tensor is in the graph and is not written to later.

    A call's inputs are copies that this module alone takes, so that a gradient by them has come by way of this module.
    """
    calls: dict[nn.Module, list[Call]] = defaultdict(list)
    entered: dict[nn.Module, Features] = {}

    def before(module: nn.Module, args: Any) -> Any:
        taken = _each(args, lambda x: _in_graph(x.clone()))
        entered[module] = _flat(taken)
        return _each(taken, Tensor.clone)  # what is done in place is done to the second copy

    def after(module: nn.Module, args: Any, given: Any) -> Any:
        given = _each(given, _in_graph)
        calls[module].append(Call(entered.pop(module), _flat(given)))
        return _each(given, Tensor.clone)

    hooks = [hook for m in modules for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


_NECKS, _INTERACTIONS, _GATES = (
    tuple(NECKS.values()),
    tuple(INTERACTIONS.values()),
    (GCG, CAG, CoordinateAttention, CAM),
)


@dataclass(frozen=True)
class _Target:
    """What is differentiated: the weighted log-odds, the four sides; and the class's best place."""

    score: float
    odds: Tensor
    sides: list[Tensor]
    box: Tensor

    @classmethod
    def of(cls, candidates: Candidates, sizes: Tensor, label: int, alone: bool, near: Tensor | None = None) -> _Target:
        """near (4,): the place is the one whose box overlaps it most, instead of the best."""
        scores = candidates.scores[0, :, label]  # (P,)
        scores = scores if candidates.quality is None else scores * candidates.quality[0]
        boxes = candidates.boxes[0, :, label] if candidates.boxes.ndim == 4 else candidates.boxes[0]  # (P, 4)
        seen = clip(boxes.detach()[None], sizes)[0]
        there = (seen[:, 2] > seen[:, 0]) & (seen[:, 3] > seen[:, 1])
        weight = scores.detach() * there
        best = (weight if near is None else iou(seen, near.expand_as(seen)) * there).argmax()
        chosen = F.one_hot(best, len(weight)).to(weight.dtype) if alone else weight
        sides = boxes.detach()[:, 2:] - boxes.detach()[:, :2]
        outward = torch.cat([-boxes[:, :2], boxes[:, 2:]], dim=1) / sides.clamp(min=1).repeat(1, 2)
        # a place that counts for nothing may have a score of 0 or a box of no size: its gradient is not to be 0 * inf
        counts = chosen > 0
        odds = (chosen[counts] * scores[counts].logit(eps=1e-7)).sum()
        return cls(float(weight[best]), odds, list((chosen[counts, None] * outward[counts]).sum(dim=0)), seen[best])


def _maps(places: list[Row], targets: list[Tensor]) -> list[Row]:
    """LayerCAM of features (1, C, h, w) per area, the mean over the targets; a level on which no target depends is left out."""
    features = [(row.key, stride, x) for row in places for stride, x in row.maps.items()]
    found: dict[str, dict[int, Tensor]] = {row.key: {} for row in places}
    for target in targets:
        gradients = torch.autograd.grad(target, [x for *_, x in features], retain_graph=True, allow_unused=True)
        for (key, stride, x), gradient in zip(features, gradients):
            if gradient is not None:
                one = layer_cam(x.detach(), gradient)[0].float().cpu() / (stride**2 * len(targets))
                found[key][stride] = found[key].get(stride, 0) + one
    return [row._replace(maps=found[row.key]) for row in places if found[row.key]]


def _places(detector: Detector, calls: dict[nn.Module, list[Call]], kind: str, batch: Batch) -> list[Row]:
    """Where features are looked at, from the body to the head."""
    necks = list(detector.neck.necks) if isinstance(detector.neck, NeckChain) else [detector.neck]
    places: list[Row] = []
    steps: dict[int, Call] = {}
    for module, seen in calls.items():
        if isinstance(module, MSFM):  # of each stage the last
            steps[2 ** round(math.log2(batch.images.shape[2] / seen[0].inputs[0].shape[2]))] = seen[0]
    if steps:
        places.append(
            Row(
                "before msfm",
                "before MSFM, each stage's last",
                "msfm",
                {s: call.inputs[0] for s, call in steps.items()},
            )
        )
        places.append(Row("after msfm", "after MSFM", "msfm", {s: call.outputs[0] for s, call in steps.items()}))
    taken = dict(zip(detector.backbone.levels.strides, calls[necks[0]][0].inputs))
    places.append(Row("body", "body", "neck", taken))
    for i, neck in enumerate(necks):
        key = "pyramid" if neck is necks[-1] else f"neck #{i}"
        places.append(
            Row(key, f"after {_name(neck, NECKS)}", "neck", dict(zip(neck.levels.strides, calls[neck][0].outputs)))
        )
    strides = detector.head.levels.strides
    if kind in KINDS[2:]:
        tower = {s: call.outputs[0] for s, call in zip(strides, calls[detector.head.tower])}
        places.append(Row("tower", "shared convolution of the proposals", "branches", tower))
    for towers in (m for m in calls if isinstance(m, TwinTowers)):
        side = KINDS.index(kind)
        after = f"{kind} branch"
        if towers.interact is not None:
            name = _name(towers.interact, INTERACTIONS)
            before = {s: call.inputs[side] for s, call in zip(strides, calls[towers.interact])}
            places.append(Row("branch before", f"{after} before {name}", "branches", before))
            after = f"{after} after {name}"
        places.append(
            Row("branch", after, "branches", {s: call.outputs[side] for s, call in zip(strides, calls[towers])})
        )
    return places


def _msil_gates(detector: Detector, calls: dict[nn.Module, list[Call]]) -> list[Row]:
    """MSIL's pixel attention of each branch that it gates."""
    rows = []
    for msil in (m for m in calls if isinstance(m, MSIL)):
        gates = [msil.gates(*call.inputs) for call in calls[msil]]
        for side, kind in enumerate(KINDS[:2]):
            own = [gate[side] for gate in gates]
            levels = {s: x[0].mean(dim=0).cpu() for s, x in zip(detector.head.levels.strides, own) if x is not None}
            rows += [Row(f"msil {kind}", f"MSIL's gate of {kind}", "msil", levels)] if levels else []
    return rows


def _lateral_gates(detector: Detector, calls: dict[nn.Module, list[Call]]) -> list[Row]:
    """The gates of MSE-FPN, GCG or another, on lateral maps or on what is passed down; one weight per channel counts for the whole map."""
    rows = []
    for neck in (m for m in calls if isinstance(m, MSEFPN)):
        levels = {}
        strides = neck.levels.strides[neck.gate_place == "topdown" :]
        for stride, gate in zip(strides, neck.gate):
            if isinstance(gate, _GATES):
                x = calls[gate][0].inputs[0]
                levels[stride] = gate.weights(x)[0].mean(dim=0).expand(x.shape[2:]).cpu()
        place = "what is passed down" if neck.gate_place == "topdown" else "the lateral maps"
        rows += [Row("gate", f"{type(neck.gate[0]).__name__}'s gate on {place}", "gate", levels)] if levels else []
    return rows


def _name(module: nn.Module, table: Any) -> str:
    """The config's name of a part."""
    return next((name for name, kind in table.items() if type(module) is kind), type(module).__name__)


def _each(value: Any, change: Any) -> Any:
    """The same tuples and lists with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_each(x, change) for x in value)
    return value


def _flat(value: Any) -> Features:
    return (
        [value]
        if isinstance(value, Tensor)
        else [x for part in value for x in _flat(part)]
        if isinstance(value, (list, tuple))
        else []
    )


def _in_graph(x: Tensor) -> Tensor:
    """The tensor, or where nothing before it is trained, one that a gradient reaches."""
    return x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()
