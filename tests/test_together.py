"""Combinations of detectors, necks, plug-ins and interactions, each by config only."""

import copy
from itertools import combinations, cycle, product

import pytest
import torch

from fusedet.models.detectors import OneStage, create_model
from fusedet.types import Batch, Outputs, Target
from pairs import pairwise
from small import without_gradient

HEADS = ["retina", "fcos", "vfnet"]
NECKS = {
    "fpn": "fpn",
    "pafpn": "pafpn",
    "bifpn": "{type: bifpn, repeats: 1}",
    "aug_fpn": "aug_fpn",
    "mse_fpn": "mse_fpn",
    "smsl-standalone": "{type: smsl, mode: standalone}",
    "fpn+bfp": "[fpn,bfp]",
    "fpn+smsl": "[fpn,smsl]",
    "mse_fpn+smsl": "[mse_fpn,smsl]",
}
PLUGINS = {"": "null", "msfm": "{type: msfm, scales: [0.5, 1, 2], conv_num: 1}"}
INTERACTIONS = {"": "null", "msil": "msil"}
COMBINATIONS = list(product(HEADS, NECKS, PLUGINS, INTERACTIONS))
PAIRS = pairwise(HEADS, NECKS, PLUGINS, INTERACTIONS)
ALL_MODULES = [(head, "mse_fpn+smsl", "msfm", "msil") for head in HEADS]
# tracing takes seconds: every head, with and without the modules; every neck is traced in its own tests
TRACED = [("retina", "fpn+smsl", "msfm", "msil"), ("fcos", "mse_fpn", "", "msil"), ("vfnet", "aug_fpn", "msfm", "")]
# every neck once, with all pairs of the other parts; all combinations: tests/soak/test_combinations.py
TRACED_NECKS = [
    (head, neck, plugin, interact)
    for neck, (head, plugin, interact) in zip(NECKS, cycle(pairwise(HEADS, PLUGINS, INTERACTIONS)))
]
STRIDES = (8, 16, 32, 64, 128)


def make(head: str, neck: str, plugin: str, interact: str, *more: str) -> OneStage:
    return create_model(
        "retinanet_tiny",
        "model.backbone.name=resnet10t",
        "model.pyramid.channels=32",
        f"model.head={{type: {head}, convs: 1, norm: true}}",
        f"model.neck={NECKS[neck]}",
        f"model.plugin={PLUGINS[plugin]}",
        f"model.interact={INTERACTIONS[interact]}",
        *more,
        num_classes=3,
    )


def batch(counts: list[int], size: tuple[int, int]) -> Batch:
    """Random images with that many instances each."""
    n, (h, w) = len(counts), size
    corners = [torch.rand(g, 2) * torch.tensor([w / 2, h / 2]) for g in counts]
    boxes = [
        torch.cat([c, c + 8 + torch.rand(len(c), 2) * torch.tensor([w / 2 - 8, h / 2 - 8])], dim=1) for c in corners
    ]
    targets = tuple(Target(b, torch.arange(len(b)) % 3) for b in boxes)
    images = torch.randint(0, 256, (n, 3, h, w), dtype=torch.uint8)
    return Batch(images, torch.tensor([size] * n), tuple(range(n)), torch.ones(n, 2), targets)


def flat(outputs: Outputs) -> list[torch.Tensor]:
    return [m for name in sorted(outputs.maps) for m in outputs.maps[name]]


def assert_close(ours: Outputs, theirs: Outputs, tolerance: float = 1e-4) -> None:
    """Compare raw outputs. Models are compared in float64: GroupNorm over few cells magnifies float32's rounding."""
    for a, b in zip(flat(ours), flat(theirs), strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()) + 1e-6)


