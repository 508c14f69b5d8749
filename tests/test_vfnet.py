"""VFNet's head, ATSS and the varifocal loss: by hand, against plain loops, export and half precision."""

import math
import re
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import box_iou

import fakes
from fakes import Call, LargestTensor, many, maps, objects
from fusedet.models.detectors import create_model
from fusedet.models.heads import VFNetHead
from fusedet.models.ops import atss
from fusedet.models.ops.assigners import BACKGROUND
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import aligned_iou, box_centers, grid_priors, make_base_points
from fusedet.models.ops.deformable import DeformConv, DeformPack
from fusedet.models.ops.quality_losses import varifocal_loss
from fusedet.types import Levels, Outputs, Priors, Target

LEVELS = Levels((32,) * 5, (8, 16, 32, 64, 128))


EMPTY = objects([])
SOME = objects([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2])


def make(**options: object) -> VFNetHead:
    return VFNetHead(LEVELS, 3, convs=1, **options)


def grid(*cells: tuple[int, int], scale: float = 8.0, first: int = 8) -> Priors:
    """Squares of `scale` strides on levels of so many cells (rows, columns), the finest of stride `first`."""
    strides = tuple(first * 2**i for i in range(len(cells)))
    shapes = [make_base_points(s, scale) for s in strides]
    return grid_priors([torch.zeros(1, 1, *c) for c in cells], Levels((1,) * len(cells), strides), shapes)


# -- overlap


def test_aligned_iou() -> None:
    a = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 1, 1], [5, 5, 5, 5.0]])
    b = torch.tensor([[0, 0, 10, 10], [5, 0, 15, 10], [2, 2, 3, 3], [5, 5, 5, 5.0]])
    assert torch.allclose(aligned_iou(a, b), torch.tensor([1, 1 / 3, 0, 0]))
    a, b = many(7, 50, 50).boxes, many(5, 50, 50).boxes
    assert torch.allclose(aligned_iou(a[:, None], b), box_iou(a, b), atol=1e-6)


# -- ATSS


def test_atss_table() -> None:
    """A row of 4 squares of 16 at x = 0, 8, 16, 24 and one of 2 squares of 32 at 0, 16; an instance at 5..21, -8..8.

    Its three nearest squares of the first level have IoU 11/21, 13/19 and 5/27, both of the second 176/1104 and 1/4:
    mean 0.3605, deviation 0.2317, so that only the one of 13/19 = 0.684 is above 0.592.
    """
    priors = grid((1, 4), (1, 2), scale=2.0)
    assert ATSSAssigner(topk=3).assign(priors, objects([[5, -8, 21, 8]])).tolist() == [-1, -1, 0, -1, -1, -1]
    # with the population's deviation, 0.2073, nothing else would pass either; without a deviation, 11/21 would


def test_atss_deviation_is_unbiased() -> None:
    """Two candidates: mean + unbiased deviation is above both; with the biased one the best would reach it."""
    assert ATSSAssigner().assign(grid((1, 2), scale=2.0), objects([[-8, -8, 7, 8]])).tolist() == [BACKGROUND] * 2


def test_atss_takes_priors_whose_centers_lie_inside() -> None:
    """A single candidate has its own IoU as threshold, so that only its center decides: over 0.01 pixels inside."""
    priors = grid((1, 1), scale=2.0)
    assert ATSSAssigner().assign(priors, objects([[0, -8, 16, 8]])).tolist() == [BACKGROUND]
    assert ATSSAssigner().assign(priors, objects([[-0.009, -8, 16, 8]])).tolist() == [BACKGROUND]
    assert ATSSAssigner().assign(priors, objects([[-0.011, -8, 16, 8]])).tolist() == [0]


def test_atss_resolves_conflicts_by_iou_then_by_order() -> None:
    priors = grid((1, 1), scale=2.0)
    small, exact = [-4, -4, 4, 4], [-8, -8, 8, 8]
    assert ATSSAssigner().assign(priors, objects([small, exact, exact])).tolist() == [1]
    assert ATSSAssigner().assign(priors, objects([exact, small])).tolist() == [0]


def test_atss_without_instances() -> None:
    assert ATSSAssigner().assign(grid((4, 4), (2, 2)), EMPTY).tolist() == [BACKGROUND] * 20


