"""Gradient checkpointing of the backbone: the same losses, gradients and statistics, with less memory."""

import copy
from typing import Any

import pytest
import torch

from fakes import batch, objects
from fusedet import cli
from fusedet.engine.checkpoint import load_weights
from fusedet.models.detectors import create_model
from shared_fixtures import SMALL

IMAGES = [objects([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2]), objects([[8, 8, 40, 50]], [1])]


def make(name: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    fixed = ("model.backbone.pretrained=false", "model.pyramid.channels=32", "model.backbone.norm_eval=false")
    return create_model(name, *fixed, *overrides, num_classes=3).train()


def run(detector: Any, images: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The losses, after a backward pass, and the bytes that autograd keeps for it."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = detector.loss(images)
    size = sum(kept.values())
    torch.stack(list(losses.values())).sum().backward()
    return losses, size


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("retinanet_tiny", ("model.backbone.name=test_resnet", "model.backbone.frozen_stages=-1")),
        (
            "retinanet_tiny",
            (
                "model.backbone.name=resnet10t",
                "model.backbone.frozen_stages=1",
                "model.plugin={type: msfm, scales: [0.5, 1, 2], conv_num: 1}",
            ),
        ),
        ("faster_rcnn_tiny", ("model.backbone.name=lcnet_050", "model.backbone.frozen_stages=-1")),
    ],
    ids=["resnet", "plugin", "lcnet"],
)
def test_losses_gradients_and_statistics_are_equal(name: str, overrides: tuple[str, ...]) -> None:
    images = batch(*IMAGES)
    plain = make(name, *overrides)
    checkpointed = copy.deepcopy(plain)
    checkpointed.backbone.checkpoint_stages()
    losses, size = run(plain, images)
    again, smaller = run(checkpointed, images)
    assert all(torch.equal(losses[key], again[key]) for key in losses)
    gradients = dict(checkpointed.named_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in plain.backbone.parameters())
    for key, parameter in plain.named_parameters():
        other = gradients[key].grad
        assert (parameter.grad is None) == (other is None), key
        assert parameter.grad is None or torch.equal(parameter.grad, other), key
    buffers = dict(checkpointed.named_buffers())
    assert all(torch.equal(value, buffers[key]) for key, value in plain.named_buffers())
    assert smaller < 0.8 * size


def test_a_copy_is_independent() -> None:
    detector = make("retinanet_tiny", "model.backbone.name=lcnet_050")
    detector.backbone.checkpoint_stages()
    other = copy.deepcopy(detector)
    for parameter in other.backbone.parameters():
        torch.nn.init.zeros_(parameter)
    image = torch.rand(1, 3, 64, 64)
    assert any(bool(level.detach().abs().sum() > 0) for level in detector.backbone(image))
    assert all(bool((level == level.flatten(2)[..., :1, None]).all()) for level in other.backbone(image))


@pytest.mark.slow
def test_a_training_gives_the_same_weights(scenes: Any, tmp_path: Any) -> None:
    for name, option in (("plain", "false"), ("checkpointed", "true")):
        arguments = ["train", "retinanet_tiny", f"data={scenes}", f"out={tmp_path / name}", *SMALL]
        assert cli.run([*arguments, f"train.checkpoint_backbone={option}"]) == 0
    weights, others = (load_weights(tmp_path / name / "last.ckpt")[0] for name in ("plain", "checkpointed"))
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in weights.items())
