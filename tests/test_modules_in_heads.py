"""The four modules together in the detectors of ATSS's family, the matching and anchor-free ones and those on FCOS."""

from __future__ import annotations

import pytest

from fakes import batch, objects
from small import ATSS_FAMILY, MATCHING, ON_FCOS, make, without_gradient

MODULES = ("model.interact=msil", "model.plugin=msfm")
TARGETS = [objects([[4, 4, 40, 44], [10, 12, 30, 30]], [0, 1]), objects([])]
FAST = ("gfl", "tood", "freeanchor", "ota", "yolof", "borderdet")


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ATSS_FAMILY + MATCHING + ON_FCOS]
)
def test_all_four_modules_are_trained(name: str) -> None:
    """Every trained parameter has a finite gradient, and no module's is zero."""
    # SMSL needs several levels, of which YOLOF has one
    neck, necks = ("mse_fpn", ()) if name == "yolof" else ("[mse_fpn,smsl]", ("neck.necks.0", "neck.necks.1"))
    model = make(name, *MODULES, f"model.neck={neck}").train()
    losses = model.loss(batch(*TARGETS))
    assert set(losses) == set(model.loss_weights)
    sum(losses.values()).backward()
    assert not without_gradient(model)
    for module in ("interact", "plugin", *necks):
        assert any(module in k and p.grad.any() for k, p in model.named_parameters()), module