def slow(rule: ATSSAssigner, priors: Priors, target: Target) -> list[int]:
    """Algorithm 1, one object and one prior at a time, in double precision."""
    boxes, truth = priors.boxes.double(), target.boxes.double()
    overlap = box_iou(truth, boxes).tolist()
    assigned, best = [BACKGROUND] * len(boxes), [-1.0] * len(boxes)
    for g, (x1, y1, x2, y2) in enumerate(truth.tolist()):
        candidates: list[int] = []
        start = 0
        for count in priors.counts:
            middle = dict(zip(range(start, start + count), box_centers(boxes[start : start + count]).tolist()))
            nearest = sorted(middle, key=lambda p: math.dist(middle[p], ((x1 + x2) / 2, (y1 + y2) / 2)))
            candidates += nearest[: rule.topk]
            start += count
        values = [overlap[g][p] for p in candidates]
        threshold = statistics.mean(values) + statistics.stdev(values)
        for p in candidates:
            x, y = box_centers(boxes[p]).tolist()
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if overlap[g][p] >= threshold and inside and overlap[g][p] > best[p]:
                assigned[p], best[p] = g, overlap[g][p]
    return assigned


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 12), topk=st.sampled_from([1, 4, 9]))
def test_atss_against_the_algorithm(seed: int, count: int, topk: int) -> None:
    torch.manual_seed(seed)
    priors, target = grid((8, 9), (4, 5), (2, 3)), many(count, 60, 50)
    assert ATSSAssigner(topk).assign(priors, target).tolist() == slow(ATSSAssigner(topk), priors, target)


def test_atss_of_a_thousand_instances_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    priors = grid((100, 150), (50, 75), (25, 38), (13, 19), (7, 10))
    target = many(1000, 1200, 800)
    with LargestTensor() as largest:
        assigned = ATSSAssigner().assign(priors, target)
    assert largest.elements <= 64 * priors.counts[0] * 2  # the differences in x and y of 64 objects and one level
    assert 0 < int((assigned >= 0).sum()) < len(priors)
    monkeypatch.setattr(atss, "INSTANCES_AT_ONCE", 1000)
    assert torch.equal(assigned, ATSSAssigner().assign(priors, target))


# -- varifocal loss


@pytest.mark.parametrize(("alpha", "gamma"), [(0.75, 2.0), (1.0, 1.5), (0.3, 0.0)])
def test_varifocal_against_its_equation(alpha: float, gamma: float) -> None:
    """VFL(p, q) = -q (q log p + (1 - q) log(1 - p)) for q > 0, -alpha p^gamma log(1 - p) for q = 0, entry by entry."""
    logits = (torch.randn(20, 4) * 3).requires_grad_()
    rows, labels, quality = torch.tensor([3, 7, 19]), torch.tensor([0, 3, 2]), torch.tensor([0.9, 1e-6, 0.4])
    literal = logits.detach().double().requires_grad_()
    targets = {(r, k): q for r, k, q in zip(rows.tolist(), labels.tolist(), quality.double().tolist())}
    total = torch.zeros((), dtype=torch.float64)
    for r in range(20):
        for k in range(4):
            p, q = literal[r, k].sigmoid(), targets.get((r, k), 0.0)
            total = total - (q * (q * p.log() + (1 - q) * (1 - p).log()) if q > 0 else alpha * p**gamma * (1 - p).log())
    total.backward()
    loss = varifocal_loss(logits, rows, labels, quality, alpha, gamma)
    (2 * loss).backward()
    assert float(loss.detach()) == pytest.approx(total.item(), rel=1e-5)
    assert torch.allclose(logits.grad.double(), 2 * literal.grad, rtol=1e-4, atol=1e-5)


def test_varifocal_target_has_no_gradient_and_extremes_are_finite() -> None:
    logits = torch.tensor([[200.0, -200.0]], dtype=torch.bfloat16, requires_grad=True)
    quality = torch.tensor([0.5], requires_grad=True)
    loss = varifocal_loss(logits, torch.tensor([0]), torch.tensor([1]), quality)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.isfinite().all()
    assert quality.grad is None


# -- the head


