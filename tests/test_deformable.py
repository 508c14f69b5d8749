"""Deformable convolutions, in both implementations, and deformable stages of backbones."""

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d

from fakes import check_export
from fusedet.errors import InputError
from fusedet.models.backbones import TimmBackbone, insert_plugin
from fusedet.models.modules import MSFMPlugin
from fusedet.models.ops.deformable import DeformConv, DeformPack, deform_conv2d_by_rows
from fusedet.models.ops.layers import fold_batch_norm
from fusedet.models.profiling import count_cost


def side(n: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def literal(
    x: Tensor, offset: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, mask: Tensor
) -> Tensor:
    """y(p) = sum over k of w_k * m_k * x(p + p_k + dp_k), x bilinear and 0 outside ("Deformable ConvNets v2", equation
    1)."""
    (n, c, height, width), (outputs, _, kernel, _), (rows, columns) = x.shape, weight.shape, offset.shape[2:]

    def at(b: int, y: int, z: int) -> Tensor:
        return x[b, :, y, z] if 0 <= y < height and 0 <= z < width else x.new_zeros(c)

    out = x.new_zeros(n, outputs, rows, columns)
    for b, i, j, u, v in product(range(n), range(rows), range(columns), range(kernel), range(kernel)):
        k = u * kernel + v
        y = i * stride - padding + u * dilation + float(offset[b, 2 * k, i, j])
        z = j * stride - padding + v * dilation + float(offset[b, 2 * k + 1, i, j])
        top, left = math.floor(y), math.floor(z)
        value = sum(
            (1 - abs(y - p)) * (1 - abs(z - q)) * at(b, p, q) for p, q in product((top, top + 1), (left, left + 1))
        )
        out[b, :, i, j] += mask[b, k, i, j] * (weight[:, :, u, v] @ value)
    return out


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (1, 2, 2)])
def test_by_rows_against_the_papers_equation(stride: int, padding: int, dilation: int) -> None:
    x, weight = torch.randn(2, 3, 5, 6, dtype=torch.float64), torch.randn(4, 3, 3, 3, dtype=torch.float64)
    shape = (side(5, 3, stride, padding, dilation), side(6, 3, stride, padding, dilation))
    offset, mask = 3 * torch.randn(2, 18, *shape, dtype=torch.float64), torch.rand(2, 9, *shape, dtype=torch.float64)
    actual = deform_conv2d_by_rows(x, offset, weight, None, stride, padding, dilation, mask)
    assert torch.allclose(actual, literal(x, offset, weight, stride, padding, dilation, mask), atol=1e-10)


@settings(max_examples=40)
@given(
    n=st.integers(1, 3),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.sampled_from([1, 3]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    reach=st.sampled_from([0.0, 1.0, 5.0, 1000.0]),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_by_rows_against_torchvision(
    n: int,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    dilation: int,
    groups: int,
    reach: float,
    masked: bool,
    seed: int,
) -> None:
    """Values and all gradients; on whole offsets the slopes of a bilinear map are not defined, so that they are never
    whole here."""
    torch.manual_seed(seed)
    padding = dilation * (kernel // 2)
    shape = tuple(side(s, kernel, stride, padding, dilation) for s in size)
    x = torch.randn(n, 8, *size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 8 // groups, kernel, kernel, dtype=torch.float64, requires_grad=True)
    offset = (reach * torch.randn(n, 2 * kernel**2, *shape, dtype=torch.float64) + 0.01).requires_grad_()
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(n, kernel**2, *shape, dtype=torch.float64, requires_grad=True) if masked else None
    sources = [t for t in (x, weight, offset, bias, mask) if t is not None]
    results = []
    for convolve in (deform_conv2d, deform_conv2d_by_rows):
        y = convolve(x, offset, weight, bias, stride=stride, padding=padding, dilation=dilation, mask=mask)
        results.append([y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), sources)])
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_nan_offsets_give_nan() -> None:
    """A diverging training ends with a non-finite loss, not with an index out of range."""
    offset = torch.zeros(1, 18, 4, 4)
    offset[0, 0, 0, 0], offset[0, 1, 1, 1], offset[0, 2, 2, 2] = math.nan, math.inf, -math.inf
    y = DeformConv(2, 3)(torch.randn(1, 2, 4, 4), offset)
    assert not y[0, :, [0, 1, 2], [0, 1, 2]].isfinite().any()
    assert y[0, :, 3, 3].isfinite().all()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_it_starts_as_the_plain_convolution(groups: int, bias: bool, stride: int, dilation: int) -> None:
    options = {"stride": stride, "groups": groups, "dilation": dilation, "bias": bias}
    pack, x = DeformPack(8, 12, 3, **options), torch.randn(2, 8, 7, 10)
    if bias:
        nn.init.normal_(pack.bias)
    plain = F.conv2d(x, pack.weight, pack.bias, stride, dilation, dilation, groups)
    assert torch.allclose(pack(x), plain, atol=1e-5)
    half = DeformPack(8, 12, 3, **options, modulated=True)
    half.weight, half.bias = pack.weight, pack.bias
    assert torch.allclose(
        half(x), F.conv2d(x, pack.weight / 2, pack.bias, stride, dilation, dilation, groups), atol=1e-5
    )


@pytest.mark.parametrize("modulated", [False, True])
def test_precision_and_gradients(modulated: bool) -> None:
    """bfloat16 in and out, computed in float32; the offsets have gradients from the first step on."""
    pack = DeformPack(8, 12, modulated=modulated)
    x = torch.randn(2, 8, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(pack(x), pack(x.float()), atol=0.05)
    half = copy.deepcopy(pack).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), pack(x), atol=0.05)
    (pack(x) * torch.randn(2, 12, 6, 5)).sum().backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (x, *pack.parameters()))


