"""Double-Head's stage: pooling by hand, options and parameters."""

from __future__ import annotations

import pytest
import torch

from fusedet.errors import InputError
from fusedet.models.detectors import create_model
from fusedet.models.roi import DoubleHeadStage
from fusedet.types import Levels


def test_double_head_pools_the_enlarged_roi_from_the_level_of_the_roi() -> None:
    """A RoI of 100 pixels belongs to the finest level, one of 130 to the next."""
    stage = DoubleHeadStage(Levels((8, 8), (4, 8)), 2, channels=8, box_channels=8, blocks=1).eval()
    seen = []
    stage.box_pooling.register_forward_hook(lambda m, inputs, output: seen.append((inputs[1], output)))
    features = [torch.ones(1, 8, 64, 64), torch.zeros(1, 8, 32, 32)]
    logits, deltas = stage(features, torch.tensor([[0.0, 60, 60, 160, 160], [0, 20, 20, 150, 150]]))
    assert (logits.shape, deltas.shape) == ((2, 3), (2, 8))
    ((rois, pooled),) = seen
    assert rois[0].tolist() == pytest.approx([0, 45, 45, 175, 175])
    assert torch.allclose(pooled[0], torch.tensor(1.0))
    assert not pooled[1].any()


def test_double_head_options() -> None:
    levels = Levels((8,), (4,))
    assert DoubleHeadStage(levels, 2, channels=8, box_channels=8, weight=0.5).loss_weights == {
        "loss_cls": 1.0,
        "loss_box": 1.0,
    }
    for options in ({"box_channels": 6}, {"enlarge": 0.0}, {"blocks": -1}, {"cls_weight": -1.0}):
        with pytest.raises(InputError, match="must be"):
            DoubleHeadStage(levels, 2, channels=8, **options)


def test_parameters() -> None:
    with torch.device("meta"):
        model = create_model("double_head_rcnn_r50", "model.backbone.pretrained=false")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 47_115_168
