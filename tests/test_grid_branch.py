"""The grid branch: fusion, targets, boxes and losses against literal computations."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fakes import check_export
from fusedet.errors import InputError
from fusedet.models.roi.grid import GridBranch, Transition
from fusedet.models.roi.sampling import RoISamples
from fusedet.types import BatchDetections, Levels, Target
from properties import property_test

LEVELS = Levels((16,) * 5, (4, 8, 16, 32, 64))
SIZES = torch.tensor([[75, 129], [64, 100]])
SMALL = {"convs": 2, "point_channels": 4, "groups": 6}
NEIGHBORS = {
    0: [1, 3],
    1: [0, 2, 4],
    2: [1, 5],
    3: [0, 4, 6],
    4: [1, 3, 5, 7],
    5: [2, 4, 8],
    6: [3, 7],
    7: [4, 6, 8],
    8: [5, 7],
}


def pyramid(size: tuple[int, int] = (75, 129), n: int = 2) -> list[Tensor]:
    return [torch.randn(n, 16, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in LEVELS.strides]


def targets() -> list[Target]:
    first = Target(torch.tensor([[4.0, 6, 40, 50], [60, 10, 120, 70]]), torch.tensor([2, 0]))
    return [first, Target(torch.tensor([[10.0, 8, 90, 60]]), torch.tensor([1]))]


def samples() -> RoISamples:
    """Positives and negatives of both images, mixed."""
    table = torch.tensor(
        [
            (1, 12.5, 9, 80.3, 61, 0),
            (0, 1, 1, 20, 20, -1),
            (0, 62, 8.5, 128, 74, 1),
            (1, 0, 0, 30, 12, -1),
            (0, 5, 7.7, 37.2, 49, 0),
        ]
    )
    return RoISamples(table[:, :5], table[:, 5].long(), table[:, 0].long())


def learns(branch: GridBranch) -> None:
    """Heat maps whose scores depend visibly on the features, which the small start of the deconvolutions hides."""
    for layer in (branch.up, branch.heat):
        torch.nn.init.normal_(layer.weight, std=0.2)


# -- the network


def test_parameters_and_shapes() -> None:
    """23,123,145 parameters at 256 channels, as the papers' Grid R-CNN has them."""
    branch = GridBranch(Levels((256,) * 5, LEVELS.strides), 80)
    assert sum(p.numel() for p in branch.parameters()) == 23_123_145
    assert branch.loss_weights == {"loss_grid": 15.0}
    assert branch.corners.tolist() == [[x, y] for x in (0, 14, 28) for y in (0, 14, 28)]
    assert GridBranch(LEVELS, 3, **SMALL)(pyramid(), samples().rois).shape == (5, 9, 28, 28)
    four = GridBranch(LEVELS, 3, size=6, side=2, convs=1, point_channels=4, groups=4)
    assert four(pyramid(), samples().rois).shape == (5, 4, 12, 12)


def test_heat_maps_start_with_a_low_probability() -> None:
    scores = GridBranch(LEVELS, 3, **SMALL)(pyramid(), samples().rois).sigmoid()
    assert torch.allclose(scores, torch.tensor(0.01), atol=0.001)


def test_transition_against_its_edges() -> None:
    """Each edge separately: depth-wise 5x5, then 1x1, in the order of the edges' target points."""
    layer, x, y = Transition(3, 4), torch.randn(2, 36, 7, 7), torch.randn(2, 36, 7, 7)
    fused, edge = layer(x, y), 0
    for point, around in NEIGHBORS.items():
        expected = x[:, 4 * point : 4 * point + 4].clone()
        # left, above, below, right: as MMDetection counts them
        order = sorted(around, key=lambda other: [point - 3, point - 1, point + 1, point + 3].index(other))
        for source in order:
            part = slice(4 * edge, 4 * edge + 4)
            sent = F.conv2d(
                y[:, 4 * source : 4 * source + 4],
                layer.depthwise.weight[part],
                layer.depthwise.bias[part],
                padding=2,
                groups=4,
            )
            expected += F.conv2d(sent, layer.pointwise.weight[part], layer.pointwise.bias[part])
            edge += 1
        assert torch.allclose(fused[:, 4 * point : 4 * point + 4], expected, atol=1e-5)
    assert edge == 24


