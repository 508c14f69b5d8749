"""torch.compile of the training forward pass and of `detect`: one graph, no break, the numbers of eager mode."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch.utils._pytree import tree_leaves

from exporting import ONE_LEVEL, TWO_LEVELS, choose
from fakes import batch, objects
from fusedet.config import Train
from fusedet.engine import trainer
from fusedet.errors import InputError
from fusedet.models.detectors import create_model

DETECTORS = (
    "retinanet",
    "fcos",
    "vfnet",
    "reppoints",
    "faster_rcnn",
    "dynamic_rcnn",
    "libra_rcnn",
    "mask_rcnn",
    "grid_rcnn",
    "cascade_rcnn",
    "double_head_rcnn",
    "tridentnet",
    "atss",
    "gfl",
    "gflv2",
    "paa",
    "ddod",
    "tood",
    "freeanchor",
    "foveabox",
    "fsaf",
    "yolof",
    "autoassign",
    "ota",
    "dw",
    "borderdet",
)
SAME_FORWARD = ("dynamic_rcnn", "mask_rcnn")
"""Their forward pass has the operators of Faster R-CNN's, and so has Dynamic R-CNN's `detect`."""
TRAINED = ("retinanet", "vfnet", "reppoints", "faster_rcnn", "grid_rcnn", "tridentnet", "yolof")
DETECTING = (*TRAINED, "mask_rcnn", "cascade_rcnn", "ddod", "tood", "borderdet")
"""Compiled by make test-all; the others by make soak."""
LEVELS = {
    "yolof": [],  # has one
    "tridentnet": [],  # has one
    "libra_rcnn": ["model.pyramid.coarsest=5"],
    "foveabox": [*TWO_LEVELS, "model.head.ranges=[[1,64],[32,128]]"],
}
"""The levels of detectors that cannot have two, or need to know them."""
IMAGES = [objects([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2]), objects([[8, 8, 40, 50]], [1])]


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    """Forget earlier graphs; let graphs hold operators whose output's size depends on the data, such as NMS."""
    torch._dynamo.reset()
    with dynamo_config.patch(capture_dynamic_output_shape_ops=True):
        yield
    torch._dynamo.reset()


def make(name: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    small = ["model.backbone={name: test_resnet, pretrained: false}", "model.pyramid.channels=32", "test.score=0.001"]
    small += LEVELS.get(name, TWO_LEVELS)
    if name != "tridentnet" and "rcnn" not in name:
        small.append("model.head.convs=1")
    return create_model(f"{name}_tiny", *small, *overrides, num_classes=3)


def tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def check_equal(outputs: Any, expected: Any, tolerance: float) -> None:
    values, references = tensors(outputs), tensors(expected)
    assert len(values) == len(references) > 0
    for value, reference in zip(values, references):
        torch.testing.assert_close(value, reference, rtol=tolerance, atol=tolerance)


def run(name: str, method: str, backend: str, tolerance: float, *overrides: str) -> None:
    images = batch(*IMAGES)
    detector = make(name, *overrides)
    is_training = method == "forward"
    detector.train(is_training)
    call = getattr(detector, method)
    with torch.set_grad_enabled(is_training):
        expected = call(images.images, images.sizes)
        outputs = torch.compile(call, backend=backend, fullgraph=True)(images.images, images.sizes)
    check_equal(outputs, expected, tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("name", choose(TRAINED, [name for name in DETECTORS if name not in SAME_FORWARD]))
def test_training_forward_is_one_graph(name: str) -> None:
    run(name, "forward", "aot_eager", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", choose(DETECTING, [name for name in DETECTORS if name != "dynamic_rcnn"]))
def test_detect_is_one_graph(name: str) -> None:
    run(name, "detect", "eager", 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", choose(["retinanet", "fcos", "faster_rcnn", "mask_rcnn"], DETECTORS))
def test_the_graph_of_detect_runs_without_eager_mode(name: str) -> None:
    """As the graph of operators that other backends receive."""
    run(name, "detect", "aot_eager", 1e-4)


INDUCTOR = [(name, method) for name in ("retinanet", "fcos", "faster_rcnn") for method in ("forward", "detect")]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("case", choose([("retinanet", "forward")], INDUCTOR), ids="-".join)
def test_inductor(case: tuple[str, str]) -> None:
    run(*case, "inductor", 1e-3, *ONE_LEVEL)


@pytest.mark.parametrize(("name", "parts"), [("retinanet", [""]), ("faster_rcnn", ["backbone", "neck", "head"])])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_training_compiles_what_its_loss_calls(
    name: str, parts: list[str], cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes, calls = [], []

    def compile_forward(forward: Any, mode: str | None) -> Any:
        modes.append(mode)
        number = len(modes)
        return lambda *inputs: (calls.append(number), forward(*inputs))[1]

    monkeypatch.setattr(torch, "compile", compile_forward)
    detector = make(name).train()
    with trainer._compiled(detector, Train(compile=True, cuda_graphs=cuda_graphs)):
        detector.loss(batch(*IMAGES))
    assert modes == ["reduce-overhead" if cuda_graphs else None] * len(parts)
    assert calls == list(range(1, len(parts) + 1))
    assert not any("forward" in vars(detector.get_submodule(part)) for part in parts)


def test_cuda_graphs_need_compile() -> None:
    with pytest.raises(InputError, match="cuda_graphs"):
        Train(cuda_graphs=True)
