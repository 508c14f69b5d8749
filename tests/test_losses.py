"""Losses against their literal forms and torchvision."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from fusedet.models.ops import losses
from fusedet.models.ops.losses import mean_over_ranks


def sigmoid_focal(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Sigmoid focal loss by one label per row: the class, -1 background, -2 ignored."""
    rows = (labels >= 0).nonzero().squeeze(1)
    return losses.sigmoid_focal_loss(logits, labels != -2, rows, labels[rows], alpha, gamma)


def make(rows: int = 50, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(rows, classes, dtype=torch.float32) * 4
    return logits.requires_grad_(), torch.randint(-2, classes, (rows,))


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 1.5), (0.4, 0.0)])
def test_focal_against_torchvision(alpha: float, gamma: float) -> None:
    logits, labels = make()
    counted = labels != -2
    hot = F.one_hot(labels.clamp(min=0), 7).float() * (labels >= 0)[:, None]
    theirs = sigmoid_focal_loss(logits[counted], hot[counted], alpha, gamma, reduction="sum")
    (expected,) = torch.autograd.grad(theirs, logits)
    ours = sigmoid_focal(logits, labels, alpha, gamma)
    (actual,) = torch.autograd.grad(3 * ours, logits)
    assert torch.allclose(ours, theirs, rtol=1e-5)
    assert torch.allclose(actual, 3 * expected, rtol=1e-4, atol=1e-5)


def test_focal_against_its_equation() -> None:
    """FL(p) = -alpha_t (1 - p_t)^gamma log p_t, entry by entry."""
    logits, labels = make(6, 3)
    total = 0.0
    for row, label in zip(logits.sigmoid().tolist(), labels.tolist()):
        for k, p in enumerate(row):
            if label != -2:
                p_t, a_t = (p, 0.25) if k == label else (1 - p, 0.75)
                total -= a_t * (1 - p_t) ** 2 * torch.tensor(p_t).log().item()
    assert float(sigmoid_focal(logits, labels).detach()) == pytest.approx(total, rel=1e-4)


def test_ignored_rows_have_no_gradient() -> None:
    logits, labels = make()
    sigmoid_focal(logits, labels).backward()
    assert not logits.grad[labels == -2].any()
    assert logits.grad[labels != -2].any(dim=1).all()


def test_focal_of_no_rows_and_of_extreme_logits() -> None:
    assert float(sigmoid_focal(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))) == 0
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    loss = sigmoid_focal(logits, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_focal_in_half_precision_keeps_the_logits_type() -> None:
    logits = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    loss = sigmoid_focal(logits, torch.tensor([0, 1, -1, -2]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16


def test_mean_over_one_rank_is_itself() -> None:
    assert float(mean_over_ranks(torch.tensor(7))) == 7
    assert float(mean_over_ranks(torch.tensor(0))) == 1  # a divisor is at least 1


def test_focal_in_float16_survives_the_loss_scale() -> None:
    """Confident negatives have gradients below float16's smallest number: they are rounded only after the loss
    scale."""
    logits = torch.full((1, 2), -8.0, dtype=torch.float16, requires_grad=True)
    (65536 * sigmoid_focal(logits, torch.tensor([-1]))).backward()
    exact = torch.full((1, 2), -8.0, requires_grad=True)
    (65536 * sigmoid_focal(exact, torch.tensor([-1]))).backward()
    assert exact.grad.all()
    assert torch.allclose(logits.grad.float(), exact.grad, rtol=1e-2)