def test_an_exported_transition_takes_any_memory_layout() -> None:
    """What precedes it may give channels-last maps, whose channels cannot be viewed as points and channels."""
    layer, x = Transition(3, 4), torch.randn(2, 36, 7, 7)
    exported = torch.export.export(layer, (x, x)).run_decompositions({}).module()
    other = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(exported(other, other), layer(x, x), atol=1e-6)


def test_fusion_has_two_orders() -> None:
    """What reaches a point comes from its neighbors and from theirs, and from nowhere else."""
    branch = GridBranch(LEVELS, 3, **SMALL)
    x = torch.randn(1, 36, 7, 7, requires_grad=True)
    for point, around in NEIGHBORS.items():
        (gradient,) = torch.autograd.grad(branch.fuse(x)[:, 4 * point : 4 * point + 4].sum(), x)
        reached = {i for i in range(9) if gradient[:, 4 * i : 4 * i + 4].any()}
        assert reached == {point, *around, *(other for n in around for other in NEIGHBORS[n])}


@pytest.mark.parametrize("size", [(75, 129), (64, 96), (33, 47)])
def test_every_parameter_has_a_gradient_at_any_size(size: tuple[int, int]) -> None:
    branch = GridBranch(LEVELS, 3, **SMALL)
    features = pyramid(size)
    kept = [f.clone() for f in features]
    branch.loss(features, samples(), targets(), SIZES)["loss_grid"].backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, features))
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in branch.parameters())


def test_forward_exports_with_other_rois() -> None:
    branch, features, rois = GridBranch(LEVELS, 3, **SMALL), pyramid(), samples().rois
    learns(branch)
    check_export(branch, (features, rois), (features, rois + torch.tensor([0, 0, 0, 30, 40])))


def test_half_precision() -> None:
    branch, features = GridBranch(LEVELS, 3, jitter=0.0, **SMALL), pyramid()
    exact = branch.loss(features, samples(), targets(), SIZES)["loss_grid"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = branch.loss(features, samples(), targets(), SIZES)["loss_grid"]
    assert loss.dtype == torch.float32
    assert float((loss - exact).abs().detach()) < 0.02 * float(exact.detach())
    logits = branch.to(torch.bfloat16)([f.bfloat16() for f in features], samples().rois)
    assert logits.dtype == torch.bfloat16
    assert branch.decode(logits, samples().rois[:, 1:]).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"side": 1}, "side=1"),
        ({"convs": 0}, "convs=0"),
        ({"size": 7}, "size=7"),
        ({"groups": 7}, "groups=7 must divide"),
        ({"groups": 0}, "groups=0"),
        ({"point_channels": 0}, "point_channels=0"),
        ({"num": 0}, "num=0"),
        ({"jitter": -0.1}, r"jitter=-0\.1"),
        ({"radius": -1}, "radius=-1"),
    ],
)
def test_bad_options_are_refused(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        GridBranch(LEVELS, 3, **options)


# -- targets


def literal_targets(boxes: list, objects: list, side: int, cells: int, radius: int) -> Tensor:
    """The whole map of each point with a disc around it, then the point's part of it, cell by cell."""
    whole = 2 * cells
    out = torch.zeros(len(boxes), side * side, cells, cells)
    for r, ((x1, y1, x2, y2), (a1, b1, a2, b2)) in enumerate(zip(boxes, objects)):
        w, h = 2 * (x2 - x1), 2 * (y2 - y1)
        if w <= side or h <= side:
            continue
        for i in range(side):
            for j in range(side):
                px, py = a1 + i / (side - 1) * (a2 - a1), b1 + j / (side - 1) * (b2 - b1)
                cx = int((px - (x1 - w / 4)) / w * whole)
                cy = int((py - (y1 - h / 4)) / h * whole)
                begin = [
                    0 if k == 0 else whole // 2 if k == side - 1 else max(int((k / (side - 1) - 0.25) * whole), 0)
                    for k in (i, j)
                ]
                for y in range(cells):
                    for x in range(cells):
                        inside = (x + begin[0] - cx) ** 2 + (y + begin[1] - cy) ** 2 <= radius**2
                        out[r, i * side + j, y, x] = float(inside)
    return out


@property_test(20, st.integers(0, 2**32 - 1), st.sampled_from([(3, 14, 1), (3, 6, 2), (2, 6, 0), (4, 8, 1)]))
def test_targets_against_the_definition(seed: int, shape: tuple[int, int, int]) -> None:
    side, size, radius = shape
    torch.manual_seed(seed)
    branch = GridBranch(LEVELS, 3, size=size, side=side, convs=1, point_channels=1, groups=1, radius=radius)
    corner = (torch.rand(4, 2) * 60).round(decimals=2)
    boxes = torch.cat([corner, corner + (1 + torch.rand(4, 2) * 50).round(decimals=2)], dim=1)
    boxes[0, 2:] = boxes[0, :2] + 1  # too small to have points
    objects = boxes + torch.randn(4, 4) * 3
    heat_maps = branch.target_heat_maps(boxes.double(), objects.double())
    assert not heat_maps[0].any()
    assert torch.equal(
        heat_maps.float(), literal_targets(boxes.double().tolist(), objects.double().tolist(), side, 2 * size, radius)
    )


def test_targets_of_a_box_on_its_instance() -> None:
    """Every point is in the middle of its map, the middle one of 28 cells, but for the grid's own rounding."""
    box = torch.tensor([[10.0, 20, 66, 48]])
    maps = GridBranch(LEVELS, 3, radius=0, **SMALL).target_heat_maps(box, box)
    assert maps.sum(dim=(2, 3)).tolist() == [[1] * 9]
    assert (maps.flatten(2).argmax(dim=2) == 14 * 28 + 14).all()


# -- boxes from maps


def test_targets_decode_to_the_instance() -> None:
    """Target heat maps decode to the instance's box up to half a cell, here 1/28 of the RoI's side."""
    branch = GridBranch(LEVELS, 3, radius=0, **SMALL)
    boxes = torch.tensor([[10.0, 20, 66, 76], [30, 10, 58, 94], [5, 5, 33, 19]])
    objects = boxes + torch.tensor([[3.3, -4, 6, 5], [-2, 8, 3, -9], [0.5, 1, -2, 2]])
    decoded = branch.decode(20 * branch.target_heat_maps(boxes, objects) - 10, boxes)
    cell = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2) / 28
    assert ((decoded - objects).abs() <= cell / 2 + 1e-4).all()


