"""The RPN: loss and proposals against plain loops, and refused options."""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from fakes import maps, objects
from fusedet.errors import InputError
from fusedet.models.heads import RPNHead
from fusedet.models.ops.boxes import MAX_RATIO
from fusedet.types import Levels, Outputs, Target

LEVELS = Levels((8,) * 3, (4, 8, 16))
ALL = 10**6


EMPTY = objects([])
SOME = objects([[4, 4, 36, 30], [10, 20, 60, 64], [70, 3, 90, 13]], [0, 2, 1])
SIZES = torch.tensor([[64, 96], [50, 77]])


def varied(**options: object) -> RPNHead:
    """A head whose scores and boxes differ from cell to cell."""
    head = RPNHead(LEVELS, **options)
    for layer in (head.cls, head.reg):
        torch.nn.init.normal_(layer.weight, std=1.0)
    return head


def test_maps_and_initialization() -> None:
    head = RPNHead(LEVELS, num_classes=7)
    assert head.num_classes == 1
    outputs = head(maps(LEVELS))
    assert [m.shape for m in outputs.maps["cls"]] == [(2, 3, 16, 24), (2, 3, 8, 12), (2, 3, 4, 6)]
    assert [m.shape for m in outputs.maps["reg"]] == [(2, 12, 16, 24), (2, 12, 8, 12), (2, 12, 4, 6)]
    assert sum(p.numel() for p in RPNHead(Levels((256,) * 5, (4, 8, 16, 32, 64))).parameters()) == 593_935
    boxes = outputs.priors.boxes[:3]  # around the origin, sides of 8 strides, ratios of height to width 1/2, 1, 2
    assert torch.allclose((boxes[:, 3] - boxes[:, 1]) / (boxes[:, 2] - boxes[:, 0]), torch.tensor([0.5, 1, 2]))
    assert torch.allclose((boxes[:, 2:] - boxes[:, :2]).prod(dim=1), torch.tensor(32.0**2))


def test_rounded_anchors_against_torchvision() -> None:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    theirs = AnchorGenerator(((32,), (64,), (128,)), ((0.5, 1.0, 2.0),) * 3)
    assert torch.equal(RPNHead(LEVELS, round_anchors=True).shapes, torch.stack(theirs.cell_anchors))


def literal_loss(outputs: Outputs, targets: list[Target], beta: float | None = None) -> tuple[float, float]:
    """Both losses when every anchor is sampled, anchor by anchor in float64."""
    rows = [[m.detach() for m in outputs.maps[k]] for k in ("cls", "reg")]
    cls, reg = (
        torch.cat([m.permute(0, 2, 3, 1).reshape(len(m), -1, w) for m in r], 1).double() for r, w in zip(rows, (1, 4))
    )
    total_cls = total_box = count = 0.0
    for i, target in enumerate(targets):
        anchors = outputs.priors.boxes.double()
        overlap = box_iou(outputs.priors.boxes, target.boxes)
        positives = negatives = 0
        for p in range(len(anchors)):
            instance = -1
            best = float(overlap[p].max()) if len(target) else 0.0
            if best >= 0.7:
                instance = int(overlap[p].argmax())
            for g in range(len(target)):
                peak = overlap[:, g].max()
                if overlap[p, g] == peak and peak >= 0.3:
                    instance = g
            if instance < 0 and best >= 0.3:
                continue
            x = float(cls[i, p, 0])
            total_cls += math.log1p(math.exp(-x)) if instance >= 0 else math.log1p(math.exp(x))
            positives, negatives = positives + (instance >= 0), negatives + (instance < 0)
            if instance >= 0:
                (ax1, ay1, ax2, ay2), (gx1, gy1, gx2, gy2) = anchors[p].tolist(), target.boxes[instance].tolist()
                w, h = ax2 - ax1, ay2 - ay1
                deltas = [
                    (gx1 + gx2 - ax1 - ax2) / 2 / w,
                    (gy1 + gy2 - ay1 - ay2) / 2 / h,
                    math.log((gx2 - gx1) / w),
                    math.log((gy2 - gy1) / h),
                ]
                for a, b in zip(deltas, reg[i, p].tolist()):
                    d = abs(a - b)
                    total_box += d if beta is None else d * d / (2 * beta) if d < beta else d - beta / 2
        count += max(positives, 1) + max(negatives, 1)
    return total_cls / count, total_box / count


