"""Class activation maps of a detector's features, and the gates and level weights of its modules, for one image.

The maps are LayerCAM's: activation times the positive part of its gradient, summed over the channels, then the positive
part of the sum. MSIL's paper (2023) shows such maps in its Figures 4 and 6 without naming the method or the score, so
the differentiated score is a choice:

- classification: the class's log-odds at every candidate (anchor, point or RoI), weighted with its own score, which is
  a constant. A single detection's score depends on a few cells only; the sum over the image shows more.
- regression: how far each side of the boxes lies outward, in units of the box's width or height, with the same weights;
  the mean of four maps, one per side. The heat shows where features push the sides outward.
- objectness and proposals (two-stage detectors): the same for the class-agnostic proposal head. No gradient reaches it
  from the last stage, whose scores and boxes are traced back to the pyramid.

A cell's value is divided by its area, so that levels of all strides compare: the sum over an image's pixels is the
total contribution of a level. Forward hooks on the parts read the features; the parts stay as they are.

References:
    "LayerCAM: Exploring Hierarchical Class Activation Maps for Localization", Jiang et al., 2021.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from fusedet.models.detectors import DetectorModule, NeckChain, OneStage
from fusedet.models.heads import RPNHead
from fusedet.models.heads.towers import TwinTowers
from fusedet.models.modules import INTERACTIONS, MSFM, MSIL
from fusedet.models.necks import MSEFPN, NECKS, SMSL
from fusedet.models.necks.gates import CAG, CAM, GCG, CoordinateAttention
from fusedet.models.ops.boxes import aligned_iou, clip_boxes
from fusedet.models.protocols import Neck
from fusedet.types import Batch, Candidates
from fusedet.visualization.module_calls import Call, Calls, record_calls

KINDS = ("classification", "regression", "objectness", "proposals")
"""Differentiated scores: the class, the boxes; in two-stage detectors also the objectness and the proposed boxes."""

PARTS = ("msfm", "neck", "branches", "msil", "gate", "smsl")
"""Parts to show: features before and after MSFM, before and after each neck, of the dense head's branches before and
after their interaction; the gates of MSIL and of MSE-FPN (GCG or another); SMSL's weights."""

ROWS = (
    "before msfm",
    "after msfm",
    "backbone",
    "neck",
    "pyramid",
    "tower",
    "branch before",
    "branch",
    "msil classification",
    "msil regression",
    "gate",
)
"""Keys of the rows from the backbone to the head; necks before the last are numbered, as in "neck #0"."""


class MapRow(NamedTuple):
    """Maps of one point in the detector, by the stride of their level.

    Attributes:
        key: One of `ROWS`.
        caption: Text for the reader of a figure.
        part: One of `PARTS`.
        maps: (h, w) by stride. Heat is per square pixel of the network's input; gates are means over the channels.
    """

    key: str
    caption: str
    part: str
    maps: dict[int, Tensor]


class LevelWeights(NamedTuple):
    """SMSL's weights A of eq. 11: how much of level l target t takes in each channel.

    Shape:
        weights (T, L, C); with T = L + 1 the last target is the global feature.
    """

    weights: Tensor
    strides: tuple[int, ...]


@dataclass(frozen=True)
class ActivationMaps:
    """Activation maps, gates and level weights of one detector for one image.

    Attributes:
        score: Highest score of the class.
        heat: Rows of maps, 0 or more, for those of `KINDS` that the detector has.
        gates: Rows of maps in 0..1.
        level_weights: Weights of each SMSL.
    """

    score: float
    heat: dict[str, list[MapRow]]
    gates: list[MapRow]
    level_weights: list[LevelWeights]

    @property
    def parts(self) -> set[str]:
        """Those of `PARTS` that the detector has."""
        rows = [row for rows in [*self.heat.values(), self.gates] for row in rows]
        return {row.part for row in rows} | ({"smsl"} if self.level_weights else set())

    @property
    def missing(self) -> list[str]:
        """Those of `PARTS` that the detector lacks, and "regression" for boxes from point heat maps (Grid R-CNN)."""
        return [part for part in PARTS if part not in self.parts] + [
            kind for kind in KINDS[:2] if kind not in self.heat
        ]


def layer_cam(feature: Tensor, gradient: Tensor) -> Tensor:
    """Compute LayerCAM of a feature map and the gradient of a score.

    Shape:
        feature, gradient (N, C, H, W); result (N, H, W), 0 or more.
    """
    return (gradient.relu() * feature).sum(dim=1).relu()