def test_star_points_by_hand() -> None:
    """A box with distances 8, 16, 24 and 4 pixels is (1, 2, 3, 0.5) cells of stride 8."""
    box = torch.tensor([8.0, 16.0, 24.0, 4.0]).view(1, 4, 1, 1)
    offset = make().star_offsets(box, 8).view(9, 2)
    cells = torch.cartesian_prod(
        torch.arange(-1.0, 2.0), torch.arange(-1.0, 2.0)
    )  # where a 3x3 convolution looks: (dy, dx)
    star = torch.tensor([[y, x] for y in (-2.0, 0.0, 0.5) for x in (-1.0, 0.0, 3.0)])
    assert torch.allclose(cells + offset, star, atol=1e-5)


def test_star_convolution_samples_the_star_points() -> None:
    """On maps that hold their own rows and columns, the kernel's place k reads the coordinates of star point k."""
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    box = torch.tensor([8.0, 16.0, 24.0, 4.0]).view(1, 4, 1, 1).expand(1, 4, 9, 9)
    offset = make().star_offsets(box, 8)
    points = [(dy, dx) for dy in (-2.0, 0.0, 0.5) for dx in (-1.0, 0.0, 3.0)]
    star = DeformConv(1, 1)
    for k, (dy, dx) in enumerate(points):
        nn.init.zeros_(star.weight)
        star.weight.data.view(9)[k] = 1
        seen = [float(star(m[None, None], offset)[0, 0, 4, 4].detach()) for m in (y, x)]
        assert seen == pytest.approx([4 + dy, 4 + dx])


def test_box_receives_a_tenth_of_the_star_gradient() -> None:
    box = torch.rand(1, 4, 2, 2, requires_grad=True)
    make().star_offsets(box, 8).sum().backward()
    # left and upper sides stand in three points each with a minus, right and lower ones likewise without
    assert torch.allclose(
        box.grad, 0.1 * 3 / 8 * torch.tensor([-1.0, -1.0, 1.0, 1.0]).view(1, 4, 1, 1).expand(1, 4, 2, 2)
    )


@pytest.mark.parametrize(("norm", "unit"), [("reg_denom", 8), ("stride", 1)])
def test_units_of_the_distances(norm: str, unit: int) -> None:
    """With zero weights both boxes reach exactly one unit to every side, and every class has the score of the prior."""
    head = make(box_norm=norm, prior=0.02)
    for p in (*head.reg.parameters(), *head.refine.parameters(), head.cls.weight):
        nn.init.zeros_(p)
    outputs = head(maps(LEVELS))
    for name in ("reg", "refine"):
        for m, stride in zip(outputs.maps[name], LEVELS.strides):
            assert torch.equal(m, torch.full_like(m, unit * stride))
    boxes, scores, quality = head.decode(outputs)
    reach = unit * outputs.priors.strides[:, None] * torch.tensor([-1, -1, 1, 1])
    assert torch.allclose(boxes, (box_centers(outputs.priors.boxes).repeat(1, 2) + reach).expand_as(boxes))
    assert torch.allclose(scores, torch.tensor(0.02))
    assert quality is None


def test_decode_by_hand() -> None:
    """The second cell of stride 8 lies at (8, 0)."""
    levels = Levels((32,), (8,))
    distances = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0], [0.0, 4.0]]).view(1, 4, 1, 2)
    priors = grid((1, 2))
    outputs = Outputs(
        {"cls": [torch.zeros(1, 3, 1, 2)], "reg": [torch.ones(1, 4, 1, 2)], "refine": [distances]}, priors
    )
    boxes, scores, _ = VFNetHead(levels, 3).decode(outputs)
    assert boxes.tolist() == [[[0, 0, 0, 0], [7, -2, 11, 4]]]
    assert scores.unique().tolist() == [0.5]


