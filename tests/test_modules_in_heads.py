"""The four modules together in the detectors of ATSS's family and in the matching and anchor-free ones."""

from __future__ import annotations

import pytest

from fakes import batch, objects
from small import ATSS_FAMILY, MATCHING, make, without_gradient

MODULES = ("model.interact=msil", "model.plugin=msfm", "model.neck=[mse_fpn,smsl]")
TARGETS = [objects([[4, 4, 40, 44], [10, 12, 30, 30]], [0, 1]), objects([])]
# SMSL needs several levels, of which YOLOF has one
NAMES = [name for name in ATSS_FAMILY + MATCHING if name != "yolof"]


@pytest.mark.parametrize(
    "name", [n if n in ("gfl", "tood") else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_all_four_modules_are_trained(name: str) -> None:
    """Every trained parameter has a finite gradient, and no module's is zero."""
    model = make(name, *MODULES).train()
    losses = model.loss(batch(*TARGETS))
    assert set(losses) == set(model.loss_weights)
    sum(losses.values()).backward()
    assert not without_gradient(model)
    for module in ("interact", "plugin", "neck.necks.0", "neck.necks.1"):
        assert any(module in k and p.grad.any() for k, p in model.named_parameters()), module
