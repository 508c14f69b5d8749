"""Ten random kills of every kind of training: each detector, any number of workers, one process and two."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from killing import killed_at_random, undisturbed
from small import ONE_STAGE, TWO_STAGE

pytestmark = pytest.mark.soak
COMMON = [
    *(
        "model.backbone.name=lcnet_050",
        "model.pyramid.channels=16",
        "data.size=[64,96]",
        "device=cpu",
        "train.epochs=4",
    ),
    *("train.batch=4", "train.base_batch=4", "train.warmup_steps=0", "test.score=0.001"),
]
RECIPES = {
    "plain": ["train.checkpoint_every=null"],
    "steps": ["train.checkpoint_every=1steps", "train.ema=0.9", "train.accumulate=2"],
    "clock": ["train.checkpoint_every=0.2s", "train.patience=1", "train.optimizer=adamw", "train.lr=0.001"],
}


def kill(scenes: Path, tmp_path: Path, name: str, processes: int, *options: str) -> None:
    arguments = ["train", f"{name}_tiny", f"data={scenes}", *COMMON, *options]
    if name in ONE_STAGE:
        arguments += ["model.head.convs=1", "model.head.norm=false"]
    whole = undisturbed(arguments, tmp_path / "whole", processes)
    assert len(killed_at_random(arguments, whole, tmp_path, 10, secrets.randbits(32), processes)) == 10


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_processes_and_recipes(scenes: Path, tmp_path: Path, workers: int, processes: int, recipe: str) -> None:
    kill(scenes, tmp_path, "retinanet", processes, f"data.workers={workers}", *RECIPES[recipe])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", [*ONE_STAGE[1:], *TWO_STAGE])
def test_detectors(scenes: Path, tmp_path: Path, name: str, processes: int) -> None:
    """Dynamic R-CNN has changed its threshold and its beta by then."""
    interval = ["model.roi.stages.0.interval=2"] if name == "dynamic_rcnn" else []
    kill(scenes, tmp_path, name, processes, "data.workers=1", *RECIPES["steps"], *interval)