def total(model: OneStage, data: Batch) -> torch.Tensor:
    losses = model.loss(data)
    assert set(losses) == set(model.loss_weights)
    assert all(v.ndim == 0 and v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    return torch.stack([v * model.loss_weights[k] for k, v in losses.items()]).sum()


def check_contracts(head: str, neck: str, plugin: str, interact: str) -> None:
    """Shapes, losses, gradients and layouts, with and without instances, at odd sizes and in bfloat16."""
    model = make(head, neck, plugin, interact).train()
    assert model.neck.levels.strides == STRIDES
    assert model.neck.levels.channels == (32,) * 5

    # odd and tiny, one image: as many priors as the levels have cells, one map of each kind per level
    tiny = batch([1], (33, 47))
    outputs = model(tiny.images, tiny.sizes)
    cells = [(5, 6), (3, 3), (2, 2), (1, 1), (1, 1)]
    for level_maps in outputs.maps.values():
        assert [m.shape[-2:] for m in level_maps] == [torch.Size(c) for c in cells]
    per_cell = 9 if head == "retina" else 1
    assert outputs.priors.counts == tuple(h * w * per_cell for h, w in cells)
    candidates = model.head.decode(outputs)
    assert candidates.boxes.shape == (1, len(outputs.priors), 4)
    assert candidates.scores.shape == (1, len(outputs.priors), 3)
    assert 0 <= candidates.scores.min() <= candidates.scores.max() <= 1
    total(model, tiny).backward()

    # every trained parameter gets a finite gradient: with one empty image of two, with an empty image only
    for counts in ([2, 0], [0]):
        model.zero_grad(set_to_none=True)
        total(model, batch(counts, (64, 96))).backward()
        assert not without_gradient(model)

    # losses and gradients inside autocast are finite too
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        value = total(model, batch([2, 1], (64, 96)))
    value.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert len(model.eval().predict(tiny)) == 1

    # channels_last is a layout, not another function
    model.double()
    with torch.no_grad():
        images = tiny.images
        expected = model(images)
        assert_close(copy.deepcopy(model).to(memory_format=torch.contiguous_format)(images), expected)


# all combinations: tests/soak/test_contracts_of_combinations.py
@pytest.mark.parametrize(
    ("head", "neck", "plugin", "interact"),
    [*ALL_MODULES, *(pytest.param(*row, marks=pytest.mark.slow) for row in PAIRS if row not in ALL_MODULES)],
)
def test_combinations_keep_the_contracts(head: str, neck: str, plugin: str, interact: str) -> None:
    check_contracts(head, neck, plugin, interact)


def test_pairs_of_parts_occur() -> None:
    parts = (HEADS, NECKS, PLUGINS, INTERACTIONS)
    for a, b in combinations(range(4), 2):
        assert {(row[a], row[b]) for row in PAIRS} == set(product(parts[a], parts[b]))
    for a, b in combinations((0, 2, 3), 2):
        assert {(row[a], row[b]) for row in TRACED_NECKS} == set(product(parts[a], parts[b]))
    assert [row[1] for row in TRACED_NECKS] == list(NECKS)
    assert [row[0] for row in TRACED] == HEADS


def check_export(head: str, neck: str, plugin: str, interact: str) -> None:
    """The exported program gives the same numbers for an image that it was not traced with."""
    fewer = () if head == "fcos" else ("model.pyramid.coarsest=5",)  # five levels take several times as long
    model = make(head, neck, plugin, interact, *fewer).double().eval()
    images, others = batch([0], (64, 96)).images, batch([0], (64, 96)).images
    with torch.no_grad():
        exported = torch.export.export(model, (images,), strict=False).module()
        assert_close(exported(others), model(others))


@pytest.mark.slow
@pytest.mark.parametrize(("head", "neck", "plugin", "interact"), TRACED)
def test_the_raw_forward_exports(head: str, neck: str, plugin: str, interact: str) -> None:
    check_export(head, neck, plugin, interact)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "neck", "plugin", "interact"), TRACED_NECKS)
def test_the_raw_forward_exports_and_compiles_with_every_neck(head: str, neck: str, plugin: str, interact: str) -> None:
    check_export(head, neck, plugin, interact)
    check_compiled(head, neck, plugin, interact)


def check_compiled(head: str, neck: str, plugin: str, interact: str) -> None:
    """The model compiles to one graph, without a break."""
    model = make(head, neck, plugin, interact, "model.pyramid.coarsest=5").double().eval()
    images = batch([0], (64, 96)).images
    torch._dynamo.reset()
    with torch.no_grad():
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


@pytest.mark.slow
def test_the_raw_forward_compiles() -> None:
    check_compiled(*TRACED[0])
