"""BorderDet: BorderAlign against loops over borders and points, and the border losses and the fusion of predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, sigmoid_focal_loss

from fakes import maps, objects
from fusedet.errors import InputError
from fusedet.models.heads import BorderDetHead, FCOSHead
from fusedet.models.heads.border_module import BorderModule
from fusedet.models.ops.border_align import border_align
from fusedet.models.ops.exporting import exporting
from fusedet.models.ops.layers import flatten_maps
from fusedet.types import Levels, Target
from small import float64

LEVELS = Levels((32, 32), (8, 16))


def sample(table: Tensor, y: float, x: float) -> Tensor:
    """Values (C,) of a map (C, H, W) between cells."""
    height, width = table.shape[1:]
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = table[:, top, left] * (left + 1 - x) + table[:, top, right] * (x - left)
    lower = table[:, bottom, left] * (left + 1 - x) + table[:, bottom, right] * (x - left)
    return upper * (top + 1 - y) + lower * (y - top)


def slow_border_align(features: Tensor, boxes: Tensor, points: int, both_ends: bool) -> Tensor:
    n, channels, height, width = features.shape
    quarter = channels // 4
    rows = []
    for i in range(n):
        for box in boxes[i].tolist():
            x1, x2 = (min(max(x, 0.0), width - 1.0) for x in box[0::2])
            y1, y2 = (min(max(y, 0.0), height - 1.0) for y in box[1::2])
            values = []
            for border in range(4):
                table = features[i, border * quarter : (border + 1) * quarter]
                samples = []
                for k in range(points + both_ends):
                    along_x, along_y = x1 + k * (x2 - x1) / points, y1 + k * (y2 - y1) / points
                    place = ((x1, along_y), (along_x, y1), (x2, along_y), (along_x, y2))[border]
                    samples.append(sample(table, place[1], place[0]))
                values.append(torch.stack(samples).amax(dim=0))
            rows.append(torch.cat(values))
    return torch.stack(rows).view(n, -1, channels).mT


def random_boxes(n: int, count: int, height: int, width: int) -> Tensor:
    """Boxes inside and beyond the map, one without area, one in the corner."""
    corner = torch.rand(n, count, 2) * torch.tensor([width, height])
    boxes = torch.cat([corner - 2 * torch.rand(n, count, 2), corner + 3 * torch.rand(n, count, 2)], dim=2)
    boxes[:, 0, 2:] = boxes[:, 0, :2]
    boxes[:, 1] = torch.tensor([width - 1.0, height - 1.0] * 2)
    return boxes


@pytest.mark.parametrize(("points", "both_ends"), [(10, False), (10, True), (1, False), (3, True)])
def test_border_align_is_a_loop_over_points(points: int, both_ends: bool) -> None:
    torch.manual_seed(0)
    with float64():
        features, boxes = torch.randn(2, 12, 5, 7, requires_grad=True), random_boxes(2, 9, 5, 7)
        pooled = border_align(features, boxes, points, both_ends)
        expected = slow_border_align(features, boxes, points, both_ends)
        assert torch.allclose(pooled, expected, rtol=1e-12, atol=1e-12)
        weights = torch.randn_like(pooled)
        ours, theirs = (
            torch.autograd.grad((x * weights).sum(), features, retain_graph=True)[0] for x in (pooled, expected)
        )
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
        with exporting():
            exported = border_align(features, boxes, points, both_ends)
        assert torch.allclose(exported, expected, rtol=1e-9, atol=1e-9)


def test_border_align_gradient_is_the_numerical_one() -> None:
    with float64():
        torch.manual_seed(1)
        boxes = random_boxes(1, 6, 4, 5)
        assert torch.autograd.gradcheck(
            lambda x: border_align(x, boxes, 4), torch.randn(1, 8, 4, 5, requires_grad=True)
        )


def test_border_align_by_hand() -> None:
    """Each border's channel holds a peak on one side only of a box from (1, 1) to (5, 3)."""
    features = torch.zeros(1, 4, 5, 8)
    for channel, (y, x) in enumerate(((2, 1), (1, 3), (2, 5), (3, 3))):  # left, upper, right, lower
        features[0, channel, y, x] = 1 + channel
    box = torch.tensor([[[1.0, 1, 5, 3]]])
    assert border_align(features, box)[0, :, 0].tolist() == pytest.approx([1, 2, 3, 4])
    assert border_align(features.roll(1, dims=1), box)[0, :, 0].tolist() == pytest.approx([0, 0, 0, 0])
    corner = torch.zeros(1, 4, 5, 8)
    corner[..., 3, 5] = 1
    # the last point is 1/10 of the border away from the corner, 0.4 cells along x and 0.2 along y
    assert border_align(corner, box)[0, :, 0].tolist() == pytest.approx([0, 0, 0.8, 0.6])
    assert border_align(corner, box, both_ends=True)[0, :, 0].tolist() == pytest.approx([0, 0, 1, 1])


