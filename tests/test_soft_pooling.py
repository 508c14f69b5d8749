"""AugFPN's soft RoI selection against a literal computation."""

import math

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from fusedet.errors import InputError
from fusedet.models.roi.mask import MaskBranch
from fusedet.models.roi.soft_pooling import SoftPooling
from fusedet.types import Levels

LEVELS = Levels((16,) * 5, (4, 8, 16, 32, 64))
ROIS = torch.tensor([[0, 3.0, 4, 20, 30], [1, 10, 5, 120, 70], [1, 0, 0, 7, 6]])


def pyramid(size: tuple[int, int] = (75, 129)) -> list[Tensor]:
    return [torch.randn(2, 16, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in LEVELS.strides]


def test_parameter_counts() -> None:
    """1x1 from the channels of four levels to 256, 3x3 to four weights, with biases: the authors' code."""
    pooling = SoftPooling(Levels((256,) * 5, LEVELS.strides))
    assert sum(p.numel() for p in pooling.parameters()) == 4 * 256 * 256 + 256 + 256 * 4 * 9 + 4


@pytest.mark.parametrize("samples", [0, 2])
def test_pooling_against_the_definition(samples: int) -> None:
    """sum over levels of sigmoid(conv3x3(relu(conv1x1(all levels)))) * RoIAlign, per RoI and cell in float64."""
    pooling, features = SoftPooling(LEVELS, size=3, samples=samples).double(), [f.double() for f in pyramid()]
    output = pooling(features, ROIS.double())
    strides = (4, 8, 16, 32)
    pooled = [
        roi_align(f, ROIS.double(), 3, 1 / s, sampling_ratio=samples, aligned=True) for f, s in zip(features, strides)
    ]
    first, second = pooling.weights[0], pooling.weights[2]
    for m in range(len(ROIS)):
        joined = torch.cat([p[m] for p in pooled])  # (64, 3, 3)
        hidden = torch.zeros(16, 5, 5, dtype=torch.float64)
        for i in range(3):
            for j in range(3):
                hidden[:, i + 1, j + 1] = (first.weight[:, :, 0, 0] @ joined[:, i, j] + first.bias).clamp(min=0)
        for i in range(3):
            for j in range(3):
                logits = (second.weight * hidden[None, :, i : i + 3, j : j + 3]).sum(dim=(1, 2, 3)) + second.bias
                expected = sum(w.sigmoid() * p[m, :, i, j] for w, p in zip(logits, pooled))
                assert torch.allclose(output[m, :, i, j], expected, atol=1e-6)


def test_zero_logits_give_half_the_sum() -> None:
    pooling, features = SoftPooling(LEVELS), pyramid()
    for p in pooling.parameters():
        nn.init.zeros_(p)
    pooled = [roi_align(f, ROIS, 7, 1 / s, sampling_ratio=2, aligned=True) for f, s in zip(features, (4, 8, 16, 32))]
    assert torch.allclose(pooling(features, ROIS), sum(pooled) / 2, atol=1e-5)


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (3, 5)])
def test_every_level_and_parameter_has_a_gradient(size: tuple[int, int]) -> None:
    pooling, features = SoftPooling(LEVELS), [f.requires_grad_() for f in pyramid(size)]
    pooled = pooling(features, ROIS)
    assert pooled.shape == (3, 16, 7, 7)
    pooled.square().mean().backward()
    assert all(f.grad.any() for f in features[:4])
    assert features[4].grad is None  # P6 serves the proposals only
    assert all(p.grad.isfinite().all() and p.grad.any() for p in pooling.parameters())


def test_no_rois_and_export() -> None:
    pooling, features = SoftPooling(LEVELS), pyramid()
    none = pooling(features, ROIS[:0])
    assert none.shape == (0, 16, 7, 7)
    none.sum().backward()
    exported = torch.export.export(pooling, (features, ROIS)).module()
    other = ROIS + torch.tensor([0, 1, 2, 30, 4.5])
    assert torch.allclose(exported(features, other), pooling(features, other), atol=1e-5)


def test_half_precision_does_not_shift_rois() -> None:
    pooling, features = SoftPooling(LEVELS), pyramid()
    exact, rois = pooling(features, ROIS + 0.3).detach(), ROIS + 0.3
    half = pooling.to(torch.bfloat16)([f.bfloat16() for f in features], rois)
    assert half.dtype == torch.bfloat16
    assert float((half.detach().float() - exact).abs().max()) < 0.05 * float(exact.abs().max())


def test_mask_branch_accepts_soft_pooling() -> None:
    branch = MaskBranch(LEVELS, 3, lambda size: SoftPooling(LEVELS, size), convs=1, channels=8)
    assert branch(pyramid(), ROIS).shape == (3, 3, 28, 28)


@pytest.mark.parametrize("options", [{"size": 0}, {"count": 0}, {"samples": -1}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SoftPooling(LEVELS, **options)