def test_loss_against_a_loop() -> None:
    """The paper's loss, positive by positive in double precision, on an image with objects and one without."""
    head = make()
    outputs = head(maps(LEVELS))
    losses = head.loss(outputs, [SOME, EMPTY])
    assigned = head.assigner.assign(outputs.priors, SOME).tolist()
    rows = {
        name: torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in column], dim=1).double()
        for name, column in outputs.maps.items()
    }
    p = rows["cls"].sigmoid()
    cls = -(0.75 * p**2 * (1 - p).log()).sum()
    sums, weights = {"reg": 0.0, "refine": 0.0}, {"reg": 0.0, "refine": 0.0}
    for i, instance in enumerate(assigned):
        if instance < 0:
            continue
        (x, y), truth = box_centers(outputs.priors.boxes[i]).tolist(), SOME.boxes[instance].tolist()
        for name in ("reg", "refine"):
            left, up, right, down = rows[name][0, i].tolist()
            a = (x - left, y - up, x + right, y + down)
            shared = max(0, min(a[2], truth[2]) - max(a[0], truth[0])) * max(
                0, min(a[3], truth[3]) - max(a[1], truth[1])
            )
            union = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (a, truth)) - shared
            hull = (max(a[2], truth[2]) - min(a[0], truth[0])) * (max(a[3], truth[3]) - min(a[1], truth[1]))
            q = max(shared / union, 1e-6)
            sums[name] += q * (1 - shared / union + (hull - union) / hull)
            weights[name] += q
        k = int(SOME.labels[instance])
        pk = p[0, i, k]
        cls = cls + 0.75 * pk**2 * (1 - pk).log() - q * (q * pk.log() + (1 - q) * (1 - pk).log())
    count = sum(instance >= 0 for instance in assigned)
    assert count > 1
    assert float(losses["loss_cls"].detach()) == pytest.approx(float(cls.detach()) / count, rel=1e-4)
    assert float(losses["loss_box"].detach()) == pytest.approx(sums["reg"] / max(weights["reg"], 1), rel=1e-4)
    assert float(losses["loss_refine"].detach()) == pytest.approx(sums["refine"] / max(weights["refine"], 1), rel=1e-4)
    assert head.loss_weights == {"loss_cls": 1.0, "loss_box": 1.5, "loss_refine": 2.0}


def test_interaction_replaces_both_branches() -> None:
    assert fakes.swaps_branches(make, maps(LEVELS))


def test_bfloat16() -> None:
    """Under autocast, and with weights in bfloat16, boxes stay float32 and near those of float32."""
    head, features = make(deformable_last=True), maps(LEVELS)
    exact = head(features)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(features)
        losses = head.loss(outputs, [SOME, EMPTY])
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    low = make(deformable_last=True).to(torch.bfloat16)
    low.load_state_dict(head.state_dict())
    with torch.no_grad():
        for raw in (outputs, low([f.bfloat16() for f in features])):
            for name in ("reg", "refine"):
                assert all(m.dtype == torch.float32 for m in raw.maps[name])
                assert all(torch.allclose(a, b, rtol=0.1) for a, b in zip(raw.maps[name], exact.maps[name]))


@pytest.mark.slow
def test_exports() -> None:
    levels = Levels((32, 32), (16, 32))
    head = VFNetHead(levels, 3, convs=1, deformable_last=True).eval()
    decode = Call(head, lambda head, features: head.decode(head(features))[:2])
    fakes.check_export(decode, (maps(levels),), (maps(levels),))


def test_parameter_counts() -> None:
    """The head, and the detector with its frozen stem and first stage."""
    with torch.device("meta"):
        model = create_model("vfnet_r50", "model.backbone.pretrained=false")
    assert sum(p.numel() for p in model.head.parameters()) == 5_514_850
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32_666_210
    assert model.selection["iou"] == 0.6


@pytest.mark.parametrize("name", ["fcos_r18_dcn", "vfnet_r18_dcn", "vfnet_r50_dcn", "vfnet_r101_dcn"])
def test_deformable_configs(name: str) -> None:
    """Of every block in the last three stages the second convolution, and the last one of each tower."""
    with torch.device("meta"):
        model = create_model(name, "model.backbone.pretrained=false")
    layers = {key for key, m in model.named_modules() if isinstance(m, DeformPack)}
    own = {
        f"backbone.body.{key}"
        for key, _ in model.backbone.body.named_modules()
        if re.fullmatch(r"layer[234]\.\d+\.conv2", key)
    }
    assert len(own) == {"18": 6, "50": 13, "101": 30}[name.split("_r")[1].split("_")[0]]
    assert own == {key for key in layers if key.startswith("backbone")}
    assert len(layers - own) == 2
    assert all(m.modulated for m in model.modules() if isinstance(m, DeformPack))
