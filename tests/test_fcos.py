"""FCOS's head, its assigner and its losses, against hand-made tables and literal loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from fakes import Call, check_export, maps
from fusedet.models.detectors import create_model
from fusedet.models.heads import HEADS, FCOSHead
from fusedet.models.heads.fcos import centerness
from fusedet.models.necks import FPN
from fusedet.models.ops import assigners
from fusedet.models.ops.assigners import BACKGROUND, PointInBoxAssigner
from fusedet.models.ops.boxes import box_centers, boxes_to_distances, grid_priors, make_base_points, select_detections
from fusedet.models.ops.losses import giou_loss, iou_loss, mean_over_ranks
from fusedet.types import Levels, Outputs, Priors, Target

LEVELS = Levels((32,) * 5, (8, 16, 32, 64, 128))
TRICKS = {"center_sampling": True, "normalize_boxes": True, "centerness_on_box": True, "box_loss": "giou"}


def objects(*boxes: list[float], labels: list[int] | None = None) -> Target:
    return Target(
        torch.tensor(boxes, dtype=torch.float).reshape(-1, 4),
        torch.tensor(labels or [0] * len(boxes), dtype=torch.int64),
    )


def points(*levels: tuple[int, list[tuple[float, float]]]) -> Priors:
    """Priors at chosen points: (stride, [(x, y), ...]) of each level."""
    boxes = [
        torch.tensor([[x, y, x, y] for x, y in places]).reshape(-1, 4) + make_base_points(stride)
        for stride, places in levels
    ]
    strides = [torch.full((len(places),), float(stride)) for stride, places in levels]
    return Priors(torch.cat(boxes), torch.cat(strides), tuple(len(places) for _, places in levels))


SOME = objects([4, 4, 30, 30], [10, 20, 60, 44], [6, 2, 95, 63], labels=[0, 2, 1])
EMPTY = objects()


# -- assignment


def test_a_point_must_lie_inside() -> None:
    priors = points((8, [(10, 10), (2, 10), (0, 10), (20, 20), (20.5, 5), (10, 19.5)]))
    assert PointInBoxAssigner(()).assign(priors, objects([0, 0, 20, 20])).tolist() == [
        0,
        0,
        BACKGROUND,
        BACKGROUND,
        BACKGROUND,
        0,
    ]


def test_ranges_count_with_both_ends() -> None:
    """The farthest side of the box (0, 0, 100, 40) is at max(x, 100 - x) of its points."""
    places = [(40.0, 20.0), (36.0, 20.0), (35.0, 20.0), (50.0, 20.0)]  # at 60, 64, 65, 50
    priors = points((8, places), (16, places), (32, places))
    assert PointInBoxAssigner((64, 128)).assign(priors, objects([0, 0, 100, 40])).tolist() == [
        0,
        0,
        -1,
        0,
        -1,
        0,
        0,
        -1,
        -1,
        -1,
        -1,
        -1,
    ]
    assert (
        PointInBoxAssigner((10, 20)).assign(priors, objects([0, 0, 100, 40])).tolist() == [-1] * 8 + [0] * 4
    )  # the last level has no end


def test_smallest_instance_wins_and_the_first_of_equal_ones() -> None:
    priors = points((8, [(10, 10), (30, 30), (45, 45)]))
    target = objects([0, 0, 50, 50], [0, 0, 20, 20], [0, 0, 50, 50], [5, 5, 25, 25])
    assert PointInBoxAssigner(()).assign(priors, target).tolist() == [1, 0, 0]


def test_instance_out_of_range_hides_no_other() -> None:
    """The smallest box within the level's range counts, not the smallest of all."""
    priors = points((8, [(10, 10)]), (16, [(10, 10)]))
    assert PointInBoxAssigner((30,)).assign(priors, objects([0, 0, 100, 100], [0, 0, 25, 25])).tolist() == [1, 0]


def test_center_sampling() -> None:
    """Nearer than 1.5 strides to the center (50, 50), along both axes, and inside the box."""
    places = [(50.0, 50.0), (61.5, 50.0), (62.0, 50.0), (38.5, 61.5), (50.0, 63.0)]
    wide, thin = objects([0, 0, 100, 100]), objects([45, 0, 55, 100])
    priors = points((8, places))
    assert PointInBoxAssigner((), radius=1.5).assign(priors, wide).tolist() == [0, 0, -1, 0, -1]
    assert PointInBoxAssigner((), radius=1.5).assign(priors, thin).tolist() == [0, -1, -1, -1, -1]
    assert PointInBoxAssigner((), radius=2.0).assign(priors, wide).tolist() == [0] * 5
    assert (
        PointInBoxAssigner((64,), radius=1.5).assign(points((8, []), (16, places)), wide).tolist() == [-1] * 5
    )  # nearer than 64
    assert PointInBoxAssigner((40,), radius=1.5).assign(points((8, []), (16, places)), wide).tolist() == [0] * 5


