"""Anchors, box encoding and the selection of detections."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from fusedet.models.ops.boxes import (
    MAX_RATIO,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    grid_priors,
    make_base_anchors,
    nms_keep_mask,
    select_detections,
)
from fusedet.types import Candidates, Levels

side = st.floats(1, 500)
corner = st.floats(-100, 600)


def test_anchors_by_hand() -> None:
    """Stride 8, base 4: areas (32 * 2^(i/3))^2 for every ratio, ratio = height / width, not rounded."""
    shapes = make_base_anchors(8, 4, 3, (0.5, 1.0, 2.0))
    assert shapes.shape == (9, 4)
    assert shapes[3].tolist() == [-16, -16, 16, 16]  # ratio 1, first octave scale
    w, h = (shapes[:, 2:] - shapes[:, :2]).unbind(1)
    assert torch.allclose(h / w, torch.tensor([0.5] * 3 + [1.0] * 3 + [2.0] * 3))
    assert torch.allclose((w * h).sqrt(), torch.tensor([32 * 2 ** (i / 3) for i in range(3)] * 3))
    assert torch.allclose(shapes[0], torch.tensor([-22.6274, -11.3137, 22.6274, 11.3137]), atol=1e-4)


def test_grid_by_hand() -> None:
    """Row by row, a cell's anchors together, level by level; x = column * stride."""
    levels = Levels((1, 1), (4, 8))
    shapes = [torch.tensor([[-1.0, -1, 1, 1], [-2, -2, 2, 2]]), torch.tensor([[-3.0, -3, 3, 3]])]
    priors = grid_priors([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 2)], levels, shapes)
    assert priors.counts == (12, 2)
    assert priors.strides.tolist() == [4.0] * 12 + [8.0] * 2
    assert priors.boxes[0].tolist() == [-1, -1, 1, 1]
    assert priors.boxes[1].tolist() == [-2, -2, 2, 2]
    assert priors.boxes[2].tolist() == [3, -1, 5, 1]  # column 1
    assert priors.boxes[6].tolist() == [-1, 3, 1, 5]  # row 1
    assert priors.boxes[13].tolist() == [5, -3, 11, 3]
    halves = grid_priors([torch.zeros(1, 1, 1, 1)], Levels((1,), (8,)), [torch.zeros(1, 4)], offset=0.5)
    assert halves.boxes.tolist() == [[4.0, 4.0, 4.0, 4.0]]


@given(st.tuples(corner, corner, side, side), st.tuples(corner, corner, side, side))
def test_decode_inverts_encode(box_sides: tuple[float, ...], prior_sides: tuple[float, ...]) -> None:
    (x, y, w, h), (px, py, pw, ph) = box_sides, prior_sides
    box, prior = (
        torch.tensor([[x, y, x + w, y + h]], dtype=torch.float64),
        torch.tensor([[px, py, px + pw, py + ph]], dtype=torch.float64),
    )
    back = decode_boxes(prior, encode_boxes(prior, box))
    bound = math.exp(MAX_RATIO)
    expected_w, expected_h = min(max(w, pw / bound), pw * bound), min(max(h, ph / bound), ph * bound)
    center = [x + w / 2, y + h / 2]
    expected = [
        center[0] - expected_w / 2,
        center[1] - expected_h / 2,
        center[0] + expected_w / 2,
        center[1] + expected_h / 2,
    ]
    assert torch.allclose(back, torch.tensor([expected], dtype=torch.float64), atol=1e-6)


def test_decode_by_hand() -> None:
    prior = torch.tensor([[10.0, 20, 30, 60]])  # 20 x 40 around (20, 40)
    codes = torch.tensor([[0.5, -0.25, math.log(2), 0.0]])
    assert torch.allclose(decode_boxes(prior, codes), torch.tensor([[10.0, 10, 50, 50]]))
    grown = decode_boxes(prior, torch.tensor([[0.0, 0, 100, 100]]))
    assert torch.allclose(grown[0, 2:] - grown[0, :2], torch.tensor([20.0, 40]) * 62.5)


def test_clip() -> None:
    boxes = torch.tensor([[[-5.0, -5, 50, 50]], [[1, 2, 3, 4]]])
    assert clip_boxes(boxes, torch.tensor([[20, 30], [3, 3]])).tolist() == [[[0, 0, 30, 20]], [[1, 2, 3, 3]]]


