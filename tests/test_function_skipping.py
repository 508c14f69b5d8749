"""Skipped functions: a checkpoint is read without random numbers, and constants of new weights are set."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from fusedet.api.load_model import rebuild_detector
from fusedet.engine.checkpoint import load_weights
from fusedet.function_skipping import shapes_only, uninitialized


def test_a_checkpoint_is_read_without_random_numbers(trained: Path) -> None:
    before = torch.get_rng_state()
    detector = rebuild_detector(trained / "best.safetensors")[0]
    assert torch.equal(torch.get_rng_state(), before)
    stored = load_weights(trained / "best.safetensors")[0]
    assert all(torch.equal(value, stored[key]) for key, value in detector.state_dict().items())


def test_constants_and_buffers_are_set() -> None:
    with uninitialized():
        norm, layer = nn.BatchNorm2d(4), nn.Linear(3, 2)
        nn.init.zeros_(layer.bias)
        buffer = torch.empty(100).normal_(generator=torch.Generator().manual_seed(0))
    assert torch.equal(buffer, torch.randn(100, generator=torch.Generator().manual_seed(0)))
    assert norm.weight.tolist() == [1] * 4
    assert layer.bias.tolist() == [0, 0]


def test_shapes_are_those_of_the_whole_computation() -> None:
    for device in ("cpu", "meta"):
        images = torch.ones(2, 3, 9, 7, device=device)
        with torch.device(device), shapes_only():
            maps = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))(images)
        assert (maps.shape, maps.device.type) == ((2, 8, 4, 3), device)
    with shapes_only():
        assert F.batch_norm(input=images, running_mean=None, running_var=None, training=True) is images
