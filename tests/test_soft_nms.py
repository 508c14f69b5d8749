"""Soft-NMS: tables by hand, in a detector and by config."""

from __future__ import annotations

import math

import pytest
import torch

from fusedet.errors import InputError
from fusedet.models.detectors import create_model
from fusedet.models.ops.boxes import select_detections
from fusedet.models.ops.soft_nms import SoftNMS
from fusedet.types import Candidates


def test_soft_nms_by_hand() -> None:
    """IoU of the first two boxes is 1/3: linear leaves 0.8 * 2/3, gaussian 0.8 * exp(-1/9 / 0.5)."""
    boxes = torch.tensor([[[0.0, 0, 10, 10], [5, 0, 15, 10], [0, 0, 10, 10]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0, 0, 1]])
    values, index = SoftNMS("linear").select(boxes, scores, labels, 0.3, 4)
    assert index[0, :3].tolist() == [0, 2, 1]
    assert values[0].tolist() == pytest.approx([0.9, 0.7, 0.8 * 2 / 3, -1])
    values, index = SoftNMS("gaussian").select(boxes, scores, labels, 0.3, 3)
    assert values[0].tolist() == pytest.approx([0.9, 0.7, 0.8 * math.exp(-1 / 9 / 0.5)])
    values, _ = SoftNMS("linear").select(boxes, scores, labels, 0.4, 3)
    assert values[0].tolist() == pytest.approx([0.9, 0.8, 0.7])  # below the threshold nothing decays
    values, _ = SoftNMS("linear", min_score=0.6).select(boxes, scores, labels, 0.3, 3)
    assert values[0].tolist() == pytest.approx([0.9, 0.7, -1])


def test_soft_nms_of_a_detector_keeps_more_than_hard_nms() -> None:
    torch.manual_seed(0)
    corner = 60 * torch.rand(1, 40, 2)
    candidates = Candidates(torch.cat([corner, corner + 10 + 20 * torch.rand(1, 40, 2)], dim=2), torch.rand(1, 40, 2))
    sizes = torch.tensor([[90, 90]])
    hard = select_detections(candidates, sizes, (40,), iou=0.3, max_det=80)
    soft = select_detections(candidates, sizes, (40,), iou=0.3, max_det=80, soft=SoftNMS())
    assert int(hard.counts) < int(soft.counts) <= 80
    assert (soft.scores[0, :-1] >= soft.scores[0, 1:]).all()
    assert torch.equal(hard.boxes[0, 0], soft.boxes[0, 0])


def test_soft_nms_by_config() -> None:
    model = create_model("retinanet_tiny", "test.soft_nms=gaussian", "test.soft_sigma=0.3", num_classes=2)
    assert model.selection["soft"] == SoftNMS("gaussian", 0.3, 0.001)
    with pytest.raises(InputError, match="soft_nms"):
        create_model("retinanet_tiny", "test.soft_nms=hard", num_classes=2)
    with pytest.raises(InputError, match="sigma"):
        SoftNMS("gaussian", sigma=0.0)
