"""The heads built on ATSS: assignments against plain loops, losses against their equations, and parameter counts."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, deform_conv2d

from fusedet.models.detectors import create_model
from fusedet.models.heads import DDODHead, PAAHead, TOODHead
from fusedet.models.heads.task_decomposition import sample_boxes
from fusedet.models.ops.boxes import grid_priors, make_base_points
from fusedet.models.ops.losses import sigmoid_focal_loss
from fusedet.models.ops.paa import select_low_costs, separate_positives
from fusedet.models.ops.quality_losses import (
    focal_loss_of_scores,
    quality_focal_loss,
    quality_focal_loss_of_scores,
)
from fusedet.models.ops.regression_losses import distribution_focal_loss
from fusedet.models.ops.task_aligned import TaskAlignedAssigner
from fusedet.models.protocols import EpochDependent, SelectingHead
from fusedet.types import Candidates, Levels, Priors, Target

LEVELS = Levels((32, 32), (8, 16))
COUNTS = {
    "atss_r50": 32_069_978,
    "atss_r101": 51_062_106,
    "paa_r50": 32_069_978,
    "paa_r101": 51_062_106,
    "gfl_r50": 32_215_193,
    "gfl_r101": 51_207_321,
    "gflv2_r50": 32_216_602,
    "ddod_r50": 32_152_958,
    "tood_r50": 31_975_150,
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n.endswith("r101") else n for n in COUNTS])
def test_trainable_parameters(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, "model.backbone.pretrained=false")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == COUNTS[name]


# -- PAA


def slow_selection(costs: list[float]) -> list[bool]:
    """Fit the mixture by a loop over numbers, and keep what figure 3c of the paper keeps."""
    means, variances, weights = [costs[0], costs[-1]], [1.0, 1.0], [0.5, 0.5]

    def joint(x: float) -> list[float]:
        return [
            w * math.exp(-((x - m) ** 2) / (2 * v)) / math.sqrt(2 * math.pi * v)
            for w, m, v in zip(weights, means, variances)
        ]

    before = -math.inf
    for _ in range(100):
        shares = [[d / sum(joint(x)) for d in joint(x)] for x in costs]
        likelihood = sum(math.log(sum(joint(x))) for x in costs) / len(costs)
        for k in (0, 1):
            total = sum(s[k] for s in shares) + 10 * 2.220446049250313e-16
            means[k] = sum(s[k] * x for s, x in zip(shares, costs)) / total
            variances[k] = sum(s[k] * (x - means[k]) ** 2 for s, x in zip(shares, costs)) / total + 1e-6
            weights[k] = total / len(costs)
        if abs(likelihood - before) < 1e-3:
            break
        before = likelihood
    first = [i for i, x in enumerate(costs) if joint(x)[0] >= joint(x)[1]]
    peak = max(first, key=lambda i: (sum(joint(costs[i])), -i), default=-1)
    return [i in first and i <= peak for i in range(len(costs))]


@pytest.mark.parametrize("seed", range(4))
def test_mixture_against_a_loop(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = [
        torch.cat([0.5 + 0.1 * torch.randn(n, generator=draw), 2 + 0.5 * torch.randn(n + 3, generator=draw)])
        for n in (2, 5, 9)
    ]
    rows = [row.double().sort().values for row in rows]
    table = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=math.inf)
    for kept, row in zip(select_low_costs(table), rows):
        assert kept[: len(row)].tolist() == slow_selection(row.tolist())
        assert not kept[len(row) :].any()


def test_an_instance_needs_two_candidates() -> None:
    assert (
        select_low_costs(torch.tensor([[0.3, math.inf], [math.inf, math.inf]]).double()).tolist() == [[False] * 2] * 2
    )
    assert select_low_costs(torch.zeros(0, 3).double()).shape == (0, 3)


def test_positives_by_hand() -> None:
    """Two levels of four priors; of three candidates per level, the three low costs are kept."""
    priors = Priors(torch.zeros(8, 4), torch.full((8,), 8.0), (4, 4))
    assigned = torch.tensor([[0, 0, 0, 0, 0, 0, -1, -2]])
    costs = torch.tensor([[0.1, 5.0, 0.12, 5.1, 0.11, 4.9, 0.0, 0.0]])
    target = Target(torch.tensor([[0.0, 0, 9, 9]]), torch.tensor([0]))
    result = separate_positives(assigned, costs, priors, [target], topk=3)
    order = sorted([0.1, 5.0, 0.12, 0.11, 4.9])
    kept = {cost for cost, keep in zip(order, slow_selection(order)) if keep}
    assert {round(float(c), 2) for c in costs[0][result[0] == 0]} == kept
    assert kept
    assert kept <= {0.1, 0.11, 0.12}
    assert result[0, 6:].tolist() == [-1, -2]


def test_voting_by_hand() -> None:
    head = PAAHead(LEVELS, 2, convs=0, norm=False)
    assert isinstance(head, SelectingHead)
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [40, 40, 50, 50]]])
    scores = torch.tensor([[[0.9, 0.0], [0.6, 0.0], [0.0, 0.5]]])
    chosen = head.select(Candidates(boxes, scores), torch.tensor([[64, 64]]), (3,), iou=0.5)
    assert chosen.counts.tolist() == [2]
    weight = 0.6 * math.exp(-((1 - 0.9) ** 2) / 0.025)
    height = (0.9 * 10 + weight * 9) / (0.9 + weight)
    assert torch.allclose(chosen.boxes[0, 0], torch.tensor([0, 0, 10, height]))
    assert torch.allclose(chosen.boxes[0, 1], boxes[0, 2])
    plain = PAAHead(LEVELS, 2, convs=0, norm=False, voting=False)
    chosen = plain.select(Candidates(boxes, scores), torch.tensor([[64, 64]]), (3,), iou=0.5)
    assert torch.equal(chosen.boxes[0, :2], boxes[0, [0, 2]])


# -- TOOD


def slow_alignment(
    rule: TaskAlignedAssigner, scores: Tensor, boxes: Tensor, priors: Priors, target: Target
) -> tuple[list[int], list[float]]:
    ious = box_iou(boxes, target.boxes)
    claims: list[tuple[int, int]] = []
    metrics = scores[:, target.labels] ** rule.alpha * ious**rule.beta
    for g, (x1, y1, x2, y2) in enumerate(target.boxes.tolist()):
        order = sorted(range(len(priors)), key=lambda p: -float(metrics[p, g]))
        for p in order[: rule.topk]:
            x, y = ((priors.boxes[p, :2] + priors.boxes[p, 2:]) / 2).tolist()
            if metrics[p, g] > 0 and min(x - x1, y - y1, x2 - x, y2 - y) > 0.01:
                claims.append((p, g))
    assigned, quality = [-1] * len(priors), [0.0] * len(priors)
    for p in {p for p, _ in claims}:
        assigned[p] = max((g for q, g in claims if q == p), key=lambda g: (float(ious[p, g]), -g))
    for g in range(len(target)):
        own = [p for p, a in enumerate(assigned) if a == g]
        for p in own:
            quality[p] = float(metrics[p, g] / (metrics[own, g].max() + 1e-7) * ious[own, g].max())
    return assigned, quality


@pytest.mark.parametrize("seed", range(4))
def test_task_alignment_against_a_loop(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    features = [torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 4, 4)]
    priors = grid_priors(features, Levels((1, 1), (8, 16)), [make_base_points(s, 8.0) for s in (8, 16)])
    priors = Priors(priors.boxes.double(), priors.strides, priors.counts)
    corner = 40 * torch.rand(5, 2, generator=draw).double()
    target = Target(torch.cat([corner, corner + 12 + 20 * torch.rand(5, 2, generator=draw)], 1), torch.arange(5) % 3)
    scores = torch.rand(len(priors), 3, generator=draw).double()
    boxes = priors.boxes / 2 + 16 + 4 * torch.rand(len(priors), 4, generator=draw)
    rule = TaskAlignedAssigner(topk=6, beta=2.0)
    valid = torch.ones(len(priors), dtype=torch.bool)
    (assigned,), (quality,) = rule.assign_predictions(scores[None], boxes[None], priors, [target], valid[None])
    expected = slow_alignment(rule, scores, boxes, priors, target)
    assert assigned.tolist() == expected[0]
    assert quality.tolist() == pytest.approx(expected[1], abs=1e-9)
    assert max(expected[0]) >= 0
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    none, zero = rule.assign_predictions(scores[None], boxes[None], priors, [empty], ~valid[None])
    assert set(none[0].tolist()) == {-2}
    assert not zero.any()


def test_sampling_of_boxes_is_a_deformable_convolution() -> None:
    corner = torch.rand(2, 2, 5, 7).double()
    boxes = torch.cat([corner, corner + 3 + torch.rand(2, 2, 5, 7)], dim=1)
    offsets = torch.randn(2, 8, 5, 7).double()
    expected = deform_conv2d(boxes, offsets, torch.ones(4, 1, 1, 1).double())
    crossed = (expected[:, :2] > expected[:, 2:]).any(dim=1, keepdim=True)
    assert 0 < crossed.sum() < crossed.numel()
    assert torch.allclose(sample_boxes(boxes, offsets), torch.where(crossed, boxes, expected))


def test_tood_depends_on_the_epoch() -> None:
    head = TOODHead(LEVELS, 2, convs=1, initial_epochs=1)
    assert isinstance(head, EpochDependent)
    outputs = head([torch.randn(1, 32, 8, 8), torch.randn(1, 32, 4, 4)])
    target = Target(torch.tensor([[4.0, 4, 40, 44]]), torch.tensor([1]))
    first = head.loss(outputs, [target])
    head.set_epoch(1)
    assert float(head.loss(outputs, [target])["loss_cls"].detach()) != float(first["loss_cls"].detach())


# -- losses


def test_quality_focal_loss_against_its_equation() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    counted = torch.tensor([True, True, True, True, False, True])
    rows, labels, quality = torch.tensor([1, 3]), torch.tensor([2, 0]), torch.tensor([0.7, 0.2]).double()
    target = torch.zeros(6, 3).double()
    target[rows, labels] = quality
    p = logits.sigmoid()
    cost = (target - p).abs() ** 2 * F.binary_cross_entropy(p, target, reduction="none")
    expected = (cost * counted[:, None]).sum()
    (gradient,) = torch.autograd.grad(expected, logits, retain_graph=True)
    for loss in (
        quality_focal_loss(logits, counted, rows, labels, quality),
        quality_focal_loss_of_scores(p, counted, rows, labels, quality),
    ):
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert torch.allclose(torch.autograd.grad(loss, logits, retain_graph=True)[0], gradient, atol=1e-5)
    of_scores = focal_loss_of_scores(p, counted, rows, labels)
    assert float(of_scores.detach()) == pytest.approx(
        float(sigmoid_focal_loss(logits, counted, rows, labels).detach()), rel=1e-5
    )


def test_losses_of_scores_are_finite_at_the_ends() -> None:
    scores = torch.tensor([[0.0, 1.0]], requires_grad=True)
    rows, counted = torch.tensor([0]), torch.tensor([True])
    loss = quality_focal_loss_of_scores(scores, counted, rows, torch.tensor([0]), torch.tensor([0.5]))
    loss.backward()
    assert loss.isfinite()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()


def test_distribution_focal_loss_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.5, -0.3, 0.2]])
    costs = -logits.log_softmax(dim=1)[0]
    loss = distribution_focal_loss(logits, torch.tensor([1.25]))
    assert float(loss) == pytest.approx(float(0.75 * costs[1] + 0.25 * costs[2]), rel=1e-6)


def test_level_weights_by_hand() -> None:
    """Counts 4 and 1, then 5 and 3: the most positives weigh 1, the fewest 2. Without gradients nothing counts."""
    head = DDODHead(LEVELS, 2, convs=1)
    assigned = torch.tensor([[0, 0, 0, 1, 0, -1]])
    assert head.count_levels(assigned, (4, 2)).tolist() == pytest.approx([1] * 4 + [2] * 2)
    assert head.level_counts.tolist() == [4, 1]
    with torch.no_grad():
        head.count_levels(assigned, (4, 2))
    assert head.level_counts.tolist() == [4, 1]
    head.count_levels(torch.tensor([[-1, -1, 0, -2, 0, 0]]), (3, 3))
    assert head.level_counts.tolist() == [5, 3]
    assert "level_counts" in head.state_dict()
