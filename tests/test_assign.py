"""Assignment by IoU, against tables made by hand and a slow loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou

from fusedet.models.ops import assigners
from fusedet.models.ops.assigners import BACKGROUND, IGNORED, MaxIoUAssigner
from fusedet.types import Priors, Target


def make(boxes: list, objects: list) -> tuple[Priors, Target]:
    priors = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
    target = torch.tensor(objects, dtype=torch.float).reshape(-1, 4)
    return Priors(priors, torch.ones(len(priors)), (len(priors),)), Target(
        target, torch.zeros(len(target), dtype=torch.int64)
    )


def test_table() -> None:
    """IoUs with the instance (0, 0, 10, 10): 1, 0.5, 0.45, 0.2, 0."""
    priors, target = make(
        [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 4.5], [0, 0, 10, 2], [50, 50, 60, 60]], [[0, 0, 10, 10]]
    )
    assert MaxIoUAssigner().assign(priors, target).tolist() == [0, 0, IGNORED, BACKGROUND, BACKGROUND]


def test_low_quality() -> None:
    """An instance without a prior of IoU 0.5 takes its best ones, both of a tie; of two instances that claim one prior,
    the later takes it."""
    priors, target = make([[0, 0, 10, 2], [0, 8, 10, 10], [0, 0, 10, 1]], [[0, 0, 10, 10]])
    assert MaxIoUAssigner().assign(priors, target).tolist() == [0, 0, BACKGROUND]
    assert MaxIoUAssigner(low_quality=False).assign(priors, target).tolist() == [BACKGROUND] * 3
    assert MaxIoUAssigner(min_positive=0.3).assign(priors, target).tolist() == [BACKGROUND] * 3
    priors, target = make([[0, 0, 10, 2]], [[0, 0, 10, 10], [0, 0, 10, 12]])
    assert MaxIoUAssigner().assign(priors, target).tolist() == [1]


def test_an_instance_without_overlapping_priors_takes_none() -> None:
    priors, target = make([[0, 0, 10, 10]], [[500, 500, 510, 510]])
    assert MaxIoUAssigner().assign(priors, target).tolist() == [BACKGROUND]


def test_no_instances() -> None:
    priors, target = make([[0, 0, 10, 10]], [])
    assert MaxIoUAssigner().assign(priors, target).tolist() == [BACKGROUND]


def slow(rule: MaxIoUAssigner, priors: Priors, target: Target) -> list[int]:
    """The rule, prior by prior and instance by instance."""
    overlap = box_iou(target.boxes, priors.boxes)
    assigned = []
    for p in range(len(priors)):
        best = overlap[:, p].max().item()
        instance = int(overlap[:, p].argmax())
        assigned.append(instance if best >= rule.positive else BACKGROUND if best < rule.negative else IGNORED)
    for g in range(len(target)):
        peak = overlap[g].max()
        if peak > 0 and peak >= rule.min_positive:
            for p in range(len(priors)):
                if overlap[g, p] == peak:
                    assigned[p] = g
    return assigned


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 40), st.sampled_from([1, 3, 64]))
def test_against_a_slow_loop(seed: int, objects: int, count: int, chunk: int) -> None:
    torch.manual_seed(seed)
    corners = torch.randint(0, 8, (objects + count, 2)).float()  # a coarse grid makes ties
    boxes = torch.cat([corners, corners + torch.randint(1, 6, (objects + count, 2))], dim=1)
    priors, target = make(boxes[objects:].tolist(), boxes[:objects].tolist())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assigners, "INSTANCES_AT_ONCE", chunk)
        assert MaxIoUAssigner().assign(priors, target).tolist() == slow(MaxIoUAssigner(), priors, target)
