"""YOLOF and AutoAssign: small cases by hand, and losses against their literal form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou, generalized_box_iou

from fakes import Call, batch, check_export, detect, maps, objects
from fusedet.errors import InputError
from fusedet.models.detectors import create_model, prepare_for_inference
from fusedet.models.heads import AutoAssignHead, GFLHead, TOODHead, YOLOFHead
from fusedet.models.ops.boxes import box_centers, distances_to_boxes
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.ops.uniform_assigner import UniformMatcher
from fusedet.types import Levels, Target
from small import float64

TARGETS = [
    objects([[4, 4, 40, 44], [10, 12, 30, 30], [6, 8, 44, 40]], [0, 1, 0]),
    objects([]),
    objects([[30, 2, 90, 60]], [2]),
]


def randomized(head: Any) -> Any:
    for p in head.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    return head.double()


# -- YOLOF


def test_uniform_matches_by_hand() -> None:
    """Anchors along a line; the boxes of the last two predict the instance."""
    anchors = torch.tensor([[10.0 * i, 0, 10.0 * i + 10, 10] for i in range(6)])
    target = objects([[0, 0, 10, 10]])
    predicted = anchors.clone()
    predicted[4] = predicted[5] = target.boxes[0]
    predicted[5, 2] += 1
    every = torch.ones(6, dtype=torch.bool)
    matched = UniformMatcher(topk=2, positive=0.15, negative=0.7).match(anchors, predicted, target, every)
    # ranks in turn, the predicted box (0 and 4 are equally near) and the anchor
    assert sorted(matched.priors[0].tolist()) in ([0, 0, 1, 4], [0, 0, 1, 0, 4])
    # of the matches only anchor 0 overlaps the instance; 5 is not matched, but its box overlaps by more than 0.7
    assert matched.assigned.tolist() == [0, -2, -1, -1, -2, -2]
    assert matched.priors[0][matched.positive[0]].unique().tolist() == [0]
    valid = every.clone()
    valid[0] = False
    assert UniformMatcher(2).match(anchors, predicted, target, valid).assigned[0] == -2


def test_the_last_claim_counts() -> None:
    """One anchor, two instances: both claim it as predicted box and as anchor, the later instance takes it."""
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    target = objects([[0, 0, 10, 9], [0, 0, 9, 10]], [0, 1])
    matched = UniformMatcher(1).match(anchors, anchors, target, torch.ones(1, dtype=torch.bool))
    assert matched.assigned.tolist() == [1]
    assert matched.positive.all()


def test_yolof_logits_are_those_of_the_product() -> None:
    head = randomized(YOLOFHead(Levels((32,), (32,)), 3))
    kept = {}
    head.cls.register_forward_hook(lambda m, i, o: kept.update(cls=o))
    head.objectness.register_forward_hook(lambda m, i, o: kept.update(objectness=o))
    with float64():
        (logits,) = head([torch.randn(2, 32, 2, 3)]).maps["cls"]
        wanted = kept["cls"].sigmoid().unflatten(1, (5, 3)) * kept["objectness"].sigmoid()[:, :, None]
        assert torch.allclose(logits.sigmoid(), wanted.flatten(1, 2), rtol=1e-9)


def test_yolof_box_loss_is_its_literal_form() -> None:
    torch.manual_seed(0)
    with float64():
        head = randomized(YOLOFHead(Levels((32,), (32,)), 3, convs=1))
        outputs = head([torch.randn(3, 32, 2, 3)])
        targets = [Target(t.boxes.double(), t.labels) for t in TARGETS]
        losses = head.loss(outputs, targets)
        boxes = head.decode(outputs).boxes
        total, count = torch.zeros(()), 0
        for n, target in enumerate(targets):
            matched = head.matcher.match(
                outputs.priors.boxes, boxes[n].detach(), target, torch.ones(len(outputs.priors), dtype=torch.bool)
            )
            count += max(1, int((matched.assigned >= 0).sum()))
            for box, rows in zip(target.boxes, matched.priors):
                assert len(rows) == 8
                for row in rows.tolist():
                    if box_iou(outputs.priors.boxes[row, None], box[None])[0, 0] >= 0.15:
                        total = total + 1 - generalized_box_iou(boxes[n, row, None], box[None])[0, 0]
        assert float(total.detach()) > 0
        assert torch.allclose(losses["loss_box"], total / count, rtol=1e-8)


def test_yolof_trains_on_a_single_cell() -> None:
    """Where plain BatchNorm fails."""
    head = YOLOFHead(Levels((32,), (32,)), 3).train()
    losses = head.loss(head([torch.randn(1, 32, 1, 1)]), [objects([[4, 4, 30, 30]])])
    assert all(value.isfinite() for value in losses.values())


# -- AutoAssign


def log_loss(p: Tensor) -> Tensor:
    return -p.log().clamp(min=-100)


def test_autoassign_loss_is_its_literal_form() -> None:
    torch.manual_seed(1)
    with float64():
        levels = Levels((32, 32), (8, 16))
        head = randomized(AutoAssignHead(levels, 3, convs=1))
        outputs = head(maps(levels, n=3, dtype=torch.float64))
        targets = [Target(t.boxes.double(), t.labels) for t in TARGETS]
        losses = head.loss(outputs, targets)
        priors = outputs.priors
        points = box_centers(priors.boxes)
        scores = flatten_maps(outputs.maps["cls"], 3).sigmoid() * flatten_maps(outputs.maps["centerness"], 1).sigmoid()
        boxes = distances_to_boxes(points, flatten_maps(outputs.maps["reg"], 4) * priors.strides[:, None])
        positive, negative, center, mass = torch.zeros(()), torch.zeros(()), torch.zeros(()), torch.zeros(())
        for n, target in enumerate(targets):
            weights = torch.zeros(())
            factors = torch.ones(len(points), 3)
            best = box_iou(boxes[n].detach(), target.boxes).amax(dim=1) if len(target) else None
            for box, k in zip(target.boxes, target.labels.tolist()):
                inside = [p for p, (x, y) in enumerate(points.tolist()) if box[0] < x < box[2] and box[1] < y < box[3]]
                own, top, bottom = [], torch.zeros(()), torch.zeros(())
                for p in inside:
                    away = (points[p] - (box[:2] + box[2:]) / 2) / priors.strides[p] - head.center[k]
                    own.append(torch.exp(-(away**2) / (2 * head.width[k] ** 2)).prod())
                    iou = generalized_box_iou(boxes[n, p, None], box[None])[0, 0]
                    likelihood = scores[n, p, k] * torch.exp(-5 * (1 - iou))
                    top = top + likelihood * torch.exp(3 * likelihood) * own[-1]
                    bottom = bottom + torch.exp(3 * likelihood) * own[-1]
                weights = weights + sum(own)
                positive = positive + log_loss(top / bottom)
                fit = [1 / (1 - float(best[p])) for p in inside]
                for p, value in zip(inside, fit):
                    factors[p, k] = 1 - (value - min(fit)) / (max(fit) - min(fit))
            p = scores[n] * factors
            negative = negative + (p**2 * log_loss(1 - p)).sum()
            mass = mass + weights
            center = center + (len(target) / weights if len(target) else 0)
        assert torch.allclose(losses["loss_positive"], positive / 4, rtol=1e-8)
        assert torch.allclose(losses["loss_negative"], negative / mass.detach().clamp(min=1), rtol=1e-7)
        assert torch.allclose(losses["loss_center"], center / 3, rtol=1e-8)
        parameters = [head.center, head.width, head.reg.weight, head.cls.weight]
        ours = torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True)
        theirs = torch.autograd.grad(
            positive / 4 + negative / mass.detach().clamp(min=1) + center / 3, parameters, retain_graph=True
        )
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-10) for a, b in zip(ours, theirs))


def test_an_instance_without_a_point_costs_100() -> None:
    head = AutoAssignHead(Levels((32,), (8,)), 2, convs=1)
    losses = head.loss(head([torch.randn(1, 32, 4, 4)]), [objects([[1, 1, 3, 3]])])
    assert float(losses["loss_positive"].detach()) == pytest.approx(100)
    assert float(losses["loss_center"].detach()) == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (YOLOFHead, {"topk": 0}, "topk=0"),
        (YOLOFHead, {"scales": ()}, "scales="),
        (YOLOFHead, {"most_shift": 0.0}, "most_shift=0.0"),
        (AutoAssignHead, {"box_weight": -1.0}, "box_weight=-1.0"),
        (AutoAssignHead, {"center_weight": -1.0}, "center_weight=-1.0"),
        (GFLHead, {"beta": -1.0}, "beta=-1.0"),
        (TOODHead, {"beta": -1.0}, "beta=-1.0"),
    ],
)
def test_wrong_options_are_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(Levels((32,), (32,)), 3, **options)


# -- detectors


@pytest.mark.parametrize(
    ("name", "count"),
    [("yolof_r50", 43_934_633), ("autoassign_r50", 36_201_114)],
)
def test_parameters(name: str, count: int) -> None:
    """The counts follow from the structure: AutoAssign has FCOS's head of biases and 320 numbers more."""
    with torch.device("meta"):
        model = create_model(name, "model.backbone.pretrained=false")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


SMALL = ["model.backbone.name=test_resnet", "model.backbone.pretrained=false", "model.head.convs=1"]
DETECTORS = ["freeanchor", "foveabox", "fsaf", "autoassign", "yolof"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        *((name, ()) for name in DETECTORS),
        ("foveabox", ("model.head.align=true",)),
        pytest.param("freeanchor", ("model.neck=[fpn,dyhead]",), marks=pytest.mark.soak),
        ("fsaf", ("model.neck=nas_fpn",)),
        ("autoassign", ("test.soft_nms=linear", "test.max_det=10")),
    ],
)
def test_detection_exports(name: str, overrides: tuple[str, ...]) -> None:
    model = prepare_for_inference(create_model(f"{name}_r18", *SMALL, "model.pyramid.channels=32", *overrides))
    model.head.cls.bias.data += 3
    images, others, sizes = batch(objects([])).images, batch(objects([])).images, torch.tensor([[64, 96]])
    detections = check_export(Call(model, detect), (images, sizes), (others, sizes))
    assert int(detections[3]) > 0
