"""The neck by itself and inside a detector."""

import pytest
import torch

import fusedet
from fusedet.types import Levels
from gated_neck import GatedNeck

LEVELS = Levels((16, 16), (8, 16))
FEATURES = [torch.randn(2, 16, 7, 5), torch.randn(2, 16, 4, 3)]
NECK = "model.neck=[fpn,{type: 'gated_neck:GatedNeck', reduction: 4}]"


def test_starts_as_the_identity():
    for x, y in zip(FEATURES, GatedNeck(LEVELS)(FEATURES), strict=True):
        torch.testing.assert_close(x, y)


def test_gate_is_twice_the_sigmoid():
    neck = GatedNeck(LEVELS)
    neck.gates[1].fc2.bias.data.fill_(torch.tensor(3.0).log())  # sigmoid(ln 3) = 3/4
    finest, coarsest = neck(FEATURES)
    torch.testing.assert_close(finest, FEATURES[0])
    torch.testing.assert_close(coarsest, 1.5 * FEATURES[1])


def test_reduction_out_of_range():
    with pytest.raises(fusedet.InputError, match=r"reduction=17 must be in 1\.\.16"):
        GatedNeck(LEVELS, reduction=17)


def test_in_a_detector():
    overrides = ["model.backbone={name: lcnet_050, pretrained: false}", "model.pyramid.channels=32"]
    plain, gated = (fusedet.create_model("retinanet_tiny", *overrides, *more) for more in ([], [NECK]))
    added = sum(p.numel() for p in gated.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == len(gated.neck.levels) * (32 * 8 + 8 + 8 * 32 + 32)
    gated(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