@pytest.mark.slow
def test_export_and_compile() -> None:
    pack, x = DeformPack(8, 12, modulated=True), torch.randn(1, 8, 6, 9)
    nn.init.normal_(pack.offset.weight)
    check_export(pack, (torch.randn(1, 8, 6, 9),), (x,), atol=1e-5)
    assert torch.allclose(torch.compile(pack, backend="eager", fullgraph=True)(x), pack(x), atol=1e-5)


# -- stages of backbones


def randomized(name: str, **options: Any) -> TimmBackbone:
    """A backbone with active residual branches: timm initializes the last norm of each with zero."""
    backbone = TimmBackbone(name, pretrained=False, **options)
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.constant_(m.weight, 0.7)
    return backbone.eval()


def packs(backbone: nn.Module) -> list[DeformPack]:
    return [m for m in backbone.modules() if isinstance(m, DeformPack)]


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("resnet10t", 3),
        ("resnet26t", 6),
        pytest.param("resnext50_32x4d", 13, marks=pytest.mark.slow),
        pytest.param("resnetaa50", 13, marks=pytest.mark.slow),
    ],
)
def test_backbones_start_with_the_same_maps(name: str, blocks: int) -> None:
    plain, backbone = randomized(name), randomized(name, deformable_stages=(2, 3, 4))
    assert len(packs(backbone)) == blocks
    left = backbone.load_state_dict(plain.state_dict(), strict=False)  # weights of a plain backbone fit
    assert not left.unexpected_keys
    assert all(".conv2.offset." in key for key in left.missing_keys)
    assert len(left.missing_keys) == 2 * blocks
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for a, b in zip(plain(x), backbone(x)):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


@pytest.mark.parametrize("name", ["resnext50_32x4d", "resnetaa50"])
def test_deformable_stages_keep_shapes_and_weights(name: str) -> None:
    """Of groups of channels and of a convolution whose stride is in a filter behind it."""
    with torch.device("meta"):
        plain, backbone = (TimmBackbone(name, False, deformable_stages=stages).eval() for stages in ((), (2, 3, 4)))
        x = torch.randn(1, 3, 64, 96)
        assert [m.shape for m in backbone(x)] == [m.shape for m in plain(x)]
    assert len(packs(backbone)) == 13
    state = backbone.state_dict()
    assert all(state[key].shape == value.shape for key, value in plain.state_dict().items())


def test_weights_of_a_file_are_loaded(tmp_path) -> None:
    import timm

    source = timm.create_model("resnet10t", pretrained=False)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    backbone = TimmBackbone("resnet10t", weights=str(tmp_path / "w.pth"), deformable_stages=(4,), modulated=True)
    (pack,) = packs(backbone)
    assert torch.equal(pack.weight, source.layer4[0].conv2.weight)
    assert not any(p.any() for p in pack.offset.parameters())


