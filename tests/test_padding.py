"""Priors beyond an image's own padding, or its edge, take no part in assignment and loss, as in MMDetection."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import batch, many, maps, objects
from fusedet import config as configs
from fusedet.errors import InputError
from fusedet.models.detectors import create_model
from fusedet.models.heads import HEADS
from fusedet.models.ops.assigners import (
    BACKGROUND,
    IGNORED,
    MaxIoUAssigner,
    PointInBoxAssigner,
    assign_batch,
    valid_prior_mask,
)
from fusedet.models.ops.atss import ATSSAssigner
from fusedet.models.ops.boxes import grid_priors, make_base_points
from fusedet.models.ops.point_assigner import PointAssigner
from fusedet.types import Batch, Levels, Outputs, Priors, Target

LEVELS = Levels((16, 16, 16), (8, 16, 64))
SIZES = torch.tensor([[128, 160], [60, 62]])  # the second image's own padding: 64 x 64
RULES = [MaxIoUAssigner(), PointInBoxAssigner((16, 40)), ATSSAssigner(), PointAssigner(pos_num=3)]


def outputs(levels: Levels, size: tuple[int, int], anchors: int = 1) -> Outputs:
    """Random maps, and squares of four strides on every cell."""
    features = maps(levels, size)
    shapes = [make_base_points(s, 4.0).repeat(anchors, 1) for s in levels.strides]
    return Outputs({"cls": features}, grid_priors(features, levels, shapes))


def row(boxes: list, valid: list[bool], stride: int = 8) -> tuple[Priors, torch.Tensor]:
    """One level of these priors, and the mask of the valid ones."""
    corners = torch.tensor(boxes, dtype=torch.float)
    return Priors(corners, torch.full((len(boxes),), float(stride)), (len(boxes),)), torch.tensor(valid)


# -- valid priors


@pytest.mark.parametrize("offset", [0.0, 0.5, 0.99])
def test_cells_that_begin_inside_the_padding_are_valid(offset: float) -> None:
    """An image of 20 x 33 is padded to 32 x 64: 2 of 4 rows and 4 of 6 columns of stride 16, one cell of stride 64."""
    levels = Levels((4, 4), (16, 64))
    features = maps(levels, (64, 96))
    # these sides are no binary fractions: a center computed from them may fall outside its cell
    shapes = [torch.tensor([[-s / 3, -s / 7, s / 3, s / 7]]).repeat(2, 1) for s in levels.strides]
    outs = Outputs({"cls": features}, grid_priors(features, levels, shapes, offset))
    valid = valid_prior_mask(outs, levels.strides, torch.tensor([[64, 96], [20, 33]]))
    assert valid.shape == (2, 2 * (24 + 2))
    assert valid[0].all()
    cells = torch.tensor([[True] * 4 + [False] * 2] * 2 + [[False] * 6] * 2).flatten()
    assert valid[1].tolist() == torch.cat([cells, torch.tensor([True, False])]).repeat_interleave(2).tolist()


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (1, 1), (129, 75)])
def test_all_priors_are_valid_without_padding(size: tuple[int, int]) -> None:
    outs = outputs(LEVELS, size, anchors=2)
    assert valid_prior_mask(outs, LEVELS.strides, None).shape == (2, len(outs.priors))
    assert valid_prior_mask(outs, LEVELS.strides, None).all()
    assert valid_prior_mask(outs, LEVELS.strides, torch.tensor([size, size])).all()


def test_border_by_hand() -> None:
    """Squares of 16 around the cells of a 32 x 32 canvas.

    One that ends at the right or the lower edge is outside the image (MMDetection 3.x).
    """
    levels = Levels((4,), (8,))
    features = maps(levels, (32, 32), n=1)
    outs = Outputs({"cls": features}, grid_priors(features, levels, [make_base_points(8, 2.0)]))

    def cells(border: float | None, sizes: torch.Tensor | None) -> list[list[int]]:
        """The valid (row, column)."""
        return valid_prior_mask(outs, levels.strides, sizes, border).view(4, 4).nonzero().tolist()

    image = torch.tensor([[26, 32]])
    assert cells(0.0, image) == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert cells(0.0, torch.tensor([[24, 32]])) == [[1, 1], [1, 2]]
    assert cells(1.0, torch.tensor([[24, 32]])) == [[y, x] for y in (1, 2) for x in (1, 2, 3)]
    assert cells(8.0, image) == [[y, x] for y in range(4) for x in range(4)]
    assert cells(7.0, image) == [[y, x] for y in (1, 2, 3) for x in (1, 2, 3)]
    assert cells(0.0, None) == [[1, 1], [1, 2], [2, 1], [2, 2]]


# -- assignment


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    count=st.integers(0, 12),
    rule=st.sampled_from(RULES),
    share=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_invalid_priors_have_no_influence(seed: int, count: int, rule: Any, share: float) -> None:
    torch.manual_seed(seed)
    priors, target = outputs(LEVELS, (64, 96)).priors, many(count, 90, 60)
    valid = torch.rand(len(priors)) < share
    starts = torch.tensor([0, *priors.counts]).cumsum(0)[:-1]
    valid[starts] = True  # as the first cell of a level always is
    left = tuple(int(level.sum()) for level in valid.split(list(priors.counts)))
    few = Priors(priors.boxes[valid], priors.strides[valid], left)
    assigned = rule.assign(priors, target, valid)
    assert torch.equal(assigned[valid], rule.assign(few, target))
    assert (assigned[~valid] == IGNORED).all()
    assert torch.equal(rule.assign(priors, target, torch.ones_like(valid)), rule.assign(priors, target))


def test_iou_of_an_invalid_prior_does_not_count() -> None:
    """The best prior is invalid: the next one is positive, by its IoU of 0.6, or by 0.3 as the best that remains."""
    target = objects([[0, 0, 10, 10]])
    for second in ([0, 0, 10, 6], [0, 0, 10, 3]):
        priors, valid = row([[0, 0, 10, 10], second, [0, 0, 10, 2]], [False, True, True])
        assert MaxIoUAssigner().assign(priors, target, valid).tolist() == [IGNORED, 0, BACKGROUND]
        assert MaxIoUAssigner().match_boxes(priors.boxes, target, valid)[1][0] == 0
    assert MaxIoUAssigner().assign(priors, target).tolist() == [0, BACKGROUND, BACKGROUND]
    nothing = torch.zeros(3, dtype=torch.bool)
    assert MaxIoUAssigner().assign(priors, target, nothing).tolist() == [IGNORED] * 3
    assert MaxIoUAssigner(positive=0.0, negative=0.0).assign(priors, target, nothing).tolist() == [IGNORED] * 3


def test_nearest_valid_point_is_positive() -> None:
    priors, valid = row([[x - 4, 4, x + 4, 12] for x in (8, 16, 24)], [False, True, True])
    target = objects([[0, 0, 18, 16]])  # center (9, 8)
    assert PointAssigner().assign(priors, target, valid).tolist() == [IGNORED, 0, BACKGROUND]
    assert PointAssigner(pos_num=3).assign(priors, target, valid).tolist() == [IGNORED, 0, 0]
    assert PointAssigner().assign(priors, target).tolist() == [0, BACKGROUND, BACKGROUND]


def test_atss_counts_valid_candidates_only() -> None:
    """IoUs of 1, 1/3 and, invalid, 0.

    Mean plus deviation of the first two is 2/3 + 0.47, which none reaches; of all three 4/9 + 0.51, which the first
    reaches. The level has fewer valid priors than topk.
    """
    target = objects([[0, 0, 16, 16]])
    priors, valid = row([[0, 0, 16, 16], [8, 0, 24, 16], [32, 0, 48, 16]], [True, True, False])
    assert ATSSAssigner().assign(priors, target, valid).tolist() == [BACKGROUND, BACKGROUND, IGNORED]
    assert ATSSAssigner().assign(priors, target).tolist() == [0, BACKGROUND, BACKGROUND]
    assert ATSSAssigner(topk=1).assign(priors, target, torch.tensor([False, True, True])).tolist() == [
        IGNORED,
        BACKGROUND,
        BACKGROUND,
    ]
    shifted = objects([[8, 0, 24, 16]])
    assert ATSSAssigner(topk=1).assign(priors, shifted, torch.tensor([False, True, True])).tolist() == [
        IGNORED,
        0,
        BACKGROUND,
    ]
    assert ATSSAssigner().assign(priors, shifted, torch.tensor([False, True, False])).tolist() == [IGNORED, 0, IGNORED]
    assert ATSSAssigner().assign(priors, shifted, torch.zeros(3, dtype=torch.bool)).tolist() == [IGNORED] * 3


@pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)
def test_assignment_does_not_synchronize(rule: Any) -> None:
    """Meta tensors refuse every operation whose shape or branch depends on values, and tensors of other devices."""
    features = [m.to("meta") for m in maps(LEVELS, (64, 96))]
    outs = Outputs(
        {"cls": features}, grid_priors(features, LEVELS, [make_base_points(s).to("meta") for s in LEVELS.strides])
    )
    valid = valid_prior_mask(outs, LEVELS.strides, torch.zeros(2, 2, dtype=torch.int64, device="meta"), border=0.0)
    assigned = assign_batch(rule, outs.priors, [many(100, 90, 60).to("meta"), objects([]).to("meta")], valid)
    assert assigned.shape == (2, len(outs.priors))


# -- losses


def make_head(name: str) -> tuple[Any, Outputs, list[Target]]:
    """Make a head, random maps of the batch of SIZES that need gradients, and instances in both images."""
    torch.manual_seed(3)
    options = {"rpn": {"num": 10**6, "scale": 4.0}, "vfnet": {"norm": False}, "fcos": {"norm": False}}
    options |= {key: {"norm": False} for key in ("atss", "gfl")}
    head = HEADS[name](LEVELS, num_classes=3, **options.get(name, {})).eval()  # BatchNorm refuses a single cell
    raw = head([torch.zeros_like(m) for m in maps(LEVELS, (128, 160))])
    values = {k: [torch.randn_like(m) for m in levels] for k, levels in raw.maps.items()}
    for key in ("reg", "refine") if name == "vfnet" else ():  # distances, so that boxes overlap
        values[key] = [10 + 20 * torch.rand_like(m) for m in values[key]]
    targets = [
        objects([[5, 9, 60, 70], [70, 40, 150, 120], [90, 3, 120, 30]], [0, 1, 2]),
        objects([[2, 3, 45, 58], [40, 38, 62, 60], [59, 20, 62, 24]], [1, 2, 0]),
    ]
    return (
        head,
        Outputs({k: [m.requires_grad_() for m in levels] for k, levels in values.items()}, raw.priors),
        targets,
    )


def crop_to_image(head: Any, pair: Outputs, image: int) -> Outputs:
    """Crop the maps of one image to its own padded canvas."""
    height, width = (-(-int(s) // 32) * 32 for s in SIZES[image])
    places = [
        (slice(image, image + 1), slice(None), slice(math.ceil(height / s)), slice(math.ceil(width / s)))
        for s in LEVELS.strides
    ]
    cut = {
        k: [m.detach()[p].clone().requires_grad_() for m, p in zip(levels, places)] for k, levels in pair.maps.items()
    }
    return Outputs(cut, head([torch.zeros(1, 16, *m.shape[2:]) for m in next(iter(cut.values()))]).priors)


def gradient(loss: torch.Tensor, outs: Outputs) -> dict[str, list[torch.Tensor]]:
    every = [m for levels in outs.maps.values() for m in levels]
    gradients = iter(torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True))
    return {
        k: [torch.zeros_like(m) if (g := next(gradients)) is None else g for m in levels]
        for k, levels in outs.maps.items()
    }


def ratio(outer: dict[str, list[torch.Tensor]], inner: dict[str, list[torch.Tensor]], image: int) -> float:
    """Divide an image's gradient in a batch by its gradient as a single image, where that is largest."""
    pairs = [(a[image, :, : b.shape[2], : b.shape[3]], b[0]) for k in inner for a, b in zip(outer[k], inner[k])]
    a, b = max(pairs, key=lambda pair: float(pair[1].abs().max()))
    return float(a.flatten()[b.abs().argmax()] / b.abs().max() * b.flatten()[b.abs().argmax()].sign())