def candidates(n: int, p: int, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    corner = torch.rand(n, p, 2) * 100
    return (
        torch.cat([corner, corner + torch.rand(n, p, 2) * 40], dim=2),
        torch.rand(n, p, k),
        torch.tensor([[90, 110]] * n),
    )


@pytest.mark.parametrize(("score", "pre", "most"), [(0.05, 1000, 100), (0.5, 40, 7), (0.999, 5, 3)])
def test_select_detections_against_batched_nms(score: float, pre: int, most: int) -> None:
    """Level by level and class by class, by torchvision's batched_nms on the pairs above the threshold."""
    boxes, scores, sizes = candidates(2, 90, 3)
    counts = (60, 25, 5)
    actual = select_detections(
        Candidates(boxes, scores), sizes, counts, score=score, iou=0.5, pre_nms=pre, max_det=most
    )
    clipped = clip_boxes(boxes, sizes)
    for i in range(2):
        kept = []
        for start, count in zip((0, 60, 85), counts):
            flat = scores[i, start : start + count].flatten()
            best = flat.argsort(descending=True)[:pre]
            kept.append(best[flat[best] > score] + start * 3)
        pairs = torch.cat(kept)
        pairs = pairs[(clipped[i, pairs // 3, 2:] > clipped[i, pairs // 3, :2]).all(dim=1)]
        b, s, c = clipped[i, pairs // 3], scores[i].flatten()[pairs], pairs % 3
        keep = batched_nms(b, s, c, 0.5)[:most]
        n = int(actual.counts[i])
        assert n == len(keep)
        assert torch.equal(actual.boxes[i, :n], b[keep])
        assert torch.equal(actual.scores[i, :n], s[keep])
        assert torch.equal(actual.labels[i, :n], c[keep])
        assert actual.boxes.shape == (2, most, 4)
        assert not actual.scores[i, n:].any()


def test_select_detections_without_scores() -> None:
    boxes, scores, sizes = candidates(1, 10, 2)
    actual = select_detections(Candidates(boxes, scores * 0), sizes, (10,))
    assert actual.counts.tolist() == [0]
    assert actual.boxes.shape == (1, 100, 4)


def test_boxes_without_area_are_not_detected() -> None:
    boxes = torch.tensor([[[200.0, 10, 300, 50], [10, 10, 10, 20], [10, 10, 20, 20]]])  # outside, without width, valid
    actual = select_detections(Candidates(boxes, torch.full((1, 3, 1), 0.9)), torch.tensor([[100, 100]]), (3,))
    assert actual.counts.tolist() == [1]
    assert actual.boxes[0, 0].tolist() == [10, 10, 20, 20]


def test_exported_selection_with_one_detection_or_none() -> None:
    class Select(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return select_detections(Candidates(boxes, scores), torch.tensor([[64, 64]]), [20], max_det=5)[:4]

    boxes = torch.rand(1, 20, 4).sort(dim=2).values * 60
    many, none, few = torch.rand(1, 20, 3), torch.zeros(1, 20, 3), torch.zeros(1, 20, 3)
    few[0, 7, 1] = 0.9
    exported = torch.export.export(Select(), (boxes, many), strict=False).module()
    for scores in (many, none, few):
        assert all(torch.equal(a, b) for a, b in zip(Select()(boxes, scores), exported(boxes, scores)))
    assert [int(exported(boxes, scores)[3]) for scores in (none, few)] == [0, 1]


def test_class_specific_boxes() -> None:
    boxes = torch.tensor([[[[0.0, 0, 10, 10], [20, 20, 30, 30]], [[40, 40, 50, 50], [0, 0, 9, 10]]]])
    scores = torch.tensor([[[0.2, 0.9], [0.8, 0.7]]])
    actual = select_detections(Candidates(boxes, scores), torch.tensor([[64, 45]]), [2])
    assert actual.counts.tolist() == [4]
    assert actual.labels[0, :4].tolist() == [1, 0, 1, 0]
    assert actual.boxes[0, :4].tolist() == [[20, 20, 30, 30], [40, 40, 45, 50], [0, 0, 9, 10], [0, 0, 10, 10]]


def test_nms_keep_mask_by_hand() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 4]]] * 2)
    scores = torch.tensor([[0.5, 0.9, 0.1, 0.8], [0.9, 0.5, 0.1, 0.8]])
    assert nms_keep_mask(boxes, scores, 0.5).tolist() == [[False, True, True, True], [True, False, True, True]]
    assert nms_keep_mask(boxes[:, :1], scores[:, :1], 0.5).tolist() == [[True], [True]]
    assert nms_keep_mask(boxes[:, :0], scores[:, :0], 0.5).shape == (2, 0)
