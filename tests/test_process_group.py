"""Every process that joins a process group ends it, so that a job that succeeded also exits with 0."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SMALL

JOBS = 20
SCRIPT = """
import json, sys
import torch
from fusedet import cli

for words, code in json.loads(sys.argv[1]):
    assert cli.run(words) == code, words
    assert not torch.distributed.is_initialized(), words
"""


def run_two_processes(*command: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *command], env=env, capture_output=True, text=True, timeout=timeout)


def test_two_processes_end_their_group_after_success_and_errors(scenes: Path, tmp_path: Path) -> None:
    """Several groups, one after the other, in the same two processes."""
    words = ["train", "retinanet_tiny", f"data={scenes}", *SMALL]
    commands = [
        ([*words, f"out={tmp_path / 'run'}"], 0),
        ([*words, f"out={tmp_path / 'run'}"], 2),  # nothing is overwritten
        (["val", str(tmp_path / "run"), f"out={tmp_path / 'scored'}"], 0),
    ]
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_two_processes(str(tmp_path / "script.py"), json.dumps(commands))
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "scored" / "metrics.json").is_file()


@pytest.mark.slow
def test_twenty_jobs_in_a_row_exit_with_zero(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began, codes = time.monotonic(), []
    for i in range(JOBS):
        words = ["train", "retinanet_tiny", f"data={scenes}", *SMALL, f"out={tmp_path / str(i)}"]
        codes.append(run_two_processes("-m", "fusedet.cli", *words).returncode)
    with capsys.disabled():
        print(f"\n{JOBS} jobs of two processes in {time.monotonic() - began:.0f} s, exit codes {sorted(set(codes))}")
    assert codes == [0] * JOBS