def test_decoding_against_the_definition() -> None:
    branch = GridBranch(LEVELS, 3, **SMALL)
    logits, boxes = torch.randn(4, 9, 28, 28).double(), samples().rois[:4, 1:].double()
    decoded = branch.decode(logits, boxes)
    for m in range(4):
        x1, y1, x2, y2 = boxes[m].tolist()
        points = []
        for i in range(3):
            for j in range(3):
                score, place = logits[m, 3 * i + j].sigmoid().flatten().max(dim=0)
                x, y = int(place) % 28 + 14 * i, int(place) // 28 + 14 * j
                at = (
                    x1 - (x2 - x1) / 2 + (x + 0.5) / 56 * 2 * (x2 - x1),
                    y1 - (y2 - y1) / 2 + (y + 0.5) / 56 * 2 * (y2 - y1),
                )
                points.append((i, j, *at, float(score)))
        for side, (axis, line) in enumerate([(0, 0), (1, 0), (0, 2), (1, 2)]):
            on = [p for p in points if p[axis] == line]
            expected = sum(p[2 + axis] * p[4] for p in on) / sum(p[4] for p in on)
            assert float(decoded[m, side]) == pytest.approx(expected, abs=1e-3)


def test_refinement_changes_boxes_only() -> None:
    branch, features = GridBranch(LEVELS, 3, **SMALL), pyramid()
    learns(branch)
    boxes = torch.tensor([[[4.0, 6, 40, 50], [60, 10, 120, 70]], [[10, 8, 90, 60], [0, 0, 0, 0]]])
    detections = BatchDetections(boxes, torch.rand(2, 2), torch.tensor([[2, 0], [1, 0]]), torch.tensor([2, 1]))
    better = branch.refine(features, detections)
    assert better[1:] == detections[1:]
    assert not torch.equal(better.boxes, boxes)
    assert better.boxes[1, 1].tolist() == [0, 0, 0, 0]  # an unused place stays one
    for n in range(2):
        roi = torch.cat([torch.full((2, 1), float(n)), boxes[n]], dim=1)
        assert torch.allclose(better.boxes[n], branch.decode(branch(features, roi), boxes[n]), atol=1e-4)


