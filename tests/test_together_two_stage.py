"""Everything with everything, RepPoints and the two-stage detectors: necks x plug-ins x interactions, each by config alone."""

from __future__ import annotations

import itertools
from itertools import product

import pytest
import torch
from torch import nn

from fakes import batch
from fusedet.errors import InputError
from fusedet.models.detectors import OneStage, TwoStage
from fusedet.models.heads import RPNHead
from fusedet.models.modules import MSFM, MSIL
from fusedet.models.roi import GridBranch
from fusedet.types import Levels
from small import TWO_STAGE, livelier, make, target, total, without_gradient
from test_together import INTERACTIONS, NECKS, PLUGINS, STRIDES, assert_close

# half of all combinations, in which all pairs of parts occur
REPPOINTS = [
    (neck, plugin, interact)
    for (n, neck), (p, plugin), (i, interact) in product(*map(enumerate, (NECKS, PLUGINS, INTERACTIONS)))
    if (n + p + i) % 2 == 0
]
MODULES = ["fpn", "mse_fpn", "smsl-standalone", "fpn+smsl", "mse_fpn+smsl"]
# every detector with every module, Faster R-CNN with every neck
TWO = [
    (name, neck, "msfm" if neck == "fpn" or (d + n) % 2 else "")
    for (d, name), (n, neck) in product(enumerate(TWO_STAGE), enumerate(NECKS))
    if neck in MODULES or name == "faster_rcnn"
]
ODD = (33, 47)
SOME, EMPTY = target([[4, 4, 30, 30], [10, 20, 60, 44]]), target([])


def assemble(name: str, neck: str, plugin: str, interact: str = "", **options: bool) -> OneStage | TwoStage:
    slots = {"neck": NECKS[neck], "plugin": PLUGINS[plugin], "interact": INTERACTIONS[interact]}
    detector = make(name, *(f"model.{slot}={value}" for slot, value in slots.items()), **options)
    kinds = [type(m) for m in detector.modules()]
    assert (MSFM in kinds, MSIL in kinds) == (plugin == "msfm", interact == "msil")
    return detector.train()


def keeps_the_contracts(detector: OneStage | TwoStage, strides: tuple[int, ...]) -> None:
    """Levels as promised; losses, gradients and predictions with and without objects, odd sizes, in half precision and in both modes."""
    assert detector.neck.levels.strides == strides
    assert detector.neck.levels.channels == (32,) * 5
    livelier(detector)
    total(detector, batch(SOME, EMPTY)).backward()
    assert not without_gradient(detector)
    # SMSL starts with a convolution at zero, those before it have no slope; a CAM of two hidden units may have none that is above zero
    still = [k for k, p in detector.named_parameters() if not p.grad.any()]
    assert all((".non_local." in k and ".out." not in k) or ".cam.mlp." in k for k in still), still
    for targets in ((target([[5, 3, 30, 20]], size=ODD), EMPTY), (EMPTY,)):
        detector.zero_grad()
        total(detector, batch(*targets, size=ODD)).backward()
        assert not without_gradient(detector), targets
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.loss(batch(SOME, EMPTY))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    for mode in (True, False):
        found = detector.train(mode).predict(batch(EMPTY, EMPTY, size=ODD))
        assert len(found) == 2
        boxes = torch.cat([d.boxes for d in found])
        assert boxes.isfinite().all()
        # the box of grid points may reach outside
        assert (
            any(isinstance(m, GridBranch) for m in detector.modules())
            or (boxes <= torch.tensor([47, 33, 47, 33])).all()
        )


@pytest.mark.parametrize(("neck", "plugin", "interact"), REPPOINTS)
def test_reppoints_with_everything(neck: str, plugin: str, interact: str) -> None:
    keeps_the_contracts(assemble("reppoints", neck, plugin, interact), STRIDES)


@pytest.mark.parametrize(("name", "neck", "plugin"), TWO)
def test_two_stages_with_everything(name: str, neck: str, plugin: str) -> None:
    keeps_the_contracts(assemble(name, neck, plugin, everything=True), (4, 8, 16, 32, 64))


def test_reppoints_with_all_modules_exports_and_compiles() -> None:
    """The same numbers from the exported program for an image that it was not traced with, and from one graph without a break."""
    model = assemble("reppoints", "mse_fpn+smsl", "msfm", "msil").eval()
    images, others = batch(EMPTY).images, batch(EMPTY).images
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.export.export(model, (images,), strict=False).module()(others), model(others))
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(others), model(others))


def test_two_stages_with_all_modules_export() -> None:
    detector = assemble("faster_rcnn", "mse_fpn+smsl", "msfm").eval()
    livelier(detector)
    images, others, sizes = batch(EMPTY).images, batch(EMPTY).images, torch.tensor([[64, 96]])
    with torch.no_grad():
        exported = torch.export.export(Detect(detector), (images, sizes), strict=False).module()
        wanted = detector.detect(others, sizes)
        assert int(wanted.counts) > 0
        for ours, theirs in zip(wanted, exported(others, sizes)):
            assert torch.allclose(ours.float(), theirs.float(), atol=1e-3)


class Detect(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor, sizes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x for x in self.model.detect(images, sizes) if x is not None)


# -- where there are not two branches


@pytest.mark.parametrize("name", TWO_STAGE)
def test_an_interaction_needs_two_branches(name: str) -> None:
    with pytest.raises(
        InputError, match=r"^model\.interact=.*msil.*: a two-stage detector has no two branches to exchange, .* null$"
    ):
        make(name, "model.interact=msil")


def test_the_rpn_has_one_branch() -> None:
    with pytest.raises(
        InputError, match=r"^the RPN has one branch, an interaction needs two: leave model\.interact null$"
    ):
        RPNHead(Levels((32,) * 5, (4, 8, 16, 32, 64)), interact=MSIL)


def test_all_pairs_of_parts_occur() -> None:
    parts = [list(NECKS), list(PLUGINS), list(INTERACTIONS)]
    for a, b in itertools.combinations(range(3), 2):
        assert {(c[a], c[b]) for c in REPPOINTS} == set(product(parts[a], parts[b]))
    assert {c[:2] for c in TWO} >= set(product(TWO_STAGE, MODULES))
    assert {c[0] for c in TWO if c[2] == "msfm"} == set(TWO_STAGE)
