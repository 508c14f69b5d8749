"""NAS-FPN, DyHead and the dilated encoder: small cases by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.necks import NASFPN, DilatedEncoder, DyHead
from fusedet.models.necks.dyhead import DynamicReLU
from fusedet.models.necks.nas_fpn import _resize
from fusedet.types import Levels


def test_dynamic_relu_by_hand() -> None:
    """Without weights both gates are at 1/2 - 1/2 = 0: max(x, 0). Biases of 3 open slope and shift to 1/2."""
    relu = DynamicReLU(4)
    for p in relu.parameters():
        torch.nn.init.zeros_(p)
    x = torch.tensor([[-1.0, 2, -3, 4]])[..., None, None]
    assert relu(x).flatten().tolist() == [0, 2, 0, 4]
    torch.nn.init.constant_(relu.expand.bias, 3.0)
    assert relu(x).flatten().tolist() == pytest.approx([-0.5, 4.5, -2.5, 8.5])  # max(2 x + 1/2, x + 1/2)


def test_a_fresh_dyhead_block_samples_plainly() -> None:
    """Offsets start at 0 and masks at 1/2, so that the own level's convolution is half a plain one."""
    block = DyHead(Levels((16,), (8,)), blocks=1).blocks[0]
    x = torch.randn(1, 16, 5, 6)
    kept = []
    block.own.conv.register_forward_hook(lambda m, i, o: kept.append(o))
    block([x])
    torch.nn.init.zeros_(block.offset.bias)
    assert torch.allclose(kept[0], F.conv2d(x, block.own.conv.weight, padding=1) / 2, atol=1e-5)


def test_nas_fpn_resizes_by_hand() -> None:
    x = torch.arange(1.0, 16).reshape(1, 1, 3, 5)
    like = torch.zeros(1, 1, 2, 3)
    # padded to 4 x 6 by zeros below and at the right, then the largest of each 2 x 2
    assert _resize(x, like).flatten().tolist() == [7, 9, 10, 12, 14, 15]
    assert _resize(x, torch.zeros(1, 1, 3, 5)) is x
    assert _resize(x, torch.zeros(1, 1, 6, 10))[0, 0, :2, :4].tolist() == [[1, 1, 2, 2]] * 2


def test_neck_options_are_checked() -> None:
    levels = Levels((8, 16), (8, 16))
    with pytest.raises(InputError, match=r"coarsest=7"):
        NASFPN(levels, 16, 3, 5)
    with pytest.raises(InputError, match="repeats=0"):
        NASFPN(levels, 16, repeats=0)
    with pytest.raises(InputError, match="multiple of 16"):
        DyHead(Levels((24, 24), (8, 16)))
    with pytest.raises(InputError, match="blocks=0"):
        DyHead(Levels((16,), (8,)), blocks=0)
    with pytest.raises(InputError, match="dilations"):
        DilatedEncoder(levels, 16, 4, 4, dilations=(0,))
