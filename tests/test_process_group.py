"""Every process that joins a process group ends it, so that a job that succeeded also exits with 0."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusedet import cli
from fusedet.data.synthetic import generate_dataset
from fusedet.engine import checkpoint
from killing import differences
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

SCRIPT = """
import json, sys
import torch
from fusedet import cli

for arguments, code in json.loads(sys.argv[1]):
    assert cli.run(arguments) == code, arguments
    assert not torch.distributed.is_initialized(), arguments
"""


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run_two_processes(*command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*LAUNCH, *command], env=env, capture_output=True, text=True, timeout=timeout)


def child_of_rank(launcher: int, rank: int) -> int:
    """The process id of one of torchrun's processes."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return next(
        int(pid)
        for pid in children
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


@pytest.mark.slow
def test_two_processes_end_their_group_after_success_and_errors(scenes: Path, tmp_path: Path) -> None:
    """Several groups, one after the other, in the same two processes."""
    arguments = ["train", "retinanet_tiny", f"data={scenes}", *SMALL]
    predict = ["predict", str(tmp_path / "run"), str(scenes / "val"), "--no-draw"]
    commands = [
        ([*arguments, f"out={tmp_path / 'run'}"], 0),
        ([*arguments, f"out={tmp_path / 'run'}"], 2),  # nothing is overwritten
        (["val", str(tmp_path / "run"), f"out={tmp_path / 'scored'}"], 0),
        ([*predict, f"out={tmp_path / 'shared'}"], 0),
    ]
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_two_processes(str(tmp_path / "script.py"), json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 images, " in done.stdout
    # the processes evaluate every image once, as one process does
    assert cli.run(["val", str(tmp_path / "run"), f"out={tmp_path / 'alone'}"]) == 0
    joint, alone = (tmp_path / name for name in ("scored", "alone"))
    assert cli.run([*predict, f"out={tmp_path / 'one'}"]) == 0
    one, shared = (json.loads((tmp_path / name / "predictions.json").read_text()) for name in ("one", "shared"))
    assert shared == one, "the processes predict every image once too, and the last one joins their files"
    ids = [{row["image_id"] for row in json.loads((out / "val.bbox.json").read_text())} for out in (joint, alone)]
    assert ids[0] == ids[1]
    metrics = [json.loads((out / "metrics.json").read_text()) for out in (joint, alone)]
    assert metrics[0]["stamp"] == metrics[1]["stamp"]
    assert metrics[0]["AR100"] == pytest.approx(metrics[1]["AR100"], abs=1e-3)


@pytest.mark.slow
def test_an_image_that_one_process_cannot_read_is_named(scenes: Path, tmp_path: Path) -> None:
    """Whichever process meets it; the others end too."""
    data = shutil.copytree(scenes, tmp_path / "data")
    bad = sorted((data / "train").rglob("*.jpg"))[3]
    bad.write_bytes(bad.read_bytes()[:200])
    for seed in range(2):  # the image comes to another process
        arguments = ["train", "retinanet_tiny", f"data={data}", *SMALL, "data.check=false", f"train.seed={seed}"]
        done = run_two_processes("-m", "fusedet.cli", *arguments, f"out={tmp_path / str(seed)}")
        assert done.returncode != 0
        assert "error: " in done.stderr
        assert bad.name in done.stderr


JOB = """
import sys
from matplotlib.figure import Figure
from fusedet import cli

Figure.savefig = lambda *_, **__: None
sys.exit(cli.run(sys.argv[1:]))
"""
"""A command without rendered plots."""


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [2, pytest.param(20, marks=pytest.mark.soak)])
def test_jobs_in_a_row_exit_with_zero(jobs: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One step on two images each."""
    data = generate_dataset(tmp_path / "data", images=4, size=(64, 64), splits={"train": 0.5, "val": 0.5})
    (tmp_path / "job.py").write_text(JOB)
    began, codes = time.monotonic(), []
    for i in range(jobs):
        arguments = ["train", "retinanet_tiny", f"data={data}", *SMALL, "train.batch=2", f"out={tmp_path / str(i)}"]
        codes.append(run_two_processes(str(tmp_path / "job.py"), *arguments).returncode)
    with capsys.disabled():
        print(f"\n{jobs} jobs of two processes in {time.monotonic() - began:.0f} s, exit codes {sorted(set(codes))}")
    assert codes == [0] * jobs


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs Linux's /proc")
def test_a_killed_rank_ends_the_job_and_the_run_resumes_bit_for_bit(scenes: Path, tmp_path: Path) -> None:
    """torchrun ends the other processes; last.ckpt is whole."""
    arguments = ["train", "retinanet_tiny", f"data={scenes}", *SMALL, "train.epochs=4", "train.checkpoint_every=1steps"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_two_processes("-m", "fusedet.cli", *arguments, f"out={whole}").returncode == 0
    with (tmp_path / "log").open("w") as log:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [*LAUNCH, "-m", "fusedet.cli", *arguments, f"out={run}"]
        job = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        try:
            while not (run / "last.ckpt").is_file():
                assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(0.01)
            survivor = child_of_rank(job.pid, 0)
            os.kill(child_of_rank(job.pid, 1), signal.SIGKILL)
            began = time.monotonic()
            assert job.wait(timeout=60) != 0
            assert time.monotonic() - began < 60
            assert not Path(f"/proc/{survivor}").exists()
        finally:
            job.kill()
    assert checkpoint.load(run / "last.ckpt")["step"] < 8
    done = run_two_processes("-m", "fusedet.cli", "train", str(run), "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert not differences(whole, run)
