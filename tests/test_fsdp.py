"""Weights shared out among two processes (FSDP2, gloo) learn what DDP's do, and their checkpoints are the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusedet import cli, config
from fusedet.api.distributed import strategy
from fusedet.engine import checkpoint
from fusedet.errors import InputError
from killing import differences

TESTS = Path(__file__).parent

SCRIPT = """
import sys
from pathlib import Path

import torch
from fakes import FakeDetector, FakeLoader, make_batch
from lightning_fabric import Fabric

from fusedet.engine import shards
from fusedet.engine.trainer import Interrupted, NonFinite, Recipe, fit
from fusedet.engine.optim import Optim
from fusedet.types import Target

top = Path(sys.argv[1])


class Loader(FakeLoader):
    stop = bad = None

    def epoch(self, epoch, start=0):
        rank = torch.distributed.get_rank()
        for number in range(start, self.length):
            batch = make_batch(1000 * rank + 100 * epoch + number, 3)
            if rank == 1 and (epoch, number) == self.stop:
                import os, signal
                os.kill(os.getpid(), signal.SIGTERM)
            if rank == 1 and (epoch, number) == self.bad:
                from dataclasses import replace
                spoilt = Target(torch.full((1, 4), float("nan")), torch.zeros(1, dtype=torch.int64))
                batch = replace(batch, targets=(spoilt, *batch.targets[1:]))
            yield batch


def train(kind, folder, resume=False, **marks):
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=shards.strategy(2) if kind == "fsdp" else "ddp")
    fabric.launch()
    made, loader, out = FakeDetector(), Loader(), top / folder
    out.mkdir(exist_ok=True)
    for name, value in marks.items():
        setattr(loader, name, value)
    optim = Optim(name="adamw", lr=0.01, warmup_steps=0)
    recipe = Recipe(epochs=2, optim=optim, log_every=2, accumulate=2, ema_decay=0.9, clip_norm=0.5)
    shapes = []

    def validate(module, epoch):
        shapes.append(tuple(module.body[0].weight.shape))
        return {"AP": float(module.body[0].weight.abs().sum())}

    try:
        fit(fabric, made, loader, recipe, out=out, validate=validate, resume=resume)
        kinds = {type(p.data).__name__ for p in made.parameters()}
        assert kinds == ({"DTensor"} if kind == "fsdp" else {"Tensor"}), kinds
        assert set(shapes) == {(8, 3)}
    except (Interrupted, NonFinite) as error:
        (out / f"{fabric.global_rank}.txt").write_text(f"{type(error).__name__}: {error}")
    fabric.barrier()


train("ddp", "ddp")
train("fsdp", "fsdp")
train("fsdp", "stopped", stop=(0, 3))
train("fsdp", "stopped", resume=True)
train("ddp", "changed", stop=(1, 1))
train("fsdp", "changed", resume=True)
train("fsdp", "nan", bad=(0, 3))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("fsdp")
    (out / "script.py").write_text(SCRIPT)
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(out / "script.py"),
        str(out),
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.allclose(a[key], b[key], rtol=1e-4, atol=1e-6) for key in a)


def moments(run: dict) -> dict[str, torch.Tensor]:
    return {f"{i}.{key}": value for i, one in run["optimizer"]["state"].items() for key, value in one.items()}


def test_shared_weights_learn_what_whole_ones_do(runs: Path) -> None:
    """Clipped, accumulated, averaged and validated."""
    ddp, fsdp = (checkpoint.load(runs / kind / "last.ckpt") for kind in ("ddp", "fsdp"))
    assert fsdp["step"] == 8
    assert close(fsdp["model"], ddp["model"])
    assert close(fsdp["ema"], ddp["ema"])
    assert close(moments(fsdp), moments(ddp))
    assert len(moments(fsdp)) == 3 * 8
    best = [checkpoint.load_weights(runs / kind / "best.safetensors")[0] for kind in ("ddp", "fsdp")]
    assert close(best[0], best[1])
    rows = [(runs / kind / "metrics.csv").read_text().splitlines() for kind in ("ddp", "fsdp")]
    assert len(rows[0]) == len(rows[1]) > 4


def test_they_are_stopped_and_go_on_bit_for_bit(runs: Path) -> None:
    assert "stopped after step 2" in (runs / "stopped" / "1.txt").read_text()
    assert not differences(runs / "fsdp", runs / "stopped")


def test_a_run_of_whole_weights_goes_on_with_shared_ones(runs: Path) -> None:
    ddp, changed = (checkpoint.load(runs / name / "last.ckpt") for name in ("ddp", "changed"))
    assert changed["step"] == 8
    assert close(changed["model"], ddp["model"])


def test_a_bad_loss_stops_both(runs: Path) -> None:
    said = [(runs / "nan" / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "'loss_box' is nan at step 2, images 3009" in said[0]


@pytest.mark.parametrize(
    ("words", "world", "right"),
    [
        ([], 1, "start several with torchrun"),
        (["train.precision=fp16"], 2, "use bf16 or fp32"),
        (["train.compile=true"], 2, "leave one of them out"),
    ],
)
def test_what_it_does_not_go_with_is_refused(words: list[str], world: int, right: str) -> None:
    with pytest.raises(InputError, match=right):
        strategy(config.load("retinanet_tiny", ["train.strategy=fsdp", *words]), world)


def test_strategy_is_one_of_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "retinanet_tiny", "train.strategy=zero"]) == 2
    assert "train.strategy" in capsys.readouterr().err
