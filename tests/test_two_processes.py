"""`fusedet train` and `val` in two processes, launched as on two machines, give what one process gives."""

import json
import os
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedet.cli import run
from fusedet.data import synthetic
from fusedet.engine import checkpoint

OPTIONS = [
    # BatchNorm in eval mode: the statistics of a batch are those of its process
    *(
        "model.backbone.name=regnetx_002",
        "model.backbone.norm_eval=true",
        "model.pyramid.channels=16",
        "model.head.convs=1",
    ),
    "model.head.norm=false",
    *("data.size=[64,96]", "data.workers=0", "train.epochs=2", "train.batch=4", "train.optimizer=sgd", "train.lr=0.01"),
    *("train.warmup_steps=0", "train.base_batch=null", "test.score=0.001", "device=cpu"),
]
COMMANDS = """
import json, sys
from fusedet import cli

for arguments in json.loads(sys.argv[1]):
    if code := cli.run(arguments):
        sys.exit(code)
"""
"""Several commands in one start, which is what takes time."""


def on_two_machines(commands: list[list[str]], script: Path) -> list[str]:
    """Launch one process each with two node ranks, as on two machines; return the output of both, which exit with 0."""
    script.write_text(COMMANDS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes",
            "2",
            "--node-rank",
            rank,
            "--nproc-per-node",
            "1",
            *meeting,
        ]
        command = [*launch, str(script), json.dumps(commands)]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], [err[-2000:] for _, err in said]
    return [out for out, _ in said]


def read(file: Path) -> Any:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def runs(make_once: Callable[..., Path]) -> tuple[Path, list[str]]:
    """The folder of the runs, and the output of both processes."""
    top = make_once("two_processes", make_runs)
    return top, read(top / "said.json")


def make_runs(top: Path) -> None:
    """The runs `one`, in one process, and `two`, in two; the run `two` scored in `scored` by one, in `both` by two."""
    data = synthetic.generate_dataset(top / "data", images=27, size=(64, 96), splits={"train": 0.45, "val": 0.55})
    arguments = ["train", "retinanet_tiny", f"data={data}", *OPTIONS]
    assert run([*arguments, f"out={top / 'one'}"]) == 0
    commands = [
        [*arguments, f"out={top / 'two'}"],
        ["val", str(top / "two"), f"out={top / 'both'}"],
    ]
    said = on_two_machines(commands, top / "commands.py")
    assert run(["val", str(top / "two"), f"out={top / 'scored'}"]) == 0
    (top / "said.json").write_text(json.dumps(said))


@pytest.mark.slow
def test_two_processes_learn_what_one_does(runs: tuple[Path, list[str]]) -> None:
    top, said = runs
    one, two = (checkpoint.load(top / k / "last.ckpt") for k in ("one", "two"))
    assert one["step"] == two["step"] == 6
    for key, value in one["model"].items():
        assert torch.allclose(value, two["model"][key], rtol=1e-3, atol=1e-5), key
    assert any(v["momentum_buffer"].any() for v in two["optimizer"]["state"].values())
    a, b = (read(top / k / "metrics.json") for k in ("one", "two"))
    assert a["stamp"]["image_ids"] == b["stamp"]["image_ids"]
    assert a["AR100"] == pytest.approx(b["AR100"], abs=0.05)
    rows = [(top / k / "metrics.csv").read_text().splitlines() for k in ("one", "two")]
    assert [row.split(",")[:2] for row in rows[0]] == [row.split(",")[:2] for row in rows[1]]  # one process writes
    assert read(top / "two" / "run.json")["processes"] == 2
    assert [text.count("next: fusedet val") for text in said] == [1, 0]  # one process speaks


@pytest.mark.slow
def test_two_processes_score_as_one_does(runs: tuple[Path, list[str]]) -> None:
    top = runs[0]
    one, two = (read(top / k / "val.bbox.json") for k in ("scored", "both"))
    seen, seen_by_two = (Counter(row["image_id"] for row in side) for side in (one, two))
    assert seen == seen_by_two, "every image once, in whichever process"
    assert len(seen) % 2 == 1, "the processes had not the same number of images"
    for image in seen:
        scores = [sorted(row["score"] for row in side if row["image_id"] == image) for side in (one, two)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    a, b = (read(top / k / "metrics.json") for k in ("scored", "both"))
    assert a["stamp"] == b["stamp"]
    assert a["AR100"] > 0
    assert {k: v for k, v in a.items() if isinstance(v, float)} == {
        k: pytest.approx(v, abs=1e-3) for k, v in b.items() if isinstance(v, float)
    }