@pytest.mark.parametrize("name", ["retina", "rpn", "reppoints", "vfnet", "atss", "gfl", "fsaf", "yolof"])
def test_batch_equals_images_on_their_own_canvas(name: str) -> None:
    """An image's gradients in a batch are those of the single image, times its share of the batch's divisor.

    The shares sum to 1. Outside an image's own canvas there is no gradient, except of VFNet's scores, which count as
    background.
    """
    head, pair, targets = make_head(name)
    together = head.loss(pair, targets, SIZES)
    shares, parts = dict.fromkeys(together, 0.0), dict.fromkeys(together, 0.0)
    for i, target in enumerate(targets):
        own = crop_to_image(head, pair, i)
        single = head.loss(own, [target], SIZES[i : i + 1])
        for term in together:
            inner, outer = gradient(single[term], own), gradient(together[term], pair)
            assert any(g.any() for levels in inner.values() for g in levels), term
            share = ratio(outer, inner, i)
            for k, levels in inner.items():
                for g, whole in zip(levels, outer[k]):
                    expected = whole[i].clone() if (name, term) == ("vfnet", "loss_cls") else torch.zeros_like(whole[i])
                    if k == "cls" and expected.any():
                        assert (expected != 0).all()
                    expected[:, : g.shape[2], : g.shape[3]] = share * g[0]
                    assert torch.allclose(whole[i], expected, rtol=1e-4, atol=1e-7), (term, k)
            shares[term] += share
            parts[term] += share * float(single[term].detach())
    assert shares == pytest.approx(dict.fromkeys(together, 1.0), rel=1e-4)
    exact = {k for k in together if (name, k) != ("vfnet", "loss_cls")}
    assert {k: float(together[k].detach()) for k in exact} == pytest.approx({k: parts[k] for k in exact}, rel=1e-4)
    canvas = head.loss(pair, targets)
    assert any(float(canvas[k].detach()) != pytest.approx(float(together[k].detach()), rel=1e-3) for k in together)


