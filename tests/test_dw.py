"""DW: losses against plain loops over points and instances, the negative weight's curve, and the box refinement."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from fakes import maps, objects
from fusedet.errors import InputError
from fusedet.models.heads import DWHead
from fusedet.models.heads.dw import refine_distances
from fusedet.models.ops.boxes import box_centers, distances_to_boxes
from fusedet.models.ops.layers import flatten_maps
from fusedet.types import Levels, Target
from small import float64

LEVELS = Levels((32, 32), (8, 16))
TARGETS = [
    objects([[4, 4, 40, 44], [10, 12, 30, 30], [6, 8, 44, 40]], [0, 1, 0]),
    objects([]),
    objects([[30, 2, 90, 60], [2, 2, 3, 3]], [2, 0]),
]


def negative_probability(iou: float, ious: list[float], weighting: str) -> float:
    if weighting == "paper":
        k = 1 / (0.95**2 - 0.5**2)
        return 1.0 if iou < 0.5 else 0.0 if iou > 0.95 else 1 + k * 0.5**2 - k * iou**2
    if iou < 0.5:
        return 1.0
    curve = [(x**2 - 1) / (0.5**2 - 1) for x in ious]
    low, high = min(curve), min(1.0, max(curve))
    return ((iou**2 - 1) / (0.5**2 - 1) - low + 1e-12) / (high - low + 1e-12)


@pytest.mark.parametrize("weighting", ["paper", "code"])
def test_losses_are_their_literal_form(weighting: str) -> None:
    torch.manual_seed(1)
    with float64():
        head = DWHead(LEVELS, 3, convs=1, weighting=weighting)
        for p in head.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        head.reg.bias.data -= 2  # boxes of many sizes, some with a large IoU
        outputs = head.double()(maps(LEVELS, n=3, dtype=torch.float64))
        targets = [Target(t.boxes.double(), t.labels) for t in TARGETS]
        losses = head.loss(outputs, targets)
        priors = outputs.priors
        points = box_centers(priors.boxes)
        scores = flatten_maps(outputs.maps["cls"], 3).sigmoid() * flatten_maps(outputs.maps["centerness"], 1).sigmoid()
        boxes = distances_to_boxes(points, flatten_maps(outputs.maps["reg"], 4) * priors.strides[:, None])
        positive, negative, box_loss, discount = (torch.zeros(()) for _ in range(4))
        between = 0
        for n, target in enumerate(targets):
            probability = torch.ones(len(points), 3)
            for box, label in zip(target.boxes, target.labels.tolist()):
                inside = [p for p, (x, y) in enumerate(points.tolist()) if box[0] < x < box[2] and box[1] < y < box[3]]
                ious = [float(box_iou(boxes[n, p, None].detach(), box[None])) for p in inside]
                gious = [generalized_box_iou(boxes[n, p, None], box[None])[0, 0] for p in inside]
                tops, bottoms = [], []
                for p, iou, giou in zip(inside, ious, gious):
                    s = float(scores[n, p, label].detach())
                    t = s * (iou**5 if weighting == "paper" else math.exp(-5 * (1 - float(giou.detach()))))
                    away = ((points[p] - (box[:2] + box[2:]) / 2) / priors.strides[p]).norm()
                    prior = math.exp(-(float(away) ** 2) / (2 * 1.11**2))
                    tops.append(math.exp(5 * t) * t * prior)
                    bottoms.append(math.exp((5 if weighting == "paper" else 3) * t) * t * prior)
                for p, top, giou, iou in zip(inside, tops, gious, ious):
                    weight = top / sum(bottoms) if sum(bottoms) else 0.0
                    positive = positive - weight * scores[n, p, label].log()
                    box_loss = box_loss + weight * (1 - giou)
                    probability[p, label] = negative_probability(iou, ious, weighting)
                    between += 0 < probability[p, label] < 1
            s = scores[n]
            negative = negative - (probability * s**2 * (1 - s).log()).sum()
            discount = discount + (1 - probability).sum()
        assert between > 3
        expected = {
            "loss_positive": positive / 5,
            "loss_box": box_loss / 5,
            "loss_negative": negative / discount.clamp(min=1),
        }
        parameters = [head.cls.weight, head.reg.weight, head.refine.weight, head.centerness.weight]
        for key, value in expected.items():
            assert torch.allclose(losses[key], value, rtol=1e-8), key
            ours, theirs = (
                torch.autograd.grad(x, parameters, retain_graph=True, materialize_grads=True)
                for x in (losses[key], value)
            )
            assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-12) for a, b in zip(ours, theirs)), key


def sample(table: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """One bilinear value of a map (H, W), whose border cells go on outside."""
    height, width = table.shape
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = table[top, left] * (left + 1 - x) + table[top, right] * (x - left)
    lower = table[bottom, left] * (left + 1 - x) + table[bottom, right] * (x - left)
    return upper * (top + 1 - y) + lower * (y - top)


def test_refinement_takes_each_side_from_the_box_at_its_foot() -> None:
    torch.manual_seed(0)
    with float64():
        distances = (3 * torch.rand(2, 4, 5, 7)).requires_grad_()
        offsets = torch.randn(2, 8, 5, 7, requires_grad=True)
        refined = refine_distances(distances, offsets)
        cells = {"x": torch.arange(7.0).expand(5, 7), "y": torch.arange(5.0)[:, None].expand(5, 7)}
        expected = torch.zeros(2, 4, 5, 7)
        for side, (axis, sign) in enumerate((("x", -1), ("y", -1), ("x", 1), ("y", 1))):
            for n in range(2):
                table = cells[axis] + sign * distances[n, side]
                for i in range(5):
                    for j in range(7):
                        foot = {"x": float(j), "y": float(i)}
                        foot[axis] = foot[axis] + sign * distances[n, side, i, j]
                        value = sample(
                            table, foot["y"] + offsets[n, 2 * side, i, j], foot["x"] + offsets[n, 2 * side + 1, i, j]
                        )
                        expected[n, side, i, j] = (sign * (value - (j if axis == "x" else i))).clamp(min=0)
        assert torch.allclose(refined, expected, rtol=1e-9, atol=1e-12)
        weights = torch.randn_like(refined)
        ours, theirs = (
            torch.autograd.grad((x * weights).sum(), [distances, offsets], retain_graph=True)
            for x in (refined, expected)
        )
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-10) for a, b in zip(ours, theirs))


def test_boxes_on_which_all_cells_agree_stay() -> None:
    """Where every cell predicts the same box, wherever its sides are sampled, the refined box is that box."""
    box = torch.tensor([1.5, -0.5, 9.25, 6.0])
    x, y = torch.arange(7.0).expand(5, 7), torch.arange(5.0)[:, None].expand(5, 7)
    distances = torch.stack([x - box[0], y - box[1], box[2] - x, box[3] - y])[None]
    refined = refine_distances(distances, torch.randn(1, 8, 5, 7))
    torch.testing.assert_close(refined, distances.clamp(min=0), atol=1e-5, rtol=0)


def test_head_without_refinement_is_fcos() -> None:
    head = DWHead(LEVELS, 3, convs=1, refine=False)
    full = DWHead(LEVELS, 3, convs=1)
    assert sum(p.numel() for p in full.parameters()) - sum(p.numel() for p in head.parameters()) == 8 * 9 * 32 + 8
    _, scores, quality = head.decode(outputs := head(maps(LEVELS)))
    cls, seen = flatten_maps(outputs.maps["cls"], 3).sigmoid(), flatten_maps(outputs.maps["centerness"], 1).sigmoid()
    assert quality is None
    torch.testing.assert_close(scores, cls * seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "code_"}, "unknown weighting 'code_'"),
        ({"sigma": 0.0}, "sigma=0.0"),
        ({"beta": -1.0}, "beta=-1.0"),
        ({"gamma_iou": 0.0}, "gamma_iou=0.0"),
        ({"positive_weight": -1.0}, "positive_weight=-1.0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DWHead(LEVELS, 3, **options)
