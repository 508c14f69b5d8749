"""Combinations of necks, plug-ins and interactions with RepPoints and the two-stage detectors, each by config only."""

from __future__ import annotations

from itertools import cycle, product

import pytest
import torch

from fakes import Call, batch, check_export, detect
from fusedet.errors import InputError
from fusedet.models.detectors import OneStage, TwoStage
from fusedet.models.heads import RPNHead
from fusedet.models.modules import MSFM, MSIL
from fusedet.models.ops.pyramid_resize import NonLocal
from fusedet.models.roi import GridBranch
from fusedet.types import Levels
from small import DOUBLE_HEAD, TWO_STAGE, livelier, make, target, total, without_gradient
from test_together import INTERACTIONS, NECKS, PLUGINS, STRIDES, assert_close

# every neck once, and all pairs of plug-in and interaction
REPPOINTS = list(zip(NECKS, cycle(PLUGINS), cycle([*INTERACTIONS, *reversed(INTERACTIONS)])))
REPPOINTS_WITH_ALL = ("mse_fpn+smsl", "msfm", "msil")
# every neck with one detector each, and every detector with all modules
TWO = [(name, neck, plugin) for name, neck, plugin in zip(cycle(TWO_STAGE), NECKS, cycle(PLUGINS))]
TWO += [(name, "mse_fpn+smsl", "msfm") for name in TWO_STAGE if (name, "mse_fpn+smsl", "msfm") not in TWO]
TWO.append((DOUBLE_HEAD, "mse_fpn+smsl", "msfm"))
FAST = [(name, "mse_fpn+smsl", "msfm") for name in ("cascade_rcnn", DOUBLE_HEAD)]  # several stages, several branches
TWO_STAGE_STRIDES = (4, 8, 16, 32, 64)
ODD = (33, 47)
SOME, EMPTY = target([[4, 4, 30, 30], [10, 20, 60, 44]]), target([])


def assemble(name: str, neck: str, plugin: str, interact: str = "", **options: bool) -> OneStage | TwoStage:
    slots = {"neck": NECKS[neck], "plugin": PLUGINS[plugin], "interact": INTERACTIONS[interact]}
    detector = make(name, *(f"model.{slot}={value}" for slot, value in slots.items()), **options)
    kinds = [type(m) for m in detector.modules()]
    assert (MSFM in kinds, MSIL in kinds) == (plugin == "msfm", interact == "msil")
    return detector.train()


def check_contracts(detector: OneStage | TwoStage, strides: tuple[int, ...]) -> None:
    """Check levels, losses, gradients and predictions: empty images, odd sizes, half precision, both modes."""
    assert detector.neck.levels.strides == strides
    assert detector.neck.levels.channels == (32,) * 5
    livelier(detector)
    total(detector, batch(SOME, EMPTY)).backward()
    assert not without_gradient(detector)
    # the non-local blocks of SMSL and BFP start with a convolution at zero, so that layers before it have no gradient; a
    # CAM of two hidden units may have none above zero
    blocks = tuple(f"{name}." for name, module in detector.named_modules() if isinstance(module, NonLocal))
    unmoved = [k for k, p in detector.named_parameters() if not p.grad.any()]
    assert all((k.startswith(blocks) and ".out." not in k) or ".cam.mlp." in k for k in unmoved), unmoved
    for targets in ((target([[5, 3, 30, 20]], size=ODD), EMPTY), (EMPTY,)):
        detector.zero_grad()
        total(detector, batch(*targets, size=ODD)).backward()
        assert not without_gradient(detector), targets
    with torch.autocast("cpu", torch.bfloat16):
        losses = detector.loss(batch(SOME, EMPTY))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    for mode in (True, False):
        detections = detector.train(mode).predict(batch(EMPTY, EMPTY, size=ODD))
        assert len(detections) == 2
        boxes = torch.cat([d.boxes for d in detections])
        assert boxes.isfinite().all()
        # a box of grid points may reach outside the image
        assert (
            any(isinstance(m, GridBranch) for m in detector.modules())
            or (boxes <= torch.tensor([47, 33, 47, 33])).all()
        )


# all combinations: tests/soak/test_contracts_of_combinations.py
@pytest.mark.parametrize(
    ("neck", "plugin", "interact"),
    [REPPOINTS_WITH_ALL, *(pytest.param(*row, marks=pytest.mark.slow) for row in REPPOINTS)],
)
def test_reppoints_with_every_neck(neck: str, plugin: str, interact: str) -> None:
    check_contracts(assemble("reppoints", neck, plugin, interact), STRIDES)


@pytest.mark.parametrize(
    ("name", "neck", "plugin"),
    [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in TWO],
)
def test_two_stage_with_every_neck(name: str, neck: str, plugin: str) -> None:
    check_contracts(assemble(name, neck, plugin, everything=True), TWO_STAGE_STRIDES)


@pytest.mark.slow
def test_reppoints_with_all_modules_exports_and_compiles() -> None:
    """The exported program agrees on another image, and the compiled model is one graph without a break."""
    model = assemble("reppoints", "mse_fpn+smsl", "msfm", "msil").eval()
    images, others = batch(EMPTY).images, batch(EMPTY).images
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.export.export(model, (images,), strict=False).module()(others), model(others))
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(others), model(others))


@pytest.mark.slow
def test_two_stage_with_all_modules_exports() -> None:
    detector = assemble("faster_rcnn", "mse_fpn+smsl", "msfm").eval()
    livelier(detector)
    images, others, sizes = batch(EMPTY).images, batch(EMPTY).images, torch.tensor([[64, 96]])
    detections = check_export(Call(detector, detect), (images, sizes), (others, sizes), atol=1e-3)
    assert int(detections[3]) > 0


# -- detectors without two branches


@pytest.mark.parametrize("name", TWO_STAGE[:2])
def test_two_stage_refuses_an_interaction(name: str) -> None:
    with pytest.raises(
        InputError, match=r"^model\.interact=.*msil.*: a two-stage detector has no two branches to exchange, .* null$"
    ):
        make(name, "model.interact=msil")


def test_rpn_refuses_an_interaction() -> None:
    with pytest.raises(
        InputError, match=r"^the RPN has one branch, an interaction needs two: leave model\.interact null$"
    ):
        RPNHead(Levels((32,) * 5, (4, 8, 16, 32, 64)), interact=MSIL)


def test_every_part_occurs() -> None:
    assert REPPOINTS_WITH_ALL not in REPPOINTS
    assert set(FAST) <= set(TWO)
    assert {neck for neck, *_ in REPPOINTS} == {neck for _, neck, _ in TWO} == set(NECKS)
    assert {(plugin, interact) for _, plugin, interact in REPPOINTS} == set(product(PLUGINS, INTERACTIONS))
    assert {name for name, _, plugin in TWO if plugin} == {name for name, *_ in TWO} == {*TWO_STAGE, DOUBLE_HEAD}
