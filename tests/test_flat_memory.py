"""Memory does not grow: the short form of tests/soak/test_memory.py, and a check that its measure detects a leak."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedet.data.synthetic import generate_dataset
from resident import KIB, line, of_command, run
from shared_fixtures import SMALL

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's /proc")


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
"""Bytes at the interval's upper end.

An allocator's steps are a few megabytes, which is much for so few steps; a step's graph is larger.
"""


@pytest.mark.slow
def test_training_and_prediction_keep_their_memory(trained: Path, tmp_path: Path) -> None:
    data = generate_dataset(
        tmp_path / "data", images=108, seed=0, size=(64, 96), splits={"train": 100 / 108, "val": 8 / 108}
    )
    arguments = ["train", "retinanet_tiny", f"data={data}", f"out={tmp_path / 'run'}", *SMALL]
    taken = of_command("loss", 2, [*arguments, "train.batch=2", "train.epochs=3", "train.validate_every=3", "--json"])
    fit = line(taken[:, 0], taken[:, 2], warm_up=0.4)
    assert taken[-1, 0] == 150
    assert fit.high < PER_STEP, fit
    (tmp_path / "many").mkdir()
    for i, one in enumerate(sorted((data / "train").rglob("*.jpg")) * 5):
        (tmp_path / "many" / f"{i:03d}.jpg").hardlink_to(one)
    arguments = [
        "predict",
        trained,
        tmp_path / "many",
        f"out={tmp_path / 'predicted'}",
        "--no-draw",
        "test.batch=4",
        "--json",
    ]
    taken = of_command("detect", 2, arguments)
    fit = line(taken[:, 1], taken[:, 2], warm_up=0.4)
    assert taken[-1, 1] == 496
    assert fit.high < PER_IMAGE, fit