# -- training


def test_jitter_is_bounded_and_seeded() -> None:
    branch = GridBranch(LEVELS, 3, **SMALL)
    boxes = torch.tensor([[40.0, 30, 60, 50]]).repeat(2000, 1)
    sizes = torch.tensor([[200, 300]]).expand(2000, 2)
    torch.manual_seed(3)
    jittered = branch.jitter_boxes(boxes, sizes)
    torch.manual_seed(3)
    assert torch.equal(jittered, branch.jitter_boxes(boxes, sizes))
    center, side = (jittered[:, :2] + jittered[:, 2:]) / 2, jittered[:, 2:] - jittered[:, :2]
    for moved, middle in ((center, torch.tensor([50.0, 40])), (side, torch.tensor([20.0, 20]))):
        change = (moved - middle) / 20
        assert 0.14 < change.max() <= 0.15 + 1e-5
        assert -0.15 - 1e-5 <= change.min() < -0.14
        assert change.mean().abs() < 0.01
    held = branch.jitter_boxes(torch.tensor([[0.0, 0, 129, 75]]).repeat(50, 1), SIZES[:1].expand(50, 2))
    assert held.amin() >= 0
    assert (held[:, 2] <= 128).all()
    assert (held[:, 3] <= 74).all()


def test_loss_against_the_definition() -> None:
    """Without jitter: the cross-entropy of fused and of unfused maps, each the mean over all cells of all positives."""
    branch, features, sampled = GridBranch(LEVELS, 3, jitter=0.0, **SMALL), pyramid(), samples()
    learns(branch)
    loss = branch.loss(features, sampled, targets(), SIZES)["loss_grid"]
    rois = sampled.rois[sampled.instances >= 0]
    objects = torch.stack([targets()[1].boxes[0], targets()[0].boxes[1], targets()[0].boxes[0]])
    wanted = branch.target_heat_maps(rois[:, 1:], objects).double()
    x = branch.convs(branch.pooling(features, rois))
    expected = 0.0
    for maps in (branch.heat_maps(branch.fuse(x)), branch.heat_maps(x)):
        score = maps.double().sigmoid()
        expected += float(-(wanted * score.log() + (1 - wanted) * (1 - score).log()).mean().detach())
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_loss_is_reproducible_by_seed_and_takes_num_samples() -> None:
    branch, features = GridBranch(LEVELS, 3, num=2, **SMALL), pyramid()
    learns(branch)
    seen = []
    branch.convs.register_forward_hook(lambda _module, _inputs, output: seen.append(len(output)))

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return float(branch.loss(features, samples(), targets(), SIZES)["loss_grid"].detach())

    assert loss(1) == loss(1) != loss(2)
    assert seen == [2, 2, 2]


def test_loss_without_positives_is_zero_and_connected() -> None:
    branch = GridBranch(LEVELS, 3, **SMALL)
    empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    none = replace(samples(), instances=torch.full((5,), -1))
    loss = branch.loss(pyramid(), none, [empty, empty], SIZES)["loss_grid"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in branch.parameters())


def test_a_few_steps_improve_the_box() -> None:
    """A few steps on one RoI move its decoded box towards its instance."""
    branch, features = GridBranch(LEVELS, 3, convs=1, point_channels=4, groups=6, jitter=0.0), pyramid(n=1)
    box, truth = torch.tensor([[0, 20.0, 10, 76, 66]]), torch.tensor([[26.0, 16, 74, 62]])
    one = RoISamples(box, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    optimizer = torch.optim.Adam(branch.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        branch.loss(features, one, [Target(truth, torch.tensor([0]))], SIZES)["loss_grid"].backward()
        optimizer.step()
    decoded = branch.decode(branch(features, box), box[:, 1:])
    assert (decoded - truth).abs().max() <= 4.1  # a cell is two pixels wide here, and a point has five cells
