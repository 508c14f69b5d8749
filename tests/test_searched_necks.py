"""NAS-FPN, DyHead and the dilated encoder: small cases by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fakes import maps
from fusedet.errors import InputError
from fusedet.interop.mmdetection.weight_names import rename_weight
from fusedet.interop.mmdetection.weight_tables import NECK_RULES
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


@pytest.mark.parametrize("make", [NASFPN, DilatedEncoder])
def test_training_on_a_single_small_image(make: Callable[..., nn.Module]) -> None:
    """Maps of one cell, where plain BatchNorm fails."""
    levels = Levels((8, 16, 24), (8, 16, 32))
    neck = make(levels, 8).train()
    outputs = neck(maps(levels, (32, 32), n=1))
    assert outputs[-1].shape == (1, 8, 1, 1)
    sum(x.square().sum() for x in outputs).backward()
    assert all(x.isfinite().all() for x in (*neck.buffers(), *(p.grad for p in neck.parameters())))


def test_the_dilated_encoder_by_mmdetections_names() -> None:
    """The weights of a checkpoint of YOLOF, applied one after the other as its paper's figure 5 shows."""
    torch.manual_seed(0)
    neck = DilatedEncoder(Levels((4, 6), (16, 32)), 8, dilations=(1, 3)).eval()
    shapes = {"lateral_conv": (8, 6, 1, 1), "fpn_conv": (8, 8, 3, 3)}
    state = {}
    for name, shape in shapes.items():
        state |= {f"{name}.weight": torch.randn(shape) / 4, f"{name}.bias": torch.randn(shape[0])}
    blocks = [f"dilated_encoder_blocks.{i}.conv{j}" for i in (0, 1) for j in (1, 2, 3)]
    for block, shape in zip(blocks, [(2, 8, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)] * 2):
        state[f"{block}.conv.weight"] = torch.randn(shape)
    norms = {"lateral_norm": 8, "fpn_norm": 8} | {f"{block}.bn": 8 if block[-1] == "3" else 2 for block in blocks}
    for name, width in norms.items():
        state |= {f"{name}.{key}": torch.rand(width) + 0.5 for key in ("weight", "bias", "running_mean", "running_var")}
    renamed = {rename_weight(key, NECK_RULES["dilated_encoder"]): x for key, x in state.items()}
    missing, unexpected = neck.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias)

    last = torch.randn(1, 6, 5, 7)
    x = norm(F.conv2d(last, state["lateral_conv.weight"], state["lateral_conv.bias"]), "lateral_norm")
    x = norm(F.conv2d(x, state["fpn_conv.weight"], state["fpn_conv.bias"], padding=1), "fpn_norm")
    for i, dilation in enumerate((1, 3)):
        y = x
        for j in (1, 2, 3):
            layer, spread = f"dilated_encoder_blocks.{i}.conv{j}", dilation if j == 2 else 1
            padding = spread if j == 2 else 0
            y = F.conv2d(y, state[f"{layer}.conv.weight"], padding=padding, dilation=spread)
            y = F.relu(norm(y, f"{layer}.bn"))
        x = x + y
    with torch.no_grad():
        assert torch.allclose(neck([torch.randn(1, 4, 10, 14), last])[0], x, atol=1e-4)
