"""RepPoints' head and its first assigner: by hand, against plain loops, export and half precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fakes
from fakes import Call, LargestTensor, many, maps, objects
from fusedet.errors import InputError
from fusedet.models.detectors import create_model, prepare_for_inference
from fusedet.models.heads import RepPointsHead
from fusedet.models.ops import point_assigner
from fusedet.models.ops.assigners import BACKGROUND, IGNORED
from fusedet.models.ops.boxes import box_centers, grid_priors, make_base_points
from fusedet.models.ops.point_assigner import PointAssigner
from fusedet.types import Batch, Levels, Outputs, Priors, Target

LEVELS = Levels((32,) * 5, (8, 16, 32, 64, 128))


EMPTY = objects([])
SOME = objects([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2])


def make(**options: object) -> RepPointsHead:
    return RepPointsHead(LEVELS, 3, **({"convs": 1} | options))


def grid(*cells: tuple[int, int], strides: tuple[int, ...] | None = None) -> Priors:
    """The points of levels of so many cells (rows, columns)."""
    strides = strides or tuple(8 * 2**i for i in range(len(cells)))
    shapes = [make_base_points(s) for s in strides]
    return grid_priors([torch.zeros(1, 1, *c) for c in cells], Levels((1,) * len(cells), strides), shapes)


def spread(head: RepPointsHead) -> RepPointsHead:
    """Start the head with the points of a square grid of 1.2 times the usual size, so that its boxes have an area."""
    nn.init.normal_(head.pts_init.weight, std=0.05)
    head.pts_init.bias.data = 1.2 * head.base.flatten()
    return head


# -- from points to a box


def test_moment_transform_by_hand() -> None:
    """x = 0..8 has mean 4 and unbiased variance 60 / 8; y, five times 1 and four times -1, mean 1/9 and 80/81 * 9/8."""
    points = torch.tensor([[1 - 2 * (i % 2), i] for i in range(9)], dtype=torch.float).flatten()
    head = make()
    head.moment_transfer.data = torch.tensor([math.log(2), -1.0])
    w, h = 2 * math.sqrt(7.5), math.sqrt(80 / 81 * 9 / 8) / math.e
    assert head.pseudo_boxes(points).tolist() == pytest.approx([4 - w, 1 / 9 - h, 4 + w, 1 / 9 + h])


def test_factors_receive_a_hundredth_of_the_gradient() -> None:
    """The right side is mean + deviation * exp(t): its derivative by t is deviation * exp(t)."""
    points = torch.tensor([[0, i] for i in range(9)], dtype=torch.float).flatten()
    head = make()
    head.moment_transfer.data = torch.tensor([0.5, 0.0])
    head.pseudo_boxes(points)[2].backward()
    assert head.moment_transfer.grad.tolist() == pytest.approx([0.01 * math.sqrt(7.5) * math.exp(0.5), 0])


@pytest.mark.parametrize(("method", "box"), [("minmax", [-3, -2, 9, 7]), ("partial_minmax", [-1, -2, 5, 3])])
def test_minmax_transforms_by_hand(method: str, box: list[float]) -> None:
    yx = [[0, 5], [-2, 1], [3, -1], [1, 1], [7, 0], [0, 9], [1, -3], [0, 0], [2, 2]]
    head = make(transform_method=method)
    assert head.moment_transfer is None
    assert head.pseudo_boxes(torch.tensor(yx, dtype=torch.float).flatten()).tolist() == box


@pytest.mark.parametrize("method", ["moment", "minmax", "partial_minmax"])
def test_boxes_are_equivariant_to_shift_and_scale(method: str) -> None:
    """Boxes of maps and of rows are the same, and T(a * points + b) = a * T(points) + b."""
    head = make(transform_method=method)
    points = torch.randn(2, 5, 18)
    moved = head.pseudo_boxes((points.unflatten(2, (9, 2)) * 3 + torch.tensor([2.0, 5.0])).flatten(2))
    assert torch.allclose(moved, head.pseudo_boxes(points) * 3 + torch.tensor([5.0, 2.0, 5.0, 2.0]), atol=1e-5)
    assert torch.equal(head.pseudo_boxes(points)[1, 3], head.pseudo_boxes(points[1, 3]))


@pytest.mark.parametrize("method", ["moment", "minmax", "partial_minmax"])
def test_coincident_points_have_a_finite_gradient(method: str) -> None:
    points = torch.ones(1, 18, requires_grad=True)
    head = make(transform_method=method)
    box = head.pseudo_boxes(points)
    box.sum().backward()
    assert box.tolist() == [[1, 1, 1, 1]]
    assert points.grad.isfinite().all()


# -- the first assignment


def test_level_follows_from_the_size() -> None:
    """sqrt(w h) / 4 below 16 belongs to stride 8, from 16 on to 16, from 32 on to 32; the ends take all beyond."""
    priors = grid((8, 8), (4, 4), (2, 2))
    for w, h, stride in [
        (63.9, 63.9, 8),
        (64, 64, 16),
        (128, 32, 16),
        (32, 127, 8),
        (128, 128, 32),
        (3, 2, 8),
        (4000, 4000, 32),
        (0, 0, 8),
    ]:
        assigned = PointAssigner().assign(priors, objects([[33 - w / 2, 33 - h / 2, 33 + w / 2, 33 + h / 2]]))
        (place,) = (assigned == 0).nonzero().flatten().tolist()
        assert (int(priors.strides[place]), box_centers(priors.boxes)[place].tolist()) == (stride, [32, 32])
        assert (assigned == BACKGROUND).sum() == len(priors) - 1


def test_a_gap_between_levels_takes_the_finer_one() -> None:
    priors = grid((8, 8), (2, 2), strides=(8, 32))
    assigned = PointAssigner().assign(priors, objects([[0, 0, 70, 70]]))
    assert priors.strides[assigned == 0].tolist() == [8]


def test_distance_is_relative_to_the_sides() -> None:
    """The center (11, 12.5) of a box of 8 x 80 is nearest to (8, 16), 3/8 and 3.5/80 away; (16, 16) is 5/8 away."""
    priors = grid((4, 4))
    tall, wide = [7, -27.5, 15, 52.5], [-27.5, 7, 52.5, 15]
    assert box_centers(priors.boxes)[PointAssigner().assign(priors, objects([tall])) == 0].tolist() == [[8, 16]]
    assert box_centers(priors.boxes)[PointAssigner().assign(priors, objects([wide])) == 0].tolist() == [[16, 8]]
    # with two points each: along its long side a box looks farther, (8, 8) at 4.5/80 before (16, 16) at 5/8
    two = PointAssigner(pos_num=2)
    assert box_centers(priors.boxes)[two.assign(priors, objects([tall])) == 0].tolist() == [[8, 8], [8, 16]]


def test_nearest_instance_has_the_point_and_the_first_of_equal_ones() -> None:
    priors = grid((4, 4))
    near, far = [0, 0, 16.2, 16], [0, 0, 18, 16]
    place = 5  # (8, 8)
    assert int(PointAssigner().assign(priors, objects([far, near]))[place]) == 1
    assert int(PointAssigner().assign(priors, objects([near, far]))[place]) == 0
    assert int(PointAssigner().assign(priors, objects([far, near, near]))[place]) == 1
    assert int((PointAssigner().assign(priors, objects([far, near, near])) >= 0).sum()) == 1


def test_no_instances_and_more_points_than_exist() -> None:
    assert PointAssigner().assign(grid((4, 4), (2, 2)), EMPTY).tolist() == [BACKGROUND] * 20
    assert (
        PointAssigner(pos_num=9).assign(grid((4, 4), (2, 2)), objects([[0, 0, 70, 70]])).tolist()
        == [BACKGROUND] * 16 + [0] * 4
    )


def slow(rule: PointAssigner, priors: Priors, target: Target) -> list[int]:
    """The rule, one object and one point at a time, in double precision."""
    assigned, best = [BACKGROUND] * len(priors), [math.inf] * len(priors)
    levels = [int(math.log2(s)) for s in priors.strides.tolist()]
    points = box_centers(priors.boxes.double()).tolist()
    for g, (x1, y1, x2, y2) in enumerate(target.boxes.double().tolist()):
        level = math.floor(math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / rule.scale))
        level = min(max(level, min(levels)), max(levels))
        middle = ((x1 + x2) / 2, (y1 + y2) / 2)
        away = {
            p: math.hypot((points[p][0] - middle[0]) / (x2 - x1), (points[p][1] - middle[1]) / (y2 - y1))
            for p in range(len(priors))
            if levels[p] == level
        }
        for p in sorted(away, key=lambda p: away[p])[: rule.pos_num]:
            if away[p] < best[p]:
                assigned[p], best[p] = g, away[p]
    return assigned


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(1, 15),
    pos_num=st.sampled_from([1, 3]),
    scale=st.sampled_from([2.0, 4.0]),
)
def test_first_assignment_against_a_loop(seed: int, count: int, pos_num: int, scale: float) -> None:
    torch.manual_seed(seed)
    priors, target = grid((8, 9), (4, 5), (2, 3)), many(count, 60, 50)
    assert PointAssigner(scale, pos_num).assign(priors, target).tolist() == slow(
        PointAssigner(scale, pos_num), priors, target
    )


def test_first_assignment_of_a_thousand_instances_needs_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    priors = grid((50, 75), (25, 38), (13, 19), (7, 10))
    target = many(1000, 600, 400)
    with LargestTensor() as largest:
        assigned = PointAssigner().assign(priors, target)
    assert largest.elements <= 64 * priors.counts[0] * 2  # the differences in x and y of 64 objects and one level
    assert 500 < int((assigned >= 0).sum()) < 1000
    monkeypatch.setattr(point_assigner, "INSTANCES_AT_ONCE", 1000)
    assert torch.equal(assigned, PointAssigner().assign(priors, target))


@pytest.mark.parametrize(
    ("options", "text"), [({"scale": 0.0}, "scale=0"), ({"pos_num": 0}, "pos_num=0 must be 1 or more")]
)
def test_bad_options_of_the_first_assigner_are_refused(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        PointAssigner(**options)


# -- the head


def test_features_are_sampled_at_the_initial_points() -> None:
    """On maps of their own coordinates, tap k of both deformable convolutions reads the position of point k."""
    levels = Levels((2,), (8,))
    y, x = torch.meshgrid(torch.arange(9.0), torch.arange(9.0), indexing="ij")
    points = [(-2, -1.5), (-1, 0), (-0.25, 2), (0, -3), (0.5, 0.5), (1, 1), (2, -2), (3, 3), (-3.5, 0.75)]
    head = RepPointsHead(levels, 2, convs=0)
    for p in head.parameters():
        nn.init.zeros_(p)
    head.pts_init.bias.data = torch.tensor(points).flatten()
    for k, (dy, dx) in enumerate(points):
        for m in (head.cls_conv, head.pts_refine_conv):
            nn.init.zeros_(m.weight)
            m.weight.data.flatten(2)[:, :, k] = torch.eye(2)
        for m in (head.cls, head.pts_refine):
            m.weight.data[:2, :, 0, 0] = torch.eye(2)
        outputs = head([torch.stack([y, x])[None]])
        assert outputs.maps["cls"][0][0, :, 4, 4].tolist() == pytest.approx([4 + dy, 4 + dx])
        init, refine = (outputs.maps[name][0][0, :, 4, 4] for name in ("pts_init", "pts_refine"))
        assert init.tolist() == pytest.approx([c for point in points for c in point])
        assert (refine - init).tolist() == pytest.approx([4 + dy, 4 + dx] + [0] * 16, abs=1e-5)


def test_initial_points_receive_a_tenth_of_the_gradient() -> None:
    """By the scores, and by the refined points, which take the initial ones themselves as constants."""
    features, gradients = maps(LEVELS, (64, 64)), {}
    head = spread(make())
    for factor in (0.0, 0.1, 1.0):
        head.gradient_mul = factor
        for name in ("cls", "pts_refine"):
            (gradients[name, factor],) = torch.autograd.grad(
                head(features).maps[name][0].square().sum(), head.pts_init.bias
            )
    for name in ("cls", "pts_refine"):
        assert not gradients[name, 0.0].any()
        assert gradients[name, 1.0].abs().max() > 1e-6
        assert torch.allclose(gradients[name, 0.1], 0.1 * gradients[name, 1.0], rtol=1e-3, atol=1e-7)


def test_initial_points_and_scores() -> None:
    head = make(prior=0.02)
    for p in (*head.pts_init.parameters(), *head.pts_refine.parameters(), head.cls.weight):
        nn.init.zeros_(p)
    outputs = head(maps(LEVELS))
    boxes, scores, quality = head.decode(outputs)
    assert torch.equal(boxes[0], box_centers(outputs.priors.boxes).repeat(1, 2))
    assert torch.allclose(scores, torch.tensor(0.02))
    assert quality is None


def test_decode_by_hand() -> None:
    """The second cell of stride 8 lies at (8, 0)."""
    points = torch.zeros(9, 2, 1, 2)
    points[:, :, 0, 1] = torch.tensor([[-1.0, -2.0]] * 4 + [[3.0, 0.5]] * 5)  # y, x
    maps = {
        "cls": [torch.zeros(1, 3, 1, 2)],
        "pts_init": [torch.ones(1, 18, 1, 2)],
        "pts_refine": [points.view(1, 18, 1, 2)],
    }
    boxes, scores, _ = RepPointsHead(Levels((32,), (8,)), 3, transform_method="minmax").decode(
        Outputs(maps, grid((1, 2)))
    )
    assert boxes.tolist() == [[[0, 0, 0, 0], [8 - 16, -8, 8 + 4, 24]]]
    assert scores.unique().tolist() == [0.5]


@pytest.mark.parametrize("beta", [0.11, 1.0])
def test_loss_against_a_loop(beta: float) -> None:
    """The losses, cell by cell in double precision, on an image with objects and one without."""
    head = spread(make(beta=beta))
    head.moment_transfer.data = torch.tensor([0.3, -0.2])
    outputs = head(maps(LEVELS))
    losses = head.loss(outputs, [SOME, EMPTY])
    priors = outputs.priors
    rows = {
        name: torch.cat([m.permute(0, 2, 3, 1).flatten(1, 2) for m in column], dim=1).double()
        for name, column in outputs.maps.items()
    }
    rows = {name: values.detach() for name, values in rows.items()}

    def box(points: list[float]) -> list[float]:
        low, high = [], []
        for values, factor in ((points[1::2], math.exp(0.3)), (points[0::2], math.exp(-0.2))):
            mean = sum(values) / 9
            half = factor * math.sqrt(sum((v - mean) ** 2 for v in values) / 8)
            low, high = [*low, mean - half], [*high, mean + half]
        return low + high

    def overlap(a: list[float], b: list[float]) -> float:
        shared = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    def pixels(name: str, image: int, i: int) -> list[float]:
        (x, y), stride = box_centers(priors.boxes[i]).tolist(), float(priors.strides[i])
        return [a * stride + b for a, b in zip(box(rows[name][image, i].tolist()), (x, y, x, y))]

    def distance(name: str, i: int, instance: int) -> float:
        total = 0.0
        for a, b in zip(pixels(name, 0, i), SOME.boxes[instance].tolist()):
            d = abs(a - b) / (4 * float(priors.strides[i]))
            total += d**2 / (2 * beta) if d < beta else d - beta / 2
        return total

    init = {i: instance for i, instance in enumerate(slow(PointAssigner(), priors, SOME)) if instance >= 0}
    overlaps = [[overlap(pixels("pts_init", 0, i), b) for b in SOME.boxes.tolist()] for i in range(len(priors))]
    assigned = [BACKGROUND if max(o) < 0.4 else IGNORED if max(o) < 0.5 else o.index(max(o)) for o in overlaps]
    for g in range(2):
        peak = max(o[g] for o in overlaps)
        assigned = [g if o[g] == peak else instance for o, instance in zip(overlaps, assigned)]
    assert {BACKGROUND, IGNORED, 0, 1} == set(assigned)

    focal, refined, count = 0.0, 0.0, 0
    for image in (0, 1):
        for i in range(len(priors)):
            instance = assigned[i] if image == 0 else BACKGROUND
            for k in range(3) if instance != IGNORED else ():
                p = 1 / (1 + math.exp(-float(rows["cls"][image, i, k])))
                hit = instance >= 0 and k == int(SOME.labels[instance])
                focal -= 0.25 * (1 - p) ** 2 * math.log(p) if hit else 0.75 * p**2 * math.log(1 - p)
            if instance >= 0:
                refined, count = refined + distance("pts_refine", i, instance), count + 1
    assert count > 2
    # the image without objects counts as one positive
    assert float(losses["loss_cls"].detach()) == pytest.approx(focal / (count + 1), rel=1e-4)
    assert float(losses["loss_refine"].detach()) == pytest.approx(refined / (count + 1), rel=1e-4)
    expected = sum(distance("pts_init", i, instance) for i, instance in init.items()) / (len(init) + 1)
    assert float(losses["loss_init"].detach()) == pytest.approx(expected, rel=1e-4)
    assert head.loss_weights == {"loss_cls": 1.0, "loss_init": 0.5, "loss_refine": 1.0}


def test_interaction_replaces_both_branches() -> None:
    assert fakes.swaps_branches(make, maps(LEVELS))


def test_bfloat16() -> None:
    """Under autocast, and with weights in bfloat16, points stay float32 and their boxes near those of float32."""
    head, features = spread(make()), maps(LEVELS)
    exact = head.decode(head(features))[0]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(features)
        losses = head.loss(outputs, [SOME, EMPTY])
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    low = spread(make()).to(torch.bfloat16)
    low.load_state_dict(head.state_dict())
    with torch.no_grad():
        for raw in (outputs, low([f.bfloat16() for f in features])):
            assert all(m.dtype == torch.float32 for name in ("pts_init", "pts_refine") for m in raw.maps[name])
            boxes = head.decode(raw)[0]
            assert boxes.dtype == torch.float32
            assert ((boxes - exact).abs() <= 0.05 * raw.priors.strides[:, None]).all()


@pytest.mark.slow
def test_exports() -> None:
    few = Levels((32,) * 2, (8, 16))
    decode = Call(spread(RepPointsHead(few, 3, convs=1)).eval(), lambda head, features: head.decode(head(features))[:2])
    fakes.check_export(decode, (maps(few),), (maps(few),))


def test_channels_last_is_the_same() -> None:
    head, features = spread(make(norm=True)), maps(LEVELS)
    boxes, scores, _ = head.decode(head(features))
    head.to(memory_format=torch.channels_last)
    again = head.decode(head([f.to(memory_format=torch.channels_last) for f in features]))
    assert torch.allclose(boxes, again.boxes, atol=1e-3)
    assert torch.allclose(scores, again.scores, atol=1e-5)


def test_parameter_counts() -> None:
    """The head, and the detector without its frozen stem and first stage."""
    with torch.device("meta"):
        model = create_model("reppoints_r50", "model.backbone.pretrained=false")
    assert sum(p.numel() for p in model.head.parameters()) == 5_340_022
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 36_620_150
    assert (
        sum(p.numel() for p in make(transform_method="minmax").parameters())
        == sum(p.numel() for p in make().parameters()) - 2
    )


def test_prepared_detector_predicts_the_same() -> None:
    options = [
        "model.backbone.pretrained=false",
        "model.backbone.name=test_resnet",
        "model.pyramid.channels=32",
        "model.head.convs=1",
    ]
    model = create_model("reppoints_r18", *options, num_classes=3).eval()
    spread(model.head)
    model.head.cls.bias.data += 4
    images, sizes = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8), torch.tensor([[64, 96], [50, 60]])
    batch = Batch(images, sizes, (0, 1), torch.ones(2, 2))
    for ours, theirs in zip(model.predict(batch), prepare_for_inference(model).predict(batch)):
        assert len(ours) > 0
        assert torch.allclose(ours.boxes, theirs.boxes, atol=1e-2)