def slow(rule: PointInBoxAssigner, priors: Priors, target: Target) -> list[int]:
    """The rule in words, one point and one object at a time."""
    level = [i for i, n in enumerate(priors.counts) for _ in range(n)]
    ends = [0.0, *rule.limits, math.inf]
    assigned = []
    for p, (x, y) in enumerate(box_centers(priors.boxes).tolist()):
        best, instance = math.inf, BACKGROUND
        for g, (x1, y1, x2, y2) in enumerate(target.boxes.tolist()):
            sides = (x - x1, y - y1, x2 - x, y2 - y)
            fits = min(sides) > 0 and ends[level[p]] <= max(sides) <= ends[level[p] + 1]
            if rule.radius is not None:
                reach = rule.radius * float(priors.strides[p])
                fits = fits and abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
            if fits and (x2 - x1) * (y2 - y1) < best:
                best, instance = (x2 - x1) * (y2 - y1), g
        assigned.append(instance)
    return assigned


@given(st.integers(0, 10_000), st.integers(0, 12), st.sampled_from([None, 1.0, 1.5]), st.sampled_from([1, 3, 64]))
def test_assignment_against_a_loop(seed: int, count: int, radius: float | None, chunk: int) -> None:
    torch.manual_seed(seed)
    levels = Levels((1, 1, 1), (4, 8, 16))
    priors = grid_priors(maps(levels, (32, 48), 1), levels, [make_base_points(s) for s in levels.strides], offset=0.5)
    corners = torch.randint(0, 12, (count, 2)) * 2.0  # a coarse grid makes ties
    boxes = torch.cat([corners, corners + 2.0 * torch.randint(1, 12, (count, 2))], dim=1)
    rule = PointInBoxAssigner((8, 14), radius)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assigners, "INSTANCES_AT_ONCE", chunk)
        assert rule.assign(priors, objects(*boxes.tolist())).tolist() == slow(rule, priors, objects(*boxes.tolist()))


# -- losses


def test_iou_losses_by_hand() -> None:
    """Two boxes of 100, of which 50 are shared, in a hull of 150; equal ones; two without overlap in a hull of 400."""
    ours = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 10]])
    theirs = torch.tensor([[5.0, 0, 15, 10], [0, 0, 10, 10], [10, 10, 20, 20]])
    assert iou_loss(ours, theirs).tolist() == pytest.approx([math.log(3), 0, -math.log(1e-6)], abs=1e-5)
    assert giou_loss(ours, theirs).tolist() == pytest.approx([2 / 3, 0, 1.5], abs=1e-6)


def test_giou_loss_is_torchvisions() -> None:
    corners = torch.rand(50, 2, 2) * 20
    ours, theirs = torch.cat([corners, corners + 1 + 20 * torch.rand(50, 2, 2)], dim=2).unbind(dim=1)
    assert torch.allclose(giou_loss(ours, theirs), generalized_box_iou_loss(ours, theirs), atol=1e-5)