def test_a_mask_starts_at_one_half() -> None:
    backbone = TimmBackbone("resnet10t", pretrained=False, deformable_stages=(3,), modulated=True)
    (pack,) = packs(backbone)
    x = torch.randn(1, pack.offset.in_channels, 6, 5)
    assert torch.allclose(pack(x), F.conv2d(x, pack.weight, padding=1) / 2, atol=1e-5)


@pytest.mark.parametrize(("modulated", "count"), [(False, 580_842), (True, 871_263)])
def test_parameters(modulated: bool, count: int) -> None:
    """Faster R-CNN R50 prints 41.5 M without, 42.1 M with the deformable stages of v1; modulated they would make it
    42.4 M."""
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in TimmBackbone("resnet50", False, frozen_stages=1, **options).parameters())
            for options in ({}, {"deformable_stages": (2, 3, 4), "modulated": modulated})
        ]
    assert sizes[1] - sizes[0] == count


def test_offset_groups_divide_the_channels() -> None:
    with pytest.raises(InputError, match="multiples of 4, got 6"):
        DeformPack(6, 8, offset_groups=4)


@pytest.mark.parametrize(
    ("name", "stages", "message"),
    [
        ("convnext_atto", (2, 3), "stage 2 of 'convnext_atto' has no blocks of a ResNet"),
        ("resnet10t", (5,), r"deformable_stages=\[5\] must be different ones of this backbone's stages \[1, 2, 3, 4\]"),
        ("resnet10t", (2, 2), "must be different"),
    ],
)
def test_wrong_stages_are_refused(name: str, stages: tuple[int, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TimmBackbone(name, pretrained=False, deformable_stages=stages)


def test_frozen_stages_freeze_offsets_too() -> None:
    backbone = TimmBackbone("resnet10t", pretrained=False, frozen_stages=2, deformable_stages=(2, 3)).train()
    still, moving = packs(backbone)
    assert not any(p.requires_grad for p in still.parameters())
    assert all(p.requires_grad for p in moving.parameters())
    assert not backbone.body.layer2[0].bn2.training


def test_with_plugins() -> None:
    """A model with both is trained, copied, folded, reloaded and exported."""
    backbone = randomized("test_resnet", deformable_stages=(4,))
    assert insert_plugin(backbone, MSFMPlugin(("after_conv2",), stages=(4,), ratios=(12,), zero_init=False)) == 1
    for pack in packs(backbone):
        nn.init.normal_(pack.offset.weight, std=0.01)
    sum((m * torch.randn_like(m)).sum() for m in backbone(torch.randn(1, 3, 128, 128))).backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in backbone.parameters())
    x = torch.randn(1, 3, 64, 96)
    other = TimmBackbone("test_resnet", pretrained=False, deformable_stages=(4,)).eval()
    insert_plugin(other, MSFMPlugin(("after_conv2",), stages=(4,), ratios=(12,)))
    other.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        folded = fold_batch_norm(backbone, torch.randn(1, 3, 64, 64))
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        for twin in (copy.deepcopy(backbone), other, folded):
            for a, b in zip(backbone(x), twin(x)):
                assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
        assert backbone(torch.randn(1, 3, 33, 47))[-1].isfinite().all()
    check_export(backbone.body.layer4[0], (torch.randn(1, 192, 4, 6),), (torch.randn(1, 192, 4, 6),))


def test_multiply_adds() -> None:
    """Those of the plain convolution, and of the one that predicts the offsets; the sampling is not counted."""

    class Alone(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, images: Tensor) -> Tensor:
            return self.layer(images.float().repeat(1, 4, 1, 1)[:, :8])

        def detect(self, images: Tensor, sizes: Tensor) -> Any:
            return self(images)

    plain = count_cost(Alone(nn.Conv2d(8, 12, 3, 2, 1, groups=2)), 11, 14)["multiply_adds"]
    assert plain == 6 * 7 * 12 * 4 * 9
    actual = count_cost(Alone(DeformPack(8, 12, 3, 2, groups=2)), 11, 14)["multiply_adds"]
    assert actual == plain + 6 * 7 * 18 * 8 * 9
