"""`fusedet train` in two processes gives what one gives: RetinaNet, the loader, the normaliser and the shared validation together."""

import json
import os
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


def test_two_processes_are_one(tmp_path: Path) -> None:
    data = demo.generate(tmp_path / "data", images=14, size=(64, 96))
    words = ["train", "retinanet_tiny", f"data={data}", *OPTIONS]
    assert run([*words, f"out={tmp_path / 'one'}"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "fusedet.cli"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *words, f"out={tmp_path / 'two'}"], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
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
    assert done.stdout.count("next: fusedet predict") == 1  # one process speaks