def compute_activation_maps(
    detector: DetectorModule, batch: Batch, label: int, best_only: bool = False
) -> ActivationMaps:
    """Compute the maps, gates and level weights of a detector in eval mode for a batch of one image.

    Args:
        detector: A detector in eval mode.
        batch: One image.
        label: Class, 0..K-1.
        best_only: Differentiate the class's best candidate only, instead of all candidates weighted with their scores.
    """
    watched = [m for m in detector.modules() if isinstance(m, (TwinTowers, MSFM, *_GATES, *_NECKS, *_INTERACTIONS))]
    if not isinstance(detector, OneStage):
        watched.append(cast("RPNHead", detector.head).tower)
    with torch.enable_grad(), record_calls(watched) as calls:
        outputs: Any = detector(batch.images, batch.sizes)
        if isinstance(detector, OneStage):
            candidates = detector.head.decode(outputs)
        else:
            candidates = detector.stages[-1].decode(outputs.raw, outputs.rois, outputs.counts)
        main = _Scores.of(candidates, batch.sizes, label, best_only)
        targets = {"classification": [main.log_odds], "regression": main.sides}
        if not isinstance(detector, OneStage):
            candidates = detector.head.decode(outputs.outputs)
            proposal = _Scores.of(candidates, batch.sizes, 0, best_only, main.box if best_only else None)
            targets |= {"objectness": [proposal.log_odds], "proposals": proposal.sides}
        heat = {
            kind: _layer_cams(_feature_rows(detector, calls, kind, batch), scores)
            for kind, scores in targets.items()
            if scores[0].requires_grad
        }
    with torch.no_grad():
        gates = [*_msil_gates(detector, calls), *_lateral_gates(calls)]
        smsl_necks = [m for m in calls if isinstance(m, SMSL)]
        weights = [LevelWeights(m.weights(calls[m][0].inputs)[0].cpu(), m.levels.strides) for m in smsl_necks]
    return ActivationMaps(main.score, heat, gates, weights)


def resize_map(heat: Tensor, stride: int, size: tuple[int, int], shown: tuple[int, int]) -> Tensor:
    """Resize a level's map to an image.

    Args:
        heat: (h, w), cells of `stride` pixels.
        stride: Stride of the level.
        size: Height and width of the image inside the padding, in pixels of the network's input.
        shown: Height and width of the result.
    """
    h, w = heat.shape
    whole = F.interpolate(heat[None, None], size=(h * stride, w * stride), mode="bilinear", align_corners=False)
    return F.interpolate(
        whole[..., : size[0], : size[1]], size=shown, mode="bilinear", antialias=True, align_corners=False
    )[0, 0]


def heat_share_inside(heat: Tensor, boxes: Tensor) -> tuple[float, float]:
    """Compute the shares of a map's heat and of its area that lie in the union of boxes.

    A pixel is inside if its center is. The share of a map without heat is NaN.

    Shape:
        heat (H, W); boxes (B, 4) in its pixels.
    """
    y, x = (torch.arange(n, device=boxes.device) + 0.5 for n in heat.shape)
    x1, y1, x2, y2 = boxes[:, :, None].unbind(dim=1)  # (B, 1) each
    inside = (((y1 < y) & (y < y2))[:, :, None] & ((x1 < x) & (x < x2))[:, None]).any(dim=0)
    total = float(heat.sum())
    return float(heat[inside].sum()) / total if total else math.nan, float(inside.double().mean())


_NECKS, _INTERACTIONS = tuple(NECKS.values()), tuple(INTERACTIONS.values())
_GATES = (GCG, CAG, CoordinateAttention, CAM)


@dataclass(frozen=True)
class _Scores:
    """Differentiated scores: the weighted log-odds and four sides; and score and box (4,) of the best candidate."""

    score: float
    log_odds: Tensor
    sides: list[Tensor]
    box: Tensor

    @classmethod
    def of(
        cls, candidates: Candidates, sizes: Tensor, label: int, best_only: bool, near: Tensor | None = None
    ) -> _Scores:
        """Sum over the candidates; with near (4,) the best one is that of the largest overlap with it."""
        scores = candidates.scores[0, :, label]  # (P,)
        scores = scores if candidates.quality is None else scores * candidates.quality[0]
        boxes = candidates.boxes[0, :, label] if candidates.boxes.ndim == 4 else candidates.boxes[0]  # (P, 4)
        clipped = clip_boxes(boxes.detach()[None], sizes)[0]
        valid = (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])
        weight = scores.detach() * valid
        best = (weight if near is None else aligned_iou(clipped, near.expand_as(clipped)) * valid).argmax()
        chosen = F.one_hot(best, len(weight)).to(weight.dtype) if best_only else weight
        lengths = boxes.detach()[:, 2:] - boxes.detach()[:, :2]
        outward = torch.cat([-boxes[:, :2], boxes[:, 2:]], dim=1) / lengths.clamp(min=1).repeat(1, 2)
        # a candidate of weight 0 may have a score of 0 or an empty box: its gradient would be 0 * inf
        counts = chosen > 0
        log_odds = (chosen[counts] * scores[counts].logit(eps=1e-7)).sum()
        sides = list((chosen[counts, None] * outward[counts]).sum(dim=0))
        return cls(float(weight[best]), log_odds, sides, clipped[best])