def test_fcos_counts_all_points() -> None:
    head, pair, targets = make_head("fcos")
    together, canvas = head.loss(pair, targets, SIZES), head.loss(pair, targets)
    assert {k: float(v.detach()) for k, v in together.items()} == {k: float(v.detach()) for k, v in canvas.items()}


def test_anchors_beyond_the_edge_are_not_sampled() -> None:
    """Without instances every valid anchor is a negative: exactly those inside the image."""
    head = HEADS["rpn"](LEVELS, num=10**6, scale=2.0, allowed_border=3.0)
    raw = head(maps(LEVELS, (128, 160)))
    logits = [m.detach().requires_grad_() for m in raw.maps["cls"]]
    losses = head.loss(Outputs(raw.maps | {"cls": logits}, raw.priors), [objects([])] * 2, SIZES)
    grads = torch.autograd.grad(losses["loss_rpn_cls"], logits)
    sampled = torch.cat([g.permute(0, 2, 3, 1).flatten(1) for g in grads], dim=1) != 0  # (N, P)
    for i, (height, width) in enumerate(SIZES.tolist()):
        inside = [
            x1 >= -3 and y1 >= -3 and x2 < width + 3 and y2 < height + 3 for x1, y1, x2, y2 in raw.priors.boxes.tolist()
        ]
        assert 0 < sum(inside) < len(inside)
        assert sampled[i].tolist() == inside
    none = HEADS["rpn"](LEVELS, scale=64.0, allowed_border=0.0)  # every anchor is larger than the image
    losses = none.loss(none(maps(LEVELS, (128, 160))), [objects([[4, 4, 60, 60]])] * 2, SIZES)
    assert [float(v.detach()) for v in losses.values()] == [0, 0]