def test_module_is_its_literal_form() -> None:
    torch.manual_seed(0)
    with float64():
        module = BorderModule(6, 4, 10, False)
        feature, boxes = torch.randn(2, 6, 3, 5), torch.rand(2, 4, 3, 5) * 3
        boxes[:, 2:] += boxes[:, :2]
        split = F.relu(F.instance_norm(module.expand(feature))).split(4, dim=1)
        pooled = slow_border_align(torch.cat(split[1:], dim=1), boxes.flatten(2).mT, 10, False)
        joined = torch.cat([split[0], pooled.view(2, 16, 3, 5)], dim=1)
        assert torch.allclose(module(feature, boxes), F.relu(module.join(joined)), rtol=1e-9, atol=1e-12)
        assert module(feature[..., :1, :1], boxes[..., :1, :1]).isfinite().all()


def test_losses_and_fusion_are_their_literal_form() -> None:
    torch.manual_seed(2)
    with float64():
        head = BorderDetHead(LEVELS, 3, convs=1, positive=0.3)
        for p in head.parameters():
            p.data.add_(0.05 * torch.randn_like(p))
        outputs = head.double()(maps(LEVELS, n=2, dtype=torch.float64))
        targets = [objects([[4, 4, 40, 44], [10, 12, 30, 30]], [0, 1]), objects([])]
        targets = [Target(t.boxes.double(), t.labels) for t in targets]
        coarse = FCOSHead.decode(head, outputs)
        # an instance on a predicted box, and one near another, so that there are border positives
        refined = coarse.boxes[0].detach()[[17, 40]] + torch.tensor([[0.0, 0, 0, 0], [-0.5, -0.5, 1, 1]])
        targets[0] = Target(torch.cat([targets[0].boxes, refined]), torch.tensor([0, 1, 2, 0]))
        losses = head.loss(outputs, targets)
        assert {k: float(v.detach()) for k, v in FCOSHead.loss(head, outputs, targets).items()} == pytest.approx(
            {k: float(losses[k].detach()) for k in ("loss_cls", "loss_box", "loss_centerness")}
        )
        logits, shifts = flatten_maps(outputs.maps["border_cls"], 3), flatten_maps(outputs.maps["border_reg"], 4)
        one_hot, total, count = torch.zeros_like(logits), torch.zeros(()), 0
        for n, target in enumerate(targets):
            for p, (x1, y1, x2, y2) in enumerate(coarse.boxes[n].tolist()):
                ious = [float(box_iou(coarse.boxes[n, p, None].detach(), box[None])) for box in target.boxes]
                if max(ious, default=0) < 0.3:
                    continue
                g = ious.index(max(ious))
                count += 1
                one_hot[n, p, target.labels[g]] = 1
                for side, (a, b, size) in enumerate(
                    zip(target.boxes[g].tolist(), (x1, y1, x2, y2), (x2 - x1, y2 - y1) * 2)
                ):
                    total = total + (shifts[n, p, side] - (a - b) / (0.5 * size)).abs()
        assert count > 2
        assert torch.allclose(losses["loss_border_box"], total / count, rtol=1e-9)
        focal = sigmoid_focal_loss(logits, one_hot, 0.25, 2.0, "sum") / count
        assert torch.allclose(losses["loss_border_cls"], focal, rtol=1e-9)
        boxes, scores, quality = head.decode(outputs)
        size = (coarse.boxes[..., 2:] - coarse.boxes[..., :2]).repeat(1, 1, 2)
        assert torch.allclose(boxes, coarse.boxes + 0.5 * shifts * size)
        assert torch.allclose(scores**4, coarse.scores * coarse.quality[..., None] * logits.sigmoid() ** 2)
        assert quality is None


def test_border_losses_do_not_reach_the_coarse_boxes() -> None:
    """The box is a constant for its border's features and targets, as in the authors' code."""
    head = BorderDetHead(LEVELS, 3, convs=1)
    losses = head.loss(head(maps(LEVELS, n=1)), [objects([[4, 4, 40, 44]])])
    border = losses["loss_border_cls"] + losses["loss_border_box"]
    (gradient,) = torch.autograd.grad(border, [head.reg.weight], retain_graph=True, materialize_grads=True)
    assert not gradient.any()
    tower = torch.autograd.grad(border, [head.towers.cls[0].weight])[0]
    assert tower.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 0}, "points=0"),
        ({"points": 256}, "points=256 must be 1 to 255"),
        ({"cls_border_channels": 0}, "cls_border_channels=0"),
        ({"positive": 1.5}, "positive=1.5"),
        ({"std": 0.0}, "std=0.0"),
        ({"border_box_weight": -1.0}, "border_box_weight=-1.0"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BorderDetHead(LEVELS, 3, **options)
