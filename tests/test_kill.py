"""A training that is killed or stopped anywhere, and resumed, equals bit for bit one that was not."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import pytest

from killing import INT, KILL, TERM, Training, differences, killed_at_random, undisturbed
from shared_fixtures import SMALL

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
OPTIONS = [
    *SMALL,
    "data.workers=1",
    "train.epochs=3",
    "train.accumulate=2",
    "train.ema=0.9",
    "train.checkpoint_every=1steps",
]
FAULTS = [  # each process goes on from the one before
    ("before run.json", 1, KILL),
    ("in the middle of a checkpoint", 1, KILL),  # before there is one
    ("after half a row", 1, KILL),
    ("before a checkpoint is in its place", 2, KILL),
    ("in a step", 1, TERM),
    ("in a validation", 1, KILL),
    ("in a validation", 1, TERM),
    ("between best and last", 1, KILL),
    ("after the row of a validation", 1, KILL),
    ("in a step", 4, INT),
    ("in a validation", 1, INT),
    ("in a validation", 3, KILL),  # the second half: of the last validation, or of the scoring
]


@pytest.fixture(scope="module")
def arguments(scenes: Path) -> list[str]:
    return ["train", "retinanet_tiny", f"data={scenes}", *OPTIONS]


@pytest.fixture(scope="module")
def whole(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    return undisturbed(arguments, tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.slow
def test_killed_or_stopped_at_every_place_a_run_ends_the_same(
    arguments: list[str], whole: Path, tmp_path: Path
) -> None:
    run, log = tmp_path / "run", tmp_path / "run.log"
    for fault in FAULTS:
        resume = ["--resume"] if run.exists() else []
        training = Training([*arguments, f"out={run}", *resume], log, fault=fault)
        training.wait()
        code = {KILL: -KILL, TERM: 143, INT: 130}[fault[2]]
        assert training.codes == [code], f"{fault}: {log.read_text()[-2000:]}"
    training = Training([*arguments, f"out={run}", "--resume"], log)
    training.wait()
    assert training.codes == [0], log.read_text()[-3000:]
    assert not differences(whole, run)[:5]
    assert "begins again" in log.read_text()


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_at_random_moments_a_run_ends_the_same(
    arguments: list[str], whole: Path, tmp_path: Path, kills: int
) -> None:
    doing = killed_at_random(arguments, whole, tmp_path, kills=kills, seed=secrets.randbits(32))
    assert len(doing) == kills
    assert kills < 5 or set(doing) != {"starting"}


@pytest.mark.slow
def test_two_processes_killed_at_a_random_moment_end_the_same(arguments: list[str], tmp_path: Path) -> None:
    whole = undisturbed(arguments, tmp_path / "whole", processes=2)
    killed_at_random(arguments, whole, tmp_path, kills=1, seed=secrets.randbits(32), processes=2)
