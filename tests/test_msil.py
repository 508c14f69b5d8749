"""MSIL against its equations, its options and its parameter counts."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.heads import FCOSHead, RetinaHead, VFNetHead
from fusedet.models.modules import MSIL
from fusedet.models.ops.layers import GroupNorm
from fusedet.types import Levels

C = 32


def count(**options: object) -> int:
    return sum(p.numel() for p in MSIL(256, **options).parameters())


def branches(size: tuple[int, int] = (5, 7), channels: int = C, n: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(n, channels, *size), torch.randn(n, channels, *size)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 2_575_136),
        ({"align": False}, 1_328_672),
        ({"separate": False}, 1_378_048),
        ({"to_reg": False}, 1_976_592),
        ({"to_cls": False}, 1_976_592),
        ({"to_cls": False, "to_reg": False}, 0),
        ({"encoder_kernel": 1, "decoder_kernel": 1}, 477_984),
        ({"fuse_kernel": 3}, 3_623_712),
        ({"norm": "none"}, 2_575_136 - 3 * 256),  # biases in place of scales and shifts
        ({"activation": "none", "gate": "hard_sigmoid"}, 2_575_136),
    ],
)
def test_parameters_variant_by_variant(options: dict, parameters: int) -> None:
    """The computed counts of the specification, section E."""
    assert count(**options) == parameters


# -- the equations, literally, with loops over pixels


def literal_conv(x: list, weight: Tensor, bias: Tensor | None) -> list:
    """x[c][i][j] to y[o][i][j], zeros outside."""
    outputs, inputs, k, _ = weight.shape
    height, width, r = len(x[0]), len(x[0][0]), k // 2
    y = [[[0.0] * width for _ in range(height)] for _ in range(outputs)]
    w = weight.tolist()
    for o, i, j in product(range(outputs), range(height), range(width)):
        total = float(bias[o]) if bias is not None else 0.0
        for c, a, b in product(range(inputs), range(k), range(k)):
            if 0 <= i + a - r < height and 0 <= j + b - r < width:
                total += w[o][c][a][b] * x[c][i + a - r][j + b - r]
        y[o][i][j] = total
    return y


def literal_norm(x: list, norm: nn.GroupNorm) -> list:
    per = len(x) // norm.num_groups
    y = []
    for g in range(norm.num_groups):
        values = [v for c in range(g * per, (g + 1) * per) for row in x[c] for v in row]
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + norm.eps)
        for c in range(g * per, (g + 1) * per):
            y.append([[(v - mean) / std * float(norm.weight[c]) + float(norm.bias[c]) for v in row] for row in x[c]])
    return y


def literal_unit(x: list, unit: nn.Sequential) -> list:
    y = literal_conv(x, unit[0].weight, unit[0].bias)
    if isinstance(unit[1], nn.GroupNorm):
        y = literal_norm(y, unit[1])
    if isinstance(unit[2], nn.ReLU):
        y = [[[max(0.0, v) for v in row] for row in channel] for channel in y]
    return y


def literal_encoder(x: list, align: nn.Module) -> list:
    first = literal_unit(x, align.enc)
    added = [[[a + b for a, b in zip(r, s)] for r, s in zip(p, q)] for p, q in zip(x, first)]
    return literal_conv(literal_unit(added, align.enc2), align.conv.weight, align.conv.bias)


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


def literal_cam(u: list, cam: nn.Module) -> list[float]:
    first, _, second = cam.mlp

    def layer(m: nn.Conv2d, v: list[float]) -> list[float]:
        return [float(b) + sum(float(w) * one for w, one in zip(row.flatten(), v)) for row, b in zip(m.weight, m.bias)]

    def mlp(v: list[float]) -> list[float]:
        return layer(second, [max(0.0, h) for h in layer(first, v)])

    cells = [[v for row in channel for v in row] for channel in u]
    average, maximum = mlp([sum(c) / len(c) for c in cells]), mlp([max(c) for c in cells])
    return [sigmoid(a + m) for a, m in zip(average, maximum)]


def hard_sigmoid(v: float) -> float:
    return min(1.0, max(0.0, v / 6 + 0.5))


def literal_branch(feature: list, u: list, separate: nn.Module, squash: Callable[[float], float]) -> Tensor:
    weights = literal_cam(u, separate.cam)
    gated = [[[weights[c] * v for v in row] for row in u[c]] for c in range(len(u))]
    decoded = literal_conv(gated, separate.dec.weight, separate.dec.bias)
    gate = [[[squash(v) for v in row] for row in channel] for channel in decoded]
    return torch.tensor(feature, dtype=torch.float64) * torch.tensor(gate, dtype=torch.float64)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": "none"}, {"activation": "none", "gate": "hard_sigmoid"}, {"norm": "none", "activation": "none"}],
)
def test_the_equations_computed_literally(options: dict) -> None:
    module = MSIL(C, **options).double()
    parts = [type(m) for m in module.fuse[1:]]
    assert parts == [
        nn.Identity if options.get("norm") else GroupNorm,
        nn.Identity if options.get("activation") else nn.ReLU,
    ]
    squash = hard_sigmoid if "gate" in options else sigmoid
    for p in module.parameters():
        nn.init.normal_(p, std=0.3)
    cls, reg = (b.double() for b in branches((3, 2), n=1))
    with torch.no_grad():
        got_cls, got_reg = module(cls, reg)
        f_cls, f_reg = cls[0].tolist(), reg[0].tolist()
        u = literal_unit(
            literal_encoder(f_reg, module.align) + literal_encoder(f_cls, module.align), module.fuse
        )  # (3), (4)
        assert torch.allclose(
            got_cls[0], literal_branch(f_cls, u, module.separate_cls, squash), rtol=1e-10, atol=1e-12
        )  # (5), (6)
        assert torch.allclose(got_reg[0], literal_branch(f_reg, u, module.separate_reg, squash), rtol=1e-10, atol=1e-12)


# -- options


def test_off_is_the_plain_head() -> None:
    cls, reg = branches()
    got = MSIL(C, to_cls=False, to_reg=False)(cls, reg)
    assert got[0] is cls
    assert got[1] is reg


@pytest.mark.parametrize("branch", ["cls", "reg"])
def test_a_branch_that_is_not_enhanced_passes_unchanged(branch: str) -> None:
    cls, reg = branches()
    got = dict(zip(("cls", "reg"), MSIL(C, **{f"to_{branch}": False})(cls, reg)))
    other = {"cls": "reg", "reg": "cls"}[branch]
    same = {"cls": cls, "reg": reg}
    assert torch.equal(got[branch], same[branch])
    assert not torch.equal(got[other], same[other])


def test_without_alignment_and_separation_the_gate_is_the_fused_map() -> None:
    module = MSIL(C, align=False, separate=False)
    cls, reg = branches()
    gate = module.fuse(torch.cat([reg, cls], dim=1)).sigmoid()
    got_cls, got_reg = module(cls, reg)
    assert torch.equal(got_cls, cls * gate)
    assert torch.equal(got_reg, reg * gate)


def test_without_separation_the_gate_can_suppress() -> None:
    """No ReLU ends the fusion then: about half of the gate lies below 0.5. With separation U is 0 or more."""
    cls, reg = branches()
    gate, _ = MSIL(C, separate=False).gates(cls, reg)
    assert 0.3 < (gate < 0.5).float().mean() < 0.7
    whole = MSIL(C)
    assert whole.fuse(torch.cat(whole.align(torch.cat([reg, cls])).chunk(2), dim=1)).min() == 0


@pytest.mark.parametrize("head", [RetinaHead, FCOSHead])
def test_lambda_of_equation_10_weights_the_classification(head: Callable[..., nn.Module]) -> None:
    levels = Levels((C,) * 3, (8, 16, 32))
    plain, weighted = head(levels, 2).loss_weights, head(levels, 2, cls_weight=0.5).loss_weights
    assert weighted == plain | {"loss_cls": 0.5}
    with pytest.raises(InputError, match=r"cls_weight=-1\.0 must be 0 or more"):
        head(levels, 2, cls_weight=-1.0)


@pytest.mark.parametrize("fuse", [True, False])
def test_only_the_fusion_connects_the_branches(fuse: bool) -> None:
    module = MSIL(C, fuse=fuse)
    cls, reg = branches()
    changed = module(cls, reg + 1)[0] - module(cls, reg)[0]
    assert bool(changed.any()) is fuse


def test_without_norms_any_width_works() -> None:
    module = MSIL(24, norm="none")
    cls, reg = branches(channels=24)
    assert module(cls, reg)[0].shape == cls.shape


def test_gates_are_between_zero_and_one_and_inputs_are_unchanged() -> None:
    cls, reg = branches((1, 1))
    kept = cls.clone(), reg.clone()
    module = MSIL(C)
    for gate in module.gates(cls, reg):
        assert gate.shape == cls.shape
        assert 0 < gate.min() <= gate.max() < 1
    module(cls, reg)
    assert torch.equal(cls, kept[0])
    assert torch.equal(reg, kept[1])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"align": False},
        {"fuse": False},
        {"separate": False},
        {"to_cls": False},
        {"to_reg": False},
        {"norm": "none", "activation": "none"},
        {"gate": "hard_sigmoid"},
    ],
)
def test_every_parameter_has_a_gradient(options: dict) -> None:
    module = MSIL(C, **options)
    sum(m.square().sum() for m in module(*branches((4, 6)))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("head", [RetinaHead, FCOSHead, VFNetHead])
@torch.no_grad()
def test_off_it_is_the_plain_head(head: Callable[..., nn.Module]) -> None:
    """The plain head's weights, no others, and its maps."""
    levels = Levels((C,) * 3, (8, 16, 32))
    plain = head(levels, 2, convs=1, norm=True)
    off = head(levels, 2, partial(MSIL, to_cls=False, to_reg=False), convs=1, norm=True)
    off.load_state_dict(plain.state_dict())
    features = [torch.randn(2, C, *size) for size in ((9, 11), (5, 6), (3, 3))]
    actual, expected = off(features).maps, plain(features).maps
    assert actual.keys() == expected.keys()
    assert all(torch.equal(a, b) for name in expected for a, b in zip(actual[name], expected[name], strict=True))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"channels": 48}, "norm=gn .*multiple of 32 channels .* got 48"),
        ({"encoder_kernel": 2}, "encoder_kernel=2 must be odd"),
        ({"decoder_kernel": 0}, "decoder_kernel=0 must be odd"),
        ({"reduction": 0}, "reduction=0 must be between 1 and the 32"),
    ],
)
def test_bad_options_are_refused(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        MSIL(**{"channels": C} | options)