@pytest.mark.parametrize(
    ("targets", "loss"), [([SOME, EMPTY], "l1"), ([SOME, SOME], "smooth_l1"), ([EMPTY, EMPTY], "l1")]
)
def test_loss_against_a_loop(targets: list[Target], loss: str) -> None:
    head = varied(num=ALL, loss=loss)
    outputs = head(maps(LEVELS, (40, 56)))
    losses = head.loss(outputs, targets)
    cls, box = literal_loss(outputs, targets, 1 / 9 if loss == "smooth_l1" else None)
    assert float(losses["loss_rpn_cls"].detach()) == pytest.approx(cls, rel=1e-4)
    assert float(losses["loss_rpn_box"].detach()) == pytest.approx(box, rel=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_all_parameters_have_gradients_and_the_seed_determines_samples() -> None:
    head = varied(num=8)
    outputs = head(maps(LEVELS))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(head.loss(outputs, [SOME, EMPTY]))
    assert torch.equal(losses[0]["loss_rpn_cls"], losses[1]["loss_rpn_cls"])
    assert not torch.equal(losses[0]["loss_rpn_cls"], losses[2]["loss_rpn_cls"])
    sum(losses[0].values()).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in head.parameters())


def literal_proposals(head: RPNHead, outputs: Outputs, sizes: Tensor, pre_nms: int, limit: int) -> list[list[tuple]]:
    """Box by box: per level the best, decoded, clipped, after NMS; then the best of all levels."""
    results = []
    starts = [sum(outputs.priors.counts[:i]) for i in range(len(outputs.priors.counts))]
    for i in range(len(sizes)):
        kept: list[tuple] = []
        height, width = sizes[i].tolist()
        for level, start in enumerate(starts):
            scores = outputs.maps["cls"][level][i].permute(1, 2, 0).flatten().sigmoid()
            deltas = outputs.maps["reg"][level][i].permute(1, 2, 0).reshape(-1, 4)
            alive: list[tuple] = []
            for p in sorted(range(len(scores)), key=lambda p: -float(scores[p]))[:pre_nms]:
                x1, y1, x2, y2 = outputs.priors.boxes[start + p].tolist()
                dx, dy, dw, dh = deltas[p].tolist()
                w, h = x2 - x1, y2 - y1
                x, y = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
                w, h = (s * math.exp(min(max(d, -MAX_RATIO), MAX_RATIO)) for s, d in ((w, dw), (h, dh)))
                box = [
                    min(max(v, 0), m)
                    for v, m in ((x - w / 2, width), (y - h / 2, height), (x + w / 2, width), (y + h / 2, height))
                ]
                if box[2] <= box[0] or box[3] <= box[1]:
                    continue
                if all(float(box_iou(torch.tensor([box]), torch.tensor([other]))) <= head.nms for _, other in alive):
                    alive.append((float(scores[p]), box))
            kept += alive
        results.append(sorted(kept, key=lambda k: -k[0])[:limit])
    return results


def test_proposals_against_a_loop() -> None:
    head = varied(proposals=40)
    with torch.no_grad():
        outputs = head(maps(LEVELS, (40, 56)))
    sizes = torch.tensor([[40, 56], [20, 25]])
    proposals = head.propose(outputs, sizes, pre_nms=60)
    for i, wanted in enumerate(literal_proposals(head, outputs, sizes, 60, 40)):
        n = int(proposals.counts[i])
        assert n == len(wanted)
        assert torch.allclose(proposals.scores[i, :n], torch.tensor([score for score, _ in wanted]))
        assert torch.allclose(proposals.boxes[i, :n], torch.tensor([box for _, box in wanted]), atol=1e-3)
        assert not proposals.boxes[i, n:].any()
        assert not proposals.scores[i, n:].any()
    assert not proposals.boxes.requires_grad


def test_training_has_its_own_limits() -> None:
    head = varied(proposals=5, train_proposals=70, train_pre_nms=30)
    outputs = head(maps(LEVELS))
    assert head.propose(outputs, SIZES).boxes.shape == (2, 5, 4)
    assert head.propose(outputs, SIZES, to_train=True).boxes.shape == (2, 70, 4)
    assert head.propose(outputs, SIZES, pre_nms=1).counts.tolist() == [3, 3]  # one of each level


@pytest.mark.parametrize("size", [(33, 47), (4, 4)])
def test_tiny_images(size: tuple[int, int]) -> None:
    head = RPNHead(LEVELS)
    outputs = head(maps(LEVELS, size))
    proposals = head.propose(outputs, torch.tensor([size] * 2))
    assert (proposals.counts > 0).all()
    assert proposals.boxes.amin() >= 0
    assert (proposals.boxes[..., 2] <= size[1]).all()
    assert head.decode(outputs).scores.shape == (2, len(outputs.priors), 1)


def test_bad_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"leave model\.interact null"):
        RPNHead(LEVELS, interact=lambda channels: None)
    for options in ({"proposals": 0}, {"ratios": ()}, {"convs": 0}, {"num": 0}, {"fraction": 1.5}):
        with pytest.raises(InputError):
            RPNHead(LEVELS, **options)
