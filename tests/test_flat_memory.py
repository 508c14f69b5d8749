"""Memory does not grow: the short form of tests/soak/test_memory.py, and a check that its measure detects a leak."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from conftest import SMALL
from fusedet.data.synthetic import generate_dataset
from large import write
from resident import KIB, MIB, line, of_command, run

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")


def noise(n: int, seed: int) -> np.ndarray:
    """Memory as an allocator gives it: levels that last for a while, of some megabytes."""
    chance = np.random.default_rng(seed)
    return 400 * MIB + np.repeat(chance.uniform(0, 4 * MIB, -(-n // 10)), 10)[:n]


@pytest.mark.parametrize("seed", range(5))
def test_the_line_detects_a_planted_leak(seed: int) -> None:
    steps = np.arange(0, 2000, 5)
    flat = line(steps, noise(len(steps), seed))
    assert flat.low < 0 < flat.high
    assert flat.high < 4 * KIB
    leaking = line(steps, noise(len(steps), seed) + 18 * KIB * steps)
    assert leaking.low < 18 * KIB < leaking.high
    assert leaking.low > 4 * KIB


def test_the_interval_holds_the_slope_as_often_as_it_says() -> None:
    steps = np.arange(0, 2000, 5)
    lines = [line(steps, noise(len(steps), seed)) for seed in range(400)]
    assert 0.90 <= np.mean([fit.low < 0 < fit.high for fit in lines]) <= 0.99


def test_what_comes_before_is_left_out() -> None:
    steps = np.arange(1000)
    assert line(steps, np.minimum(steps, 200) * MIB).high < 1
    assert line(steps, np.minimum(steps, 200) * MIB, warm_up=0.0).slope > 10 * KIB


LEAK = """
import json, mmap
from resident import KIB, pss
kept, taken = [], []
for _ in range(60):
    kept.append(mmap.mmap(-1, 256 * KIB))
    kept[-1].write(bytes([1]) * 256 * KIB)
    taken.append(pss())
print(json.dumps(taken))
"""


def test_the_measure_detects_a_leak() -> None:
    """In a process of its own: what earlier tests have left would be given back meanwhile."""
    fit = line(range(60), run(LEAK))
    assert 200 * KIB < fit.slope < 320 * KIB


PER_STEP, PER_IMAGE = 256 * KIB, 128 * KIB
"""Bytes at the interval's upper end. An allocator's steps are a few megabytes, which is much for so few steps; a step's graph is larger."""


@pytest.mark.slow
def test_training_and_prediction_keep_their_memory(trained: Path, tmp_path: Path) -> None:
    data = generate_dataset(
        tmp_path / "data", images=108, seed=0, size=(64, 96), splits={"train": 100 / 108, "val": 8 / 108}
    )
    words = ["train", "retinanet_tiny", f"data={data}", f"out={tmp_path / 'run'}", *SMALL]
    taken = of_command("loss", 2, [*words, "train.batch=2", "train.epochs=3", "train.validate_every=3", "--json"])
    fit = line(taken[:, 0], taken[:, 2], warm_up=0.4)
    assert taken[-1, 0] == 150
    assert fit.high < PER_STEP, fit
    (tmp_path / "many").mkdir()
    for i, one in enumerate(sorted((data / "train").rglob("*.jpg")) * 5):
        (tmp_path / "many" / f"{i:03d}.jpg").hardlink_to(one)
    words = [
        "predict",
        trained,
        tmp_path / "many",
        f"out={tmp_path / 'predicted'}",
        "--no-draw",
        "test.batch=4",
        "--json",
    ]
    taken = of_command("detect", 2, words)
    fit = line(taken[:, 1], taken[:, 2], warm_up=0.4)
    assert taken[-1, 1] == 496
    assert fit.high < PER_IMAGE, fit


@pytest.mark.slow
def test_annotations_are_not_copied_by_workers(tmp_path: Path) -> None:
    """A tenth of the soak test's images: annotations take a few bytes each, and two workers do not double them."""
    large, small = (
        run(Path(__file__).with_name("annotated.py"), write(tmp_path / str(n), "coco", n, 10), 2, "fork")
        for n in (10_000, 100)
    )
    assert large["boxes"] == 100_000
    assert large["dataset"] < 10 * MIB
    assert large["peak"] - large["empty"] < 256 * MIB
    assert large["fork"] - small["fork"] < 0.1 * large["alone"]  # as lists the boxes alone would be twice that
