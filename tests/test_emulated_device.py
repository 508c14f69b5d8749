"""Detectors and a training on an emulated CUDA device: no device fault, the CPU's numbers, and few waits of the host.

The cases run in processes of their own, because the emulation changes torch; see emulated_cases.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from emulated_device import reason_absent

pytestmark = pytest.mark.skipif(bool(reason_absent()), reason=f"no emulated device: {reason_absent()}")

STEP = {
    "retinanet": (1, 0),
    "fcos": (1, 0),
    "vfnet": (1, 0),
    "reppoints": (2, 0),
    "atss": (1, 0),
    "gfl": (1, 0),
    "gflv2": (1, 0),
    "tood": (1, 0),
    "freeanchor": (1, 0),
    "autoassign": (1, 0),
    "foveabox": (1, 0),
    "fsaf": (1, 0),
    "yolof": (1, 0),
    "dw": (1, 0),
    "ota": (2, 0),  # its pairs of instances and points, and its positives
    "borderdet": (2, 0),  # positives of points and of boxes
    "ddod": (2, 0),  # assigns twice
    "paa": (3, 0),  # assigns twice, and fits mixtures on the CPU in between
    "faster_rcnn": (4, 1),
    "dynamic_rcnn": (4, 1),
    "libra_rcnn": (4, 1),
    "mask_rcnn": (6, 1),
    "grid_rcnn": (5, 1),
    "cascade_rcnn": (14, 1),
    "double_head_rcnn": (5, 1),  # pools twice
    "tridentnet": (4, 3),  # images of three branches
}
PREDICT = dict.fromkeys(STEP, (1, 2)) | {
    "faster_rcnn": (2, 3),
    "dynamic_rcnn": (2, 3),
    "libra_rcnn": (2, 3),
    "mask_rcnn": (4, 3),
    "grid_rcnn": (3, 3),
    "cascade_rcnn": (4, 3),
    "double_head_rcnn": (3, 3),
    "tridentnet": (2, 3),
}
"""(a, b): at most a + b N waits for N images."""
TOLERANCE = {"losses": 1e-5, "detections": 1e-4}
"""Relative to the CPU's value, or to 1 where that is less. The device runs some operators in another order."""

FAST = ("retinanet",)
REST = ("fcos", "vfnet", "reppoints", "tood", "ota", "borderdet", "paa", "faster_rcnn", "mask_rcnn", "cascade_rcnn")
"""By make test-all, with the modules; all others by make soak."""
WITH_MODULES = ("retinanet+modules", "fcos+modules", "faster_rcnn+modules", "cascade_rcnn+modules")


def run_cases(*names: str) -> dict[str, dict[str, Any]]:
    """Run cases in a new process, and return their rows by name."""
    here = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(here / "emulated_cases.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=here)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["case"] for row in rows] == list(names)
    return {row["case"]: row for row in rows}


@pytest.fixture(scope="module")
def slow_rows() -> dict[str, dict[str, Any]]:
    return run_cases(*REST, *WITH_MODULES, "trainer", "evaluation", "commands")


def check_detector(row: dict[str, Any]) -> None:
    name = row["case"].partition("+")[0]
    assert row["faults"] == {}
    # Dynamic R-CNN averages a few numbers in float64
    assert [note for note in row["notes"] if "models/roi/dynamic.py" not in note] == []
    assert row["detected"] > 5
    for kind, tolerance in TOLERANCE.items():
        assert row["difference"][kind] <= tolerance
    for kind, (constant, per_image) in (("step", STEP[name]), ("predict", PREDICT[name])):
        assert sorted(row["waits"][kind]) == ["2", "3"]
        for images, waits in row["waits"][kind].items():
            assert waits <= constant + per_image * int(images), (kind, images, row["lines"][kind])


def test_detectors_and_planted_faults() -> None:
    """One test, because the start of the process takes longer than its cases."""
    rows = run_cases(*FAST, "faults")
    for name in FAST:
        check_detector(rows[name])
    noticed, expected = rows["faults"]["noticed"], rows["faults"]["expected"]
    assert noticed.pop("none") == []
    assert noticed.keys() == expected.keys()
    assert len(expected) >= 10
    missed = [name for name, kind in expected.items() if not any(sign.startswith(kind) for sign in noticed[name])]
    assert not missed


@pytest.mark.slow
@pytest.mark.parametrize("name", [*REST, *WITH_MODULES])
def test_other_detector(name: str, slow_rows: dict[str, dict[str, Any]]) -> None:
    check_detector(slow_rows[name])


@pytest.mark.soak
def test_all_other_detectors() -> None:
    rows = run_cases(*(name for name in STEP if name not in (*FAST, *REST)))
    for row in rows.values():
        check_detector(row)


@pytest.mark.slow
def test_trainer_step(slow_rows: dict[str, dict[str, Any]]) -> None:
    """One update from 2 batches, with GradScaler, clipping and EMA.

    It waits once for the positives and once for the check of the losses of each batch, and once for the scaler.
    """
    row = slow_rows["trainer"]
    assert row["faults"] == {}
    assert 0 < row["gradient norm"] < 1e4
    assert row["waits"]["step"] <= 2 * 2 + 1, row["lines"]["step"]
    assert not [line for line in row["lines"]["copies"] if "pageable" in line]


@pytest.mark.slow
def test_checkpoints_copy_all_tensors_at_once(slow_rows: dict[str, dict[str, Any]]) -> None:
    """Saving waits for the check of the weights, the running losses, two numbers of fp16's scaler and all copies."""
    row = slow_rows["trainer"]
    assert row["waits"]["checkpoint"] <= 1 + 1 + 2 + 1, row["lines"]["checkpoint"]
    assert row["waits"]["weights"] <= 1
    assert row["stored weights are equal"]


@pytest.mark.slow
def test_evaluation_copies_once_per_batch(slow_rows: dict[str, dict[str, Any]]) -> None:
    """Masks are copied once per image. Two copies are predicted twice and merged by an NMS per image."""
    row = slow_rows["evaluation"]
    assert max(row["difference"].values()) <= TOLERANCE["detections"]
    for case, ceiling in (
        ("plain", lambda n: 1 + 2 * n + 1),
        ("masks", lambda n: 3 + 3 * n + n),
        ("flipped", lambda n: 2 * (1 + 2 * n) + 2 * n + 1),
    ):
        assert sorted(row["waits"][case]) == ["2", "3"]
        for images, waits in row["waits"][case].items():
            assert waits <= ceiling(int(images)), (case, images, row["lines"][case])


@pytest.mark.slow
def test_commands_give_the_numbers_of_the_cpu(slow_rows: dict[str, dict[str, Any]]) -> None:
    row = slow_rows["commands"]
    assert row["faults"] == {}
    assert min(row["compared"].values()) >= 2
    assert max(row["difference"].values()) <= 1e-4