def test_iou_losses_of_empty_boxes_are_finite() -> None:
    point = torch.zeros(1, 4, requires_grad=True)
    for loss in (iou_loss, giou_loss):
        value = loss(point, torch.zeros(1, 4)).sum() + loss(point, torch.tensor([[-1.0, -1, 1, 1]])).sum()
        assert value.isfinite()
        assert torch.autograd.grad(value, point)[0].isfinite().all()
        assert loss(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_normalizer_has_the_given_minimum() -> None:
    assert float(mean_over_ranks(torch.tensor(0.2))) == 1
    assert float(mean_over_ranks(torch.tensor(0.2), least=1e-6)) == pytest.approx(0.2)
    assert float(mean_over_ranks(torch.tensor(0.0), least=1e-6)) == pytest.approx(1e-6)


def test_centerness_by_hand() -> None:
    """1 in the middle; sqrt(1/3 * 1/4) at a quarter of the width and a fifth of the height."""
    assert centerness(torch.tensor([[5.0, 3, 5, 3], [2, 1, 6, 4]])).tolist() == pytest.approx([1, math.sqrt(1 / 12)])


def literal(head: FCOSHead, outputs: Outputs, targets: list[Target]) -> dict[str, float]:
    """The losses one point and one class at a time."""
    normalized = head.normalize_boxes
    cls, box, sure, positives, weights = 0.0, 0.0, 0.0, 0, 0.0
    places = box_centers(outputs.priors.boxes).tolist()
    for n, target in enumerate(targets):
        assigned = slow(head.assigner, outputs.priors, target)
        p = 0
        for i, stride in enumerate(head.levels.strides):
            scores, reg, quality = (outputs.maps[k][i][n].detach().double() for k in ("cls", "reg", "centerness"))
            for row in range(scores.shape[1]):
                for column in range(scores.shape[2]):
                    (x, y), instance = places[p], assigned[p]
                    assert (x, y) == ((column + 0.5) * stride, (row + 0.5) * stride)
                    p += 1
                    for k in range(head.num_classes):
                        s = 1 / (1 + math.exp(-float(scores[k, row, column])))
                        hit = instance >= 0 and int(target.labels[instance]) == k
                        cls -= 0.25 * (1 - s) ** 2 * math.log(s) if hit else 0.75 * s**2 * math.log(1 - s)
                    if instance < 0:
                        continue
                    x1, y1, x2, y2 = target.boxes[instance].tolist()
                    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
                    want = math.sqrt(min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom))
                    unit = stride if normalized else 1
                    a, b, c, d = (float(v) * unit for v in reg[:, row, column])
                    inside = (min(a, left) + min(c, right)) * (min(b, top) + min(d, bottom))
                    union = (a + c) * (b + d) + (left + right) * (top + bottom) - inside
                    hull = (max(a, left) + max(c, right)) * (max(b, top) + max(d, bottom))
                    giou = 1 - inside / union + (hull - union) / hull
                    box += want * (giou if normalized else -math.log(max(inside / union, 1e-6)))
                    q = 1 / (1 + math.exp(-float(quality[0, row, column])))
                    sure -= want * math.log(q) + (1 - want) * math.log(1 - q)
                    positives, weights = positives + 1, weights + want
    return {
        "loss_cls": cls / max(positives, 1),
        "loss_box": box / max(weights, 1e-6),
        "loss_centerness": sure / max(positives, 1),
    }


@pytest.mark.parametrize(
    ("options", "targets"), [({}, [SOME, EMPTY]), (TRICKS, [SOME, EMPTY]), (TRICKS, [EMPTY, EMPTY])]
)
def test_losses_against_a_loop(options: dict, targets: list[Target]) -> None:
    head = FCOSHead(LEVELS, 3, convs=1, ranges=(16, 32, 64, 128), **options)
    for m in (head.cls, head.reg, head.centerness):
        nn.init.normal_(m.weight, std=0.1)
    nn.init.constant_(head.reg.bias, 1.0)
    outputs = head(maps(LEVELS))
    losses = head.loss(outputs, targets)
    expected = literal(head, outputs, targets)
    assert list(losses) == list(expected) == list(head.loss_weights)
    for name, value in expected.items():
        assert float(losses[name].detach()) == pytest.approx(value, rel=1e-4)


# -- the head


@pytest.mark.parametrize("options", [{}, TRICKS])
def test_decode_is_the_inverse_of_the_targets(options: dict) -> None:
    """Maps equal to the targets decode to the instances' boxes and have no box loss."""
    head = FCOSHead(LEVELS, 3, convs=0, ranges=(16, 32, 64, 128), **options)
    outputs = head(maps(LEVELS, n=1))
    priors = outputs.priors
    assigned = head.assigner.assign(priors, SOME)
    wanted = boxes_to_distances(box_centers(priors.boxes), SOME.boxes[assigned.clamp(min=0)])
    rows = (wanted / priors.strides[:, None] if head.normalize_boxes else wanted).split(priors.counts)
    filled = [r.reshape(1, *m.shape[2:], 4).permute(0, 3, 1, 2) for r, m in zip(rows, outputs.maps["reg"])]
    outputs = Outputs(outputs.maps | {"reg": filled}, priors)
    boxes, scores, quality = head.decode(outputs)
    hit = assigned >= 0
    assert len(assigned[hit].unique()) == 3
    assert torch.allclose(boxes[0, hit], SOME.boxes[assigned[hit]], atol=1e-3)
    assert scores.shape == (1, len(priors), 3)
    assert quality is not None
    assert quality.shape == (1, len(priors))
    assert float(head.loss(outputs, [SOME])["loss_box"].detach()) == pytest.approx(0, abs=1e-5)


def test_scales_act_before_the_exponential() -> None:
    head = FCOSHead(LEVELS, 3, convs=0)
    nn.init.zeros_(head.reg.weight)
    nn.init.constant_(head.reg.bias, 0.5)
    head.scales.data = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    for i, distances in enumerate(head(maps(LEVELS)).maps["reg"]):
        assert torch.allclose(distances, torch.tensor(0.5 * (i + 1)).exp())


def test_centerness_from_either_tower() -> None:
    for on_box in (False, True):
        head = FCOSHead(LEVELS, 3, convs=1, centerness_on_box=on_box)
        sum(m.sum() for m in head(maps(LEVELS)).maps["centerness"]).backward()
        assert all((p.grad is not None) == on_box for p in head.towers.reg.parameters())
        assert all((p.grad is None) == on_box for p in head.towers.cls.parameters())