def _layer_cams(rows: list[MapRow], scores: list[Tensor]) -> list[MapRow]:
    """Compute LayerCAM of features (1, C, h, w) per area, averaged over the scores; omit levels without influence."""
    features = [(row.key, stride, x) for row in rows for stride, x in row.maps.items()]
    maps: dict[str, dict[int, Tensor]] = {row.key: {} for row in rows}
    for score in scores:
        gradients = torch.autograd.grad(score, [x for *_, x in features], retain_graph=True, allow_unused=True)
        for (key, stride, x), gradient in zip(features, gradients):
            if gradient is not None:
                heat = layer_cam(x.detach(), gradient)[0].float().cpu() / (stride**2 * len(scores))
                maps[key][stride] = maps[key].get(stride, 0) + heat
    return [row._replace(maps=maps[row.key]) for row in rows if maps[row.key]]


def _feature_rows(detector: DetectorModule, calls: Calls, kind: str, batch: Batch) -> list[MapRow]:
    """Collect the features to show, from the backbone to the head."""
    necks: Sequence[Neck] = detector.neck.necks if isinstance(detector.neck, NeckChain) else [detector.neck]
    rows: list[MapRow] = []
    blocks: dict[int, Call] = {}
    for module, own in calls.items():
        if isinstance(module, MSFM):  # the last one of each stage
            blocks[2 ** round(math.log2(batch.images.shape[2] / own[0].inputs[0].shape[2]))] = own[0]
    if blocks:
        inputs, outputs = ({s: getattr(call, side)[0] for s, call in blocks.items()} for side in Call._fields)
        rows.append(MapRow("before msfm", "before MSFM, each stage's last", "msfm", inputs))
        rows.append(MapRow("after msfm", "after MSFM", "msfm", outputs))
    extracted = dict(zip(detector.backbone.levels.strides, calls[necks[0]][0].inputs))
    rows.append(MapRow("backbone", "backbone", "neck", extracted))
    for i, neck in enumerate(necks):
        key = "pyramid" if neck is necks[-1] else f"neck #{i}"
        pyramid = dict(zip(neck.levels.strides, calls[neck][0].outputs))
        rows.append(MapRow(key, f"after {_type_name(neck, NECKS)}", "neck", pyramid))
    strides = detector.neck.levels.strides
    if kind in KINDS[2:]:
        calls_of_tower = calls[cast("RPNHead", detector.head).tower]
        tower = {s: call.outputs[0] for s, call in zip(strides, calls_of_tower)}
        rows.append(MapRow("tower", "shared convolution of the proposals", "branches", tower))
    for towers in (m for m in calls if isinstance(m, TwinTowers)):
        side = KINDS.index(kind)
        caption = f"{kind} branch"
        if towers.interact is not None:
            name = _type_name(towers.interact, INTERACTIONS)
            before = {s: call.inputs[side] for s, call in zip(strides, calls[towers.interact])}
            rows.append(MapRow("branch before", f"{caption} before {name}", "branches", before))
            caption = f"{caption} after {name}"
        branch = {s: call.outputs[side] for s, call in zip(strides, calls[towers])}
        rows.append(MapRow("branch", caption, "branches", branch))
    return rows


def _msil_gates(detector: DetectorModule, calls: Calls) -> list[MapRow]:
    """Collect MSIL's pixel attention of each branch that it gates."""
    rows = []
    for msil in (m for m in calls if isinstance(m, MSIL)):
        gates = [msil.gates(*call.inputs) for call in calls[msil]]
        for side, kind in enumerate(KINDS[:2]):
            own = [gate[side] for gate in gates]
            maps = {s: x[0].mean(dim=0).cpu() for s, x in zip(detector.neck.levels.strides, own) if x is not None}
            rows += [MapRow(f"msil {kind}", f"MSIL's gate of {kind}", "msil", maps)] if maps else []
    return rows


def _lateral_gates(calls: Calls) -> list[MapRow]:
    """Collect MSE-FPN's gates on lateral or top-down maps; a weight per channel counts for the whole map."""
    rows = []
    for neck in (m for m in calls if isinstance(m, MSEFPN)):
        maps = {}
        strides = neck.levels.strides[neck.gate_place == "topdown" :]
        for stride, gate in zip(strides, neck.gate):
            if isinstance(gate, _GATES):
                x = calls[gate][0].inputs[0]
                maps[stride] = gate.weights(x)[0].mean(dim=0).expand(x.shape[2:]).cpu()
        place = "the top-down maps" if neck.gate_place == "topdown" else "the lateral maps"
        rows += [MapRow("gate", f"{type(neck.gate[0]).__name__}'s gate on {place}", "gate", maps)] if maps else []
    return rows


def _type_name(part: object, table: Mapping[str, Any]) -> str:
    """Return a part's name in the config."""
    return next((name for name, kind in table.items() if type(part) is kind), type(part).__name__)
