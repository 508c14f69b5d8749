"""Two processes on the CPU (gloo) do what one process does on the joint batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fakes import FakeDetector, make_batch
from fusedet.engine import checkpoint
from fusedet.types import Batch

TESTS = Path(__file__).parent

SCRIPT = """
import os, signal, sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from fakes import FakeDetector, FakeLoader, make_batch
from lightning_fabric import Fabric
from torch import nn

from fusedet.engine.loop import Interrupted, NonFinite, Recipe, fit
from fusedet.engine.optim import Optim
from fusedet.engine.run import Objective
from fusedet.types import Target

top = Path(sys.argv[1])
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
rank = fabric.global_rank


def detector():
    torch.manual_seed(0)
    made = FakeDetector()
    made.body[1] = nn.Identity()  # the statistics of a batch are those of its process
    return made


class Loader(FakeLoader):
    what = ""

    def epoch(self, epoch, start=0):
        for number in range(start, self.length):
            batch = make_batch(1000 * rank + 100 * epoch + number, 2 + rank)
            if rank == 1 and number == 3 and self.what == "nan":
                bad = Target(torch.full((1, 4), float("nan")), torch.zeros(1, dtype=torch.int64))
                batch = replace(batch, targets=(bad, *batch.targets[1:]))
            if rank == 1 and number == 3 and self.what == "stop":
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def train(folder, what="", resume=False):
    out, loader, made = top / folder, Loader(), detector()
    out.mkdir(exist_ok=True)
    loader.what = what
    recipe = Recipe(epochs=2, optim=Optim(warmup_steps=0), log_every=3, accumulate=2, ema_decay=0.9)
    try:
        fit(fabric, made, loader, recipe, out=out, validate=lambda module, epoch: {"AP": rank + epoch}, resume=resume)
    except (Interrupted, NonFinite) as error:
        (out / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    torch.save(made.state_dict(), out / f"{rank}.pt")


made = detector()
model = fabric.setup(Objective(made))
for seed in (0, 5):
    terms = model(partial(make_batch(seed + rank, 2 + rank).to, "cpu"))
    fabric.backward(torch.stack(list(terms.values())).sum())
torch.save({k: p.grad for k, p in made.named_parameters()}, top / f"{rank}.pt")

train("whole")
train("nan", what="nan")
train("stop", what="stop")
fabric.barrier()
train("stop", resume=True)
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """The folder and the output of one launch of two processes; starting them is what takes time."""
    out = tmp_path_factory.mktemp("two")
    (out / "script.py").write_text(SCRIPT)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(out / "script.py"), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done.stdout


def joined(a: Batch, b: Batch) -> Batch:
    cat = lambda name: torch.cat([getattr(a, name), getattr(b, name)])  # noqa: E731
    return Batch(cat("images"), cat("sizes"), a.ids + b.ids, cat("scales"), a.targets + b.targets)


def test_the_gradients_of_two_processes_are_those_of_one_on_the_joint_batch(two):
    torch.manual_seed(0)
    detector = FakeDetector()
    detector.body[1] = nn.Identity()
    for seed in (0, 5):
        sum(detector.loss(joined(make_batch(seed, 2), make_batch(seed + 1, 3))).values()).backward()
    for rank in (0, 1):
        gradients = torch.load(two[0] / f"{rank}.pt")
        for name, parameter in detector.named_parameters():
            assert parameter.grad.abs().max() > 0
            assert torch.allclose(gradients[name], parameter.grad, rtol=1e-5, atol=1e-7), name


def test_the_processes_stay_equal_and_only_the_first_writes(two):
    out, said = two
    weights = [torch.load(out / "whole" / f"{rank}.pt") for rank in (0, 1)]
    saved = checkpoint.load(out / "whole" / "last.ckpt")
    assert saved["step"] == 8
    # the first process's figures count
    assert saved["best"] == 2.0
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])
        assert torch.equal(value, saved["model"][key])
    # by the runs "whole" and, resumed, "stop"
    assert said.count("epoch 2/2: AP 2") == 2


def test_a_bad_loss_in_one_process_stops_both_with_its_images(two):
    said = [(two[0] / "nan" / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "NonFinite: the loss term 'loss_box' is nan at step 2, images 3009, 3010, 3011:" in said[0]
    assert not (two[0] / "nan" / "last.ckpt").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_signal_to_one_process_stops_both_at_the_same_step_and_they_resume(two):
    out = two[0]
    for rank in (0, 1):
        assert "Interrupted: stopped after step 2" in (out / "stop" / f"{rank}.txt").read_text()
    whole, resumed = (checkpoint.load(out / name / "last.ckpt") for name in ("whole", "stop"))
    assert all(torch.equal(whole["model"][key], resumed["model"][key]) for key in whole["model"])
    assert whole["metrics"] == resumed["metrics"]
