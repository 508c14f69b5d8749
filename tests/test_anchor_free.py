"""FreeAnchor, FoveaBox and FSAF: small cases by hand, and losses against their literal slow form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from fakes import maps, objects
from fusedet.errors import InputError
from fusedet.models.detectors import create_model
from fusedet.models.heads import FoveaHead, FreeAnchorHead, FSAFHead
from fusedet.models.ops.boxes import box_centers, decode_boxes, encode_boxes, grid_priors, make_base_points
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.ops.region_assigners import CenterRegionAssigner, FoveaAssigner
from fusedet.types import Candidates, Levels, Outputs, Priors, Target
from small import float64

LEVELS = Levels((32, 32), (8, 16))
TARGETS = [
    objects([[4, 4, 40, 44], [10, 12, 30, 30], [6, 8, 44, 40]], [0, 1, 0]),
    objects([]),
    objects([[30, 2, 90, 60]], [2]),
]


def run_head(make: Any, seed: int = 0, **options: Any) -> tuple[Any, Outputs, list[Target]]:
    """A head with random weights in float64, its outputs on random maps, and targets."""
    torch.manual_seed(seed)
    head = make(LEVELS, 3, convs=1, **options).double()
    for p in head.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    targets = [Target(t.boxes.double(), t.labels) for t in TARGETS]
    return head, head(maps(LEVELS, n=3, dtype=torch.float64)), targets


def focal(logit: Tensor, is_positive: bool, alpha: float, gamma: float) -> Tensor:
    p = logit.sigmoid()
    return -alpha * (1 - p) ** gamma * p.log() if is_positive else -(1 - alpha) * p**gamma * (1 - p).log()


def smooth_l1(x: Tensor, beta: float) -> Tensor:
    return torch.where(x.abs() < beta, 0.5 * x * x / beta, x.abs() - 0.5 * beta)


def grid(*sides: tuple[int, int], strides: tuple[int, ...] = (8, 16), offset: float = 0.5) -> Priors:
    """Points of levels with these heights and widths."""
    levels = Levels((1,) * len(sides), strides[: len(sides)])
    features = [torch.zeros(1, 1, *side) for side in sides]
    return grid_priors(features, levels, [make_base_points(stride) for stride in levels.strides], offset)


# -- FreeAnchor


def test_free_anchor_loss_is_its_literal_form() -> None:
    with float64():
        head, outputs, targets = run_head(FreeAnchorHead, topk=7, threshold=0.1)
        losses = head.loss(outputs, targets)
        anchors = outputs.priors.boxes
        scores = flatten_maps(outputs.maps["cls"], 3).sigmoid()
        deltas = flatten_maps(outputs.maps["reg"], 4)
        stds = torch.tensor([0.1, 0.1, 0.2, 0.2])
        positive, negative = torch.zeros(()), torch.zeros(())
        for n, target in enumerate(targets):
            predicted = decode_boxes(anchors, deltas[n] * stds)
            matched = torch.zeros(len(anchors), 3)
            for box, label in zip(target.boxes, target.labels.tolist()):
                bag = box_iou(box[None], anchors)[0].topk(7).indices
                values = []
                for a in bag.tolist():
                    wanted = encode_boxes(anchors[a, None], box[None])[0] / stds
                    cost = 0.75 * smooth_l1(deltas[n, a] - wanted, 0.11).sum()
                    values.append(scores[n, a, label] * torch.exp(-cost))
                weights = [1 / (1 - v) for v in values]
                positive = positive - torch.log(sum(w * v for w, v in zip(weights, values)) / sum(weights))
                ious = box_iou(box[None], predicted)[0].detach()
                for a, iou in enumerate(ious.tolist()):
                    share = (iou - 0.1) / (max(float(ious.max()), 0.1 + 1e-12) - 0.1)
                    matched[a, label] = max(float(matched[a, label]), min(max(share, 0), 1))
            p = scores[n] * (1 - matched)
            negative = negative - (p**2 * torch.log(1 - p)).sum()
        assert ((matched > 0) & (matched < 1)).any()
        assert torch.allclose(losses["loss_positive"], positive / 4, rtol=1e-9)
        assert torch.allclose(losses["loss_negative"], negative / (4 * 7), rtol=1e-9)
        parameters = list(head.parameters())
        ours = torch.autograd.grad(sum(losses.values()), parameters, retain_graph=True)
        theirs = torch.autograd.grad(positive / 4 + negative / 28, parameters)
        assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-12) for a, b in zip(ours, theirs))


# -- FoveaBox


def test_fovea_cells_by_hand() -> None:
    """A box of 40 x 32 at (8, 8): in strides x 1..6 and y 1..5. sigma 0.4: columns ceil(2.5 - 0.5) = 2 to
    floor(4.5 - 0.5) = 4, rows ceil(2.2 - 0.5) = 2 to floor(3.8 - 0.5) = 3."""
    priors = grid((6, 8))
    assigned = FoveaAssigner([(1, 64)]).assign(priors, objects([[8, 8, 48, 40]]))
    assert [(i // 8, i % 8) for i in (assigned == 0).nonzero().flatten().tolist()] == [
        (row, column) for row in (2, 3) for column in (2, 3, 4)
    ]


def test_fovea_smaller_instances_and_later_equal_ones_win() -> None:
    large, small = [0, 0, 64, 48], [16, 16, 40, 40]
    priors = grid((6, 8), (3, 4))
    assigner = FoveaAssigner([(1, 64), (32, 128)])
    both = assigner.assign(priors, objects([small, large]))
    alone = assigner.assign(priors, objects([small]))
    assert torch.equal(both[:48] == 0, alone[:48] == 0)
    assert (both[:48] == 1).any()
    assert (both[48:] == 1).any()  # its root of area, 55, is in both ranges
    assert not (alone[48:] == 0).any()  # 24 is in the first only
    twins = assigner.assign(priors, objects([small, small]))
    assert set(twins.tolist()) == {-1, 1}


def test_fovea_cells_of_a_box_beyond_the_map_are_clipped_to_it() -> None:
    """MMDetection clips both ends, so that a box right of the map takes its last column."""
    assigned = FoveaAssigner([(1, 64)]).assign(grid((4, 4)), objects([[60, 0, 100, 32]]))
    columns = {i % 4 for i in (assigned == 0).nonzero().flatten().tolist()}
    assert columns == {3}


@pytest.mark.parametrize("align", [False, True])
def test_fovea_loss_is_its_literal_form(align: bool) -> None:
    with float64():
        head, outputs, targets = run_head(FoveaHead, align=align)
        losses = head.loss(outputs, targets)
        logits, logs = flatten_maps(outputs.maps["cls"], 3), flatten_maps(outputs.maps["reg"], 4)
        priors = outputs.priors
        cls, box, positives = torch.zeros(()), torch.zeros(()), 0
        for n, target in enumerate(targets):
            assigned = head.assigner.assign(priors, target).tolist()
            for p, instance in enumerate(assigned):
                label = int(target.labels[instance]) if instance >= 0 else -1
                cls = cls + sum(focal(logits[n, p, k], k == label, 0.4, 1.5) for k in range(3))
                if instance < 0:
                    continue
                positives += 1
                x, y = box_centers(priors.boxes[p]).tolist()
                x1, y1, x2, y2 = target.boxes[instance].tolist()
                base = 2 * float(priors.strides[p])
                wanted = [math.log(min(max(d / base, 1 / 16), 16)) for d in (x - x1, y - y1, x2 - x, y2 - y)]
                box = box + smooth_l1(logs[n, p] - torch.tensor(wanted), 0.11).sum()
        assert positives > 5
        assert torch.allclose(losses["loss_cls"], cls / (positives + 3), rtol=1e-9)
        assert torch.allclose(losses["loss_box"], box / positives, rtol=1e-9)


def test_fovea_boxes_end_one_pixel_inside_the_image() -> None:
    candidates = Candidates(torch.tensor([[[-5.0, -5, 70, 70]]]), torch.full((1, 1, 1), 0.9))
    detections = FoveaHead(LEVELS, 1, convs=1).select(candidates, torch.tensor([[64, 48]]), (1,))
    assert detections.boxes[0, 0].tolist() == [0, 0, 47, 63]


# -- FSAF


def test_center_regions_by_hand() -> None:
    """Cells of 8 pixels around (8 i, 8 j); the central fifth of (8, 8, 56, 48) is (27.2, 24, 36.8, 32)."""
    priors = grid((7, 8), offset=0.0)
    assigned, contested = CenterRegionAssigner(2).assign_with_contested(priors, objects([[8, 8, 56, 48]], [1]))
    cells = [(i // 8, i % 8) for i in (assigned == 0).nonzero().flatten().tolist()]
    # columns 3 (20..28), 4 (28..36) and 5 (36..44) and rows 3 (20..28) and 4 (28..36) overlap by more than 1 %
    assert cells == [(row, column) for row in (3, 4) for column in (3, 4, 5)]
    assert not contested.any()


def test_contested_cells_lose_the_other_class_only() -> None:
    priors = grid((7, 8), offset=0.0)
    large, small = [0, 0, 64, 56], [24, 20, 40, 36]
    assigner = CenterRegionAssigner(3)
    assigned, contested = assigner.assign_with_contested(priors, objects([large, small], [2, 1]))
    alone = [assigner.assign_with_contested(priors, objects([box]))[0] == 0 for box in (large, small)]
    assert torch.equal(assigned == 1, alone[1])  # the smaller one wins
    assert torch.equal(contested[:, 2], alone[0] & alone[1])
    assert not contested[:, :2].any()
    assert contested.any()
    same, contested = assigner.assign_with_contested(priors, objects([large, small], [1, 1]))
    assert torch.equal(same >= 0, alone[0] ^ alone[1])  # of the same class: background
    assert torch.equal(contested[:, 1], alone[0] & alone[1])


def test_fsaf_loss_is_its_literal_form() -> None:
    with float64():
        head, outputs, targets = run_head(FSAFHead)
        sizes = torch.tensor([[64, 96], [64, 64], [50, 90]])
        losses = head.loss(outputs, targets, sizes)
        logits, distances = flatten_maps(outputs.maps["cls"], 3), flatten_maps(outputs.maps["reg"], 4)
        priors = outputs.priors
        levels = [0] * priors.counts[0] + [1] * priors.counts[1]
        cls, box, kept = torch.zeros(()), torch.zeros(()), 0
        chosen_levels = set()
        for n, target in enumerate(targets):
            assigned, contested = head.assigner.assign_with_contested(priors, target)
            padded = (-(-sizes[n] // 32) * 32).tolist()
            by_level: dict[tuple[int, int], list[tuple[int, Tensor, Tensor, Tensor]]] = {}
            for p, instance in enumerate(assigned.tolist()):
                x, y = box_centers(priors.boxes[p])
                if x >= padded[1] or y >= padded[0]:
                    continue
                label = int(target.labels[instance]) if instance >= 0 else -1
                terms = [focal(logits[n, p, k], k == label, 0.25, 2) * (not contested[p, k]) for k in range(3)]
                cls = cls + sum(term for k, term in enumerate(terms) if k != label)
                if instance >= 0:
                    top, bottom, left, right = distances[n, p].clamp(min=1e-4) * 4 * priors.strides[p]
                    predicted = torch.stack([x - left, y - top, x + right, y + bottom])
                    loss = -box_iou(predicted[None], target.boxes[instance, None]).clamp(min=1e-6).log()[0, 0]
                    by_level.setdefault((instance, levels[p]), []).append((p, sum(terms) + loss, terms[label], loss))
            for instance in range(len(target)):
                means = {k[1]: sum(t[1] for t in v) / len(v) for k, v in by_level.items() if k[0] == instance}
                if not means:
                    continue
                best = min(means, key=lambda level: float(means[level].detach()))
                chosen_levels.add((best, len(means)))
                kept += len(by_level[instance, best])
                cls = cls + sum(t[2] for t in by_level[instance, best])
                box = box + sum(t[3] for t in by_level[instance, best])
        assert (max(n for _, n in chosen_levels), len({best for best, _ in chosen_levels})) == (2, 2)
        assert torch.allclose(losses["loss_cls"], cls / kept, rtol=1e-8)
        assert torch.allclose(losses["loss_box"], box / kept, rtol=1e-8)


# -- parameters


@pytest.mark.parametrize(
    ("name", "count"), [("freeanchor_r50", 37_743_348), ("foveabox_r50", 36_194_388), ("fsaf_r50", 36_194_388)]
)
def test_parameters(name: str, count: int) -> None:
    with torch.device("meta"):
        model = create_model(name, "model.backbone.pretrained=false")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (FreeAnchorHead, {"topk": 0}, "topk=0"),
        (FreeAnchorHead, {"threshold": 1.0}, "threshold=1.0"),
        (FoveaHead, {"sigma": 0.0}, "sigma=0.0"),
        (FoveaHead, {"ranges": [(1, 64)]}, "2 pairs"),
        (FSAFHead, {"scale": 2.0}, "scale=2.0"),
    ],
)
def test_wrong_options_are_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make(LEVELS, 3, **options)


def test_alignment_needs_channels_for_its_offsets() -> None:
    with pytest.raises(InputError, match="multiples of 4, got 6"):
        FoveaHead(Levels((6,), (8,)), 3, align=True, norm=False)


def test_alignment_has_no_tower_to_interact_with() -> None:
    with pytest.raises(InputError, match="align"):
        create_model("foveabox_tiny", "model.head.align=true", "model.interact=msil")
