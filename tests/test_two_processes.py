"""`fusedet train` in two processes, by launchers as on two machines, gives what one gives, validation and figures included."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedet.cli import run
from fusedet.data import demo
from fusedet.engine import checkpoint

OPTIONS = [
    # batch norms at rest: the statistics of a batch are those of its process
    *("model.backbone.name=regnetx_002", "model.backbone.norm_eval=true", "model.pyramid.channels=16", "model.head.convs=1"),
    "model.head.norm=false",
    *("data.size=[64,96]", "data.workers=0", "train.epochs=2", "train.batch=4", "train.optimizer=sgd", "train.lr=0.01"),
    *("train.warmup_steps=0", "train.base_batch=null", "test.score=0.001", "device=cpu"),
]


def on_two_machines(words: list[str]) -> list[str]:
    """What is said by two launches of one process each, with different node ranks, as two machines have them; both end well."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        meeting = ["--master-addr", "127.0.0.1", "--master-port", str(free.getsockname()[1])]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    started = []
    for rank in ("0", "1"):
        launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", rank, "--nproc-per-node", "1", *meeting]
        command = [*launch, "-m", "fusedet.cli", *words]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0], [err[-2000:] for _, err in said]
    return [out for out, _ in said]


def test_two_processes_are_one(tmp_path: Path) -> None:
    data = demo.generate(tmp_path / "data", images=14, size=(64, 96))
    words = ["train", "retinanet_tiny", f"data={data}", *OPTIONS]
    assert run([*words, f"out={tmp_path / 'one'}"]) == 0
    said = on_two_machines([*words, f"out={tmp_path / 'two'}"])
    one, two = (checkpoint.load(tmp_path / k / "last.ckpt") for k in ("one", "two"))
    assert one["step"] == two["step"] == 6
    for key, value in one["model"].items():
        assert torch.allclose(value, two["model"][key], rtol=1e-3, atol=1e-5), key
    moved = checkpoint.load(tmp_path / "one" / "last.ckpt")["optimizer"]["state"]
    assert any(v["momentum_buffer"].any() for v in moved.values())
    a, b = (json.loads((tmp_path / k / "metrics.json").read_text()) for k in ("one", "two"))
    assert a["stamp"]["image_ids"] == b["stamp"]["image_ids"]
    assert a["AR100"] == pytest.approx(b["AR100"], abs=0.05)
    results = [json.loads((tmp_path / k / "val.bbox.json").read_text()) for k in ("one", "two")]
    pictures = [sorted({r["image_id"] for r in side}) for side in results]
    assert pictures[0] == pictures[1]  # every picture once, whoever looked at it
    assert [text.count("next: fusedet predict") for text in said] == [1, 0]  # one process speaks
    rows = [(tmp_path / k / "metrics.csv").read_text().splitlines() for k in ("one", "two")]
    assert [row.split(",")[:2] for row in rows[0]] == [row.split(",")[:2] for row in rows[1]]  # one process writes
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