@pytest.mark.parametrize("border", [-1.0, math.nan])
def test_negative_border_is_refused(border: float) -> None:
    with pytest.raises(InputError, match="allowed_border="):
        HEADS["rpn"](LEVELS, allowed_border=border)


def test_shipped_configs_have_mmdetections_border() -> None:
    """MMDetection's Cascade and Grid R-CNN have allowed_border 0, the others -1, no limit."""
    families = {"cascade": 0, "grid": 0, "faster": None, "mask": None, "dynamic": None, "libra": None}
    borders = {family: configs.load(f"{family}_rcnn_r50").model.head.get("allowed_border") for family in families}
    assert borders == families


@pytest.mark.parametrize(
    ("name", "neck"), [("retinanet_tiny", "fpn"), ("retinanet_tiny", "aug_fpn"), ("faster_rcnn_r18", "fpn")]
)
def test_detectors_pass_the_sizes_to_their_heads(name: str, neck: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = [
        "model.backbone.name=test_resnet",
        "model.backbone.pretrained=false",
        "model.pyramid.channels=32",
        f"model.neck={neck}",
    ]
    model = create_model(name, *options, num_classes=3)
    calls = []
    real = model.head.loss
    monkeypatch.setattr(
        model.head,
        "loss",
        lambda outs, targets, sizes=None, *rest: calls.append(sizes) or real(outs, targets, sizes, *rest),
    )
    target = objects([[4, 4, 30, 30]])
    pair = batch(target, target)
    pair = Batch(pair.images, torch.tensor([[64, 96], [30, 40]]), pair.ids, pair.scales, pair.targets)
    assert all(v.isfinite() for v in model.loss(pair).values())
    assert len(calls) == (2 if neck == "aug_fpn" else 1)
    assert all(torch.equal(sizes, pair.sizes) for sizes in calls)