def test_interaction_lies_between_towers_and_predictions() -> None:
    class Swap(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((channels, 1, 1), 2.0))

        def forward(self, cls: Tensor, box: Tensor) -> tuple[Tensor, Tensor]:
            return self.gain * box, cls

    head = FCOSHead(LEVELS, 3, interact=Swap, convs=1)
    (feature, *_) = features = maps(LEVELS)
    expected = head.cls(2 * head.towers.reg(feature))
    assert torch.allclose(head(features).maps["cls"][0], expected, atol=1e-6)


def test_every_point_starts_with_the_prior_score() -> None:
    head = FCOSHead(LEVELS, 3, convs=1, prior=0.02)
    nn.init.zeros_(head.cls.weight)
    assert torch.allclose(head.decode(head(maps(LEVELS))).scores, torch.tensor(0.02))


def test_centerness_orders_but_does_not_filter() -> None:
    """A low centerness removes no candidate: the threshold applies to the class score (MMDetection 3.x)."""
    head = FCOSHead(LEVELS, 3, convs=0)
    for m in (head.cls, head.centerness):
        nn.init.zeros_(m.weight)
    nn.init.constant_(head.cls.bias, math.log(0.5 / 0.5))
    nn.init.constant_(head.centerness.bias, math.log(0.01 / 0.99))
    nn.init.constant_(head.reg.bias, 1.0)
    outputs = head(maps(LEVELS, n=1))
    detections = select_detections(head.decode(outputs), torch.tensor([[64, 96]]), outputs.priors.counts, score=0.05)
    count = int(detections.counts)
    assert count == 100
    assert torch.allclose(detections.scores[0, :count], torch.tensor(0.005))


def test_bf16_channels_last_and_autocast() -> None:
    head = FCOSHead(LEVELS, 3, convs=2, **TRICKS)
    features = [f.contiguous(memory_format=torch.channels_last) for f in maps(LEVELS)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(features)
        losses = head.loss(outputs, [SOME, EMPTY])
    assert all(m.dtype == torch.float32 for m in outputs.maps["reg"])
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    exact = FCOSHead(LEVELS, 3, convs=2, **TRICKS)
    exact.load_state_dict(head.state_dict())
    for p in head.parameters():
        p.data = p.data.bfloat16()
    with torch.no_grad():
        ours, theirs = (h.decode(h([f.to(h.cls.weight.dtype) for f in features])) for h in (head, exact))
    assert all(a.dtype == torch.float32 and torch.allclose(a, b, atol=2.0) for a, b in zip(ours, theirs))


@pytest.mark.slow
@pytest.mark.parametrize("options", [TRICKS, {"deformable_last": True}])
def test_export(options: dict) -> None:
    wide = Levels((64,) * 5, LEVELS.strides)  # GroupNorm needs several values per group on a map of 1 x 1

    def detect(head: FCOSHead, features: list[Tensor]) -> tuple[Tensor, ...]:
        outputs = head(features)
        sizes = torch.tensor([[64, 96]])
        return select_detections(head.decode(outputs), sizes, outputs.priors.counts, score=0.005)[:4]

    model = Call(FCOSHead(wide, 3, convs=1, **options).eval(), detect)
    detections = check_export(model, (maps(wide, n=1),), (maps(wide, n=1),))
    assert int(detections[3]) > 0


def test_parameter_counts() -> None:
    """Spec, section A: the head, and FCOS R50 with 80 classes."""
    assert HEADS["fcos"] is FCOSHead
    with torch.device("meta"):
        head = FCOSHead(Levels((256,) * 5, LEVELS.strides), 80)
        model = create_model("fcos_r50", "model.backbone.pretrained=false")
    assert sum(p.numel() for p in head.parameters()) == 4_920_666
    assert isinstance(model.neck, FPN)
    assert model.head.levels.strides == (8, 16, 32, 64, 128)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 32_072_026


def test_default_ranges() -> None:
    assert FCOSHead(LEVELS, 3, convs=0).assigner == PointInBoxAssigner((64, 128, 256, 512), None)
    assert FCOSHead(Levels((32,) * 3, (4, 8, 16)), 3, convs=0, center_sampling=True).assigner == PointInBoxAssigner(
        (32, 64), 1.5
    )


def test_configs_with_the_improvements_of_2020() -> None:
    model = create_model(
        "fcos_r50_tricks", "model.backbone.pretrained=false", "model.backbone.name=test_resnet", num_classes=2
    )
    head = model.head
    assert (head.normalize_boxes, head.centerness_on_box, head.box_loss) == (True, True, giou_loss)
    assert head.assigner.radius == 1.5
    assert model.selection["iou"] == 0.6
