"""Heads with a state of the training, TOOD's epoch and DDOD's level counts, go on exactly after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from fakes import FakeLoader, batch
from fusedet.engine.trainer import fit, setup
from fusedet.errors import StorageError
from fusedet.types import Batch, Target
from killing import differences
from small import make
from test_resume import settings

OVERRIDES = {"tood": ("model.head.initial_epochs=1",), "ddod": ()}


def scene(epoch: int, number: int) -> Batch:
    """Make a batch of two images that is a function of its place."""
    draw = torch.Generator().manual_seed(10 * epoch + number)
    corner = 20 * torch.rand(2, 2, 2, generator=draw)
    boxes = torch.cat([corner, corner + 10 + 20 * torch.rand(2, 2, 2, generator=draw)], dim=2)
    made = batch(*(Target(own, torch.tensor([0, 2])) for own in boxes), size=(64, 64))
    return replace(made, images=torch.randint(0, 256, (2, 3, 64, 64), generator=draw, dtype=torch.uint8))


def train(out: Path, name: str, broken: bool = False, resume: bool = False) -> None:
    """Train two epochs of two steps; a broken dataset fails in the second epoch."""

    def change(epoch: int, number: int, _: Batch) -> Batch:
        if broken and (epoch, number) == (1, 1):
            raise StorageError("the dataset cannot be read")
        return scene(epoch, number)

    torch.manual_seed(1)
    out.mkdir(exist_ok=True)
    detector = make(name, *OVERRIDES[name])
    fabric, loader = Fabric(accelerator="cpu", devices=1), FakeLoader(length=2, size=2, change=change)
    validate = lambda module, epoch: {"AP": 0.0}  # noqa: E731
    options = {"out": out, "validate": validate, "quiet": True, "resume": resume}
    fit(setup(fabric, detector, loader, settings(warmup_steps=0), **options))


@pytest.mark.parametrize("name", ["tood", pytest.param("ddod", marks=pytest.mark.slow)])
def test_an_interrupted_training_goes_on_exactly(tmp_path: Path, name: str) -> None:
    train(tmp_path / "a", name)
    with pytest.raises(StorageError, match="cannot be read"):
        train(tmp_path / "b", name, broken=True)
    train(tmp_path / "b", name, resume=True)
    assert not differences(tmp_path / "a", tmp_path / "b")
