"""OTA: the assignment against a dense transport problem in plain loops, small cases by hand, and the head's losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou, sigmoid_focal_loss

from fakes import maps, objects
from fusedet.errors import InputError
from fusedet.models.heads import OTAHead
from fusedet.models.ops.boxes import box_centers, distances_to_boxes
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.ops.optimal_transport import OptimalTransportAssigner, estimate_supply, transport_labels
from fusedet.types import Levels, Outputs, Target
from small import float64

LEVELS = Levels((32, 32), (8, 16))
TARGETS = [
    objects([[4, 4, 40, 44], [10, 12, 30, 30], [6, 8, 44, 40]], [0, 1, 0]),
    objects([]),
    objects([[30, 2, 90, 60], [50, 34, 54, 38], [-300, -300, -200, -200]], [2, 0, 1]),  # between points; without any
]


def predict(seed: int, head: OTAHead) -> tuple[Outputs, list[Target], Tensor, Tensor, Tensor]:
    """Outputs, targets, points, logits (N, P, K) and boxes (N, P, 4) of a random head, in float64."""
    torch.manual_seed(seed)
    for p in head.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    outputs = head.double()(maps(LEVELS, n=3, dtype=torch.float64))
    points = box_centers(outputs.priors.boxes)
    distances = flatten_maps(outputs.maps["reg"], 4) * outputs.priors.strides[:, None]
    targets = [Target(t.boxes.double(), t.labels) for t in TARGETS]
    return outputs, targets, points, flatten_maps(outputs.maps["cls"], 3), distances_to_boxes(points, distances)


def log_sum(values: list[float]) -> float:
    peak = max(values)
    return peak + math.log(sum(math.exp(v - peak) for v in values))


def slow_assignment(
    rule: OptimalTransportAssigner, logits: Tensor, boxes: Tensor, points: Tensor, strides: Tensor, target: Target
) -> list[int]:
    """Assign one image by the whole matrix of suppliers and points, in the logarithmic domain."""
    count, classes = logits.shape
    costs, supply = [], []
    for box, label in zip(target.boxes.tolist(), target.labels.tolist()):
        x1, y1, x2, y2 = box
        away = [max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) for x, y in points.tolist()]
        near = [a < rule.radius * float(s) for a, s in zip(away, strides)]
        inside = [min(x - x1, y - y1, x2 - x, y2 - y) > 0.01 for x, y in points.tolist()]
        allowed = [a and b for a, b in zip(near, inside)]
        allowed = allowed if any(allowed) else near
        if not any(allowed):
            continue
        ious = box_iou(boxes, torch.tensor([box]))[:, 0].tolist()
        k = sum(sorted((iou if a else 0.0 for iou, a in zip(ious, allowed)), reverse=True)[: rule.topk])
        supply.append(float(max(1, int(k))))
        one_hot = torch.zeros(count, classes)
        one_hot[:, label] = 1
        cls = sigmoid_focal_loss(logits, one_hot, rule.alpha, rule.gamma).sum(dim=1).tolist()
        costs.append(
            [
                c - rule.box_weight * math.log(max(iou, 2.0**-23)) + (0 if a else 1e6)
                for c, iou, a in zip(cls, ious, allowed)
            ]
        )
    kept = [i for i, box in enumerate(target.boxes.tolist()) if box[2] > 0]
    assert len(costs) == len(kept)
    supply.append(max(1.0, count - sum(supply)))
    costs.append(sigmoid_focal_loss(logits, torch.zeros(count, classes), rule.alpha, rule.gamma).sum(dim=1).tolist())
    m = [[-c / rule.regularization for c in row] for row in costs]
    u, v = [0.0] * len(m), [0.0] * count
    for _ in range(rule.steps):
        v = [-log_sum([m[i][j] + u[i] for i in range(len(m))]) for j in range(count)]
        u = [math.log(s) - log_sum([row[j] + v[j] for j in range(count)]) for s, row in zip(supply, m)]
    plan = [[math.exp(row[j] + u[i] + v[j]) for j in range(count)] for i, row in enumerate(m)]
    shares = [[p / max(row) for p in row] for row in plan]
    best = [max(range(len(m)), key=lambda i: (shares[i][j], -i)) for j in range(count)]
    return [kept[i] if i < len(kept) else -1 for i in best]


@pytest.mark.parametrize("seed", range(2))
def test_assignment_is_the_dense_transport(seed: int) -> None:
    """Also of an instance between the points, whose labels go to the points near its center, and of one without any."""
    with float64():
        head = OTAHead(LEVELS, 3, convs=1)
        rule = OptimalTransportAssigner(steps=12)
        outputs, targets, points, logits, boxes = predict(seed, head)
        assigned = rule.assign_predictions(logits, boxes, outputs.priors, targets)
        for n, target in enumerate(targets):
            expected = slow_assignment(
                rule, logits[n].detach(), boxes[n].detach(), points, outputs.priors.strides, target
            )
            assert assigned[n].tolist() == expected, n
        assert {0, 1} <= set(assigned[0].tolist())
        assert set(assigned[1].tolist()) == {-1}
        assert set(assigned[2].tolist()) == {-1, 0, 1}


def test_plan_gives_every_point_one_label() -> None:
    """After many steps the rows of the plan sum to the supplies, and the columns to 1."""
    with float64():
        torch.manual_seed(0)
        row, column = (x.flatten() for x in torch.meshgrid(torch.arange(2), torch.arange(6), indexing="ij"))
        cost, background, supply = 3 * torch.rand(12), 3 * torch.rand(1, 9), torch.tensor([2.0, 3.0])
        share, rest = transport_labels(cost, background, row, column, supply, 500)
        shares = torch.zeros(3, 9)
        shares[row, column] = share.exp()
        shares[2] = rest.exp()[0]
        assert torch.equal(shares.amax(dim=1), torch.ones(3))
        # the supplies over the sums of the shares scale the rows to the plan
        plan = shares * (torch.tensor([2.0, 3.0, 4.0]) / shares.sum(dim=1))[:, None]
        assert torch.allclose(plan.sum(dim=0), torch.ones(9), rtol=1e-9)


def test_number_of_labels_by_hand() -> None:
    row = torch.tensor([0, 0, 0, 1, 3, 3])
    ious = torch.tensor([0.5, 0.9, 0.8, 0.2, 1.0, 1.0])
    assert estimate_supply(ious, row, 4, 3).tolist() == [2, 1, 0, 2]
    assert estimate_supply(ious, row, 4, 2).tolist() == [1, 1, 0, 2]
    assert estimate_supply(ious[:0], row[:0], 2, 2).tolist() == [0, 0]


def test_an_instance_takes_as_many_points_as_it_has_labels() -> None:
    """Twelve predicted boxes of the same cost but for the score fit with an IoU of 0.5: the six best scores win."""
    head = OTAHead(Levels((32,), (8,)), 2, convs=0)
    priors = head([torch.zeros(1, 32, 3, 4)]).priors
    target = objects([[-8.0, -8.0, 40.0, 40.0]])
    boxes = torch.tensor([-8.0, -8.0, 40.0, 16.0]).expand(1, 12, 4)
    scores = torch.tensor([0.9, 0.3, 0.8, 0.2, 0.85, 0.35, 0.7, 0.1, 0.75, 0.15, 0.95, 0.25])
    logits = torch.stack([scores.logit(), torch.full_like(scores, -9)], dim=1)[None]
    rule = OptimalTransportAssigner(radius=10.0, steps=500)
    assigned = rule.assign_predictions(logits, boxes, priors, [target])
    assert [int(a) == 0 for a in assigned[0]] == (scores > 0.5).tolist()


def test_losses_are_their_literal_form() -> None:
    with float64():
        head = OTAHead(LEVELS, 3, convs=1)
        outputs, targets, _, logits, boxes = predict(3, head)
        losses = head.loss(outputs, targets)
        assigned = head.transport.assign_predictions(logits, boxes, outputs.priors, targets)
        quality = flatten_maps(outputs.maps["centerness"], 1)
        one_hot = torch.zeros_like(logits)
        box_loss, iou_loss, count = torch.zeros(()), torch.zeros(()), 0
        for n, target in enumerate(targets):
            for p, g in enumerate(assigned[n].tolist()):
                if g < 0:
                    continue
                count += 1
                one_hot[n, p, target.labels[g]] = 1
                pair = boxes[n, p, None], target.boxes[g, None]
                box_loss = box_loss + 1 - generalized_box_iou(*pair)[0, 0]
                iou, score = box_iou(*pair)[0, 0].detach(), quality[n, p, 0].sigmoid()
                iou_loss = iou_loss - iou * score.log() - (1 - iou) * (1 - score).log()
        focal = sigmoid_focal_loss(logits, one_hot, 0.25, 2.0, "sum")
        for key, value in {"loss_cls": focal, "loss_box": box_loss, "loss_iou": iou_loss}.items():
            assert torch.allclose(losses[key], value / count, rtol=1e-9), key
        assert head.loss_weights == {"loss_cls": 1.0, "loss_box": 2.0, "loss_iou": 0.5}


def test_scores_are_roots_of_products() -> None:
    head = OTAHead(LEVELS, 3, convs=1)
    outputs = head(maps(LEVELS))
    _, scores, quality = head.decode(outputs)
    cls, iou = flatten_maps(outputs.maps["cls"], 3).sigmoid(), flatten_maps(outputs.maps["centerness"], 1).sigmoid()
    assert quality is None
    torch.testing.assert_close(scores**2, cls * iou)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"radius": 0.0}, "radius=0.0"),
        ({"topk": 0}, "topk=0"),
        ({"steps": 0}, "steps=0"),
        ({"regularization": 0.0}, "regularization=0.0"),
        ({"cost_weight": -1.0}, "cost_weight=-1.0"),
        ({"iou_weight": -1.0}, "iou_weight=-1.0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        OTAHead(LEVELS, 3, **options)
