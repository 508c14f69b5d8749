"""Two processes on the CPU (gloo) do what one process does on the joint batch."""

import csv
import os
import signal
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric

from fakes import FakeLoader, make_batch
from fusedet.config import Train
from fusedet.data.loader import build_train_loader
from fusedet.data.readers.auto import read_dataset
from fusedet.data.transforms import EvalTransform
from fusedet.engine import checkpoint
from fusedet.engine.trainer import Interrupted, fit, setup
from fusedet.errors import InputError
from fusedet.types import Batch
from killing import differences
from two_ranks import make_detector, run_rank
from warm import SERVER, make_ranks

JOINT = Train(epochs=2, warmup_steps=0, accumulate=2, ema=0.9)


def alone(out: Path, stop: bool = False, **options) -> None:
    """Train in one process, on the batches that `SharedLoader` splits among two."""

    def change(epoch: int, number: int, batch: Batch) -> Batch:
        if stop and number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch

    detector = make_detector()
    out.mkdir(exist_ok=True)
    fabric = Fabric(accelerator="cpu", devices=1)
    options = {"validate": lambda module, epoch: {"AP": epoch}, "quiet": True, "log_every": 3, **options}
    fit(setup(fabric, detector, FakeLoader(change=change), JOINT, out=out, **options))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, str]:
    """The directory and the output of one launch of two processes, because the start takes most of the time."""
    out = tmp_path_factory.mktemp("two")
    with pytest.raises(Interrupted):
        alone(out / "one_to_two", stop=True)
    processes = [SERVER.Process(target=run_rank, args=(str(out), rank)) for rank in make_ranks(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    said = "".join((out / f"{rank}.log").read_text() for rank in (0, 1))
    assert [process.exitcode for process in processes] == [0, 0], said[-3000:]
    return out, said


def joined(a: Batch, b: Batch) -> Batch:
    cat = lambda name: torch.cat([getattr(a, name), getattr(b, name)])  # noqa: E731
    return Batch(cat("images"), cat("sizes"), a.ids + b.ids, cat("scales"), a.targets + b.targets)


def test_the_gradients_of_two_processes_are_those_of_one_on_the_joint_batch(two):
    detector = make_detector()
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
    # the first process's metrics count
    assert saved["best"] == 2.0
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])
        assert torch.equal(value, saved["model"][key])
    # by the runs "whole", "timed" and the three that were resumed
    assert said.count("epoch 2/2: AP 2") == 5


def test_a_bad_loss_in_one_process_stops_both_with_its_images(two):
    said = [(two[0] / "nan" / f"{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "DivergenceError: the loss term 'loss_box' is nan at step 2, images 3009, 3010, 3011:" in said[0]
    assert not (two[0] / "nan" / "last.ckpt").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_a_signal_to_one_process_stops_both_at_the_same_step_and_they_resume(two):
    out = two[0]
    for rank in (0, 1):
        said = (out / "stop" / f"{rank}.txt").read_text()
        assert "Interrupted: stopped after step 2" in said
        assert said.endswith(" 143"), "both end with the signal's code, whichever it came to"
        assert (out / "two_to_one" / f"{rank}.txt").read_text().endswith(" 130")
    assert not differences(out / "whole", out / "stop")


def test_stopped_in_a_validation_they_save_the_state_before_it(two):
    for rank in (0, 1):
        said = (two[0] / "stopped in the validation" / f"{rank}.txt").read_text()
        assert "Interrupted: stopped after step 4" in said
    assert not differences(two[0] / "whole", two[0] / "stopped in the validation")


def test_the_first_processs_clock_says_when_to_save_and_nothing_changes(two):
    assert not differences(two[0] / "whole", two[0] / "timed")


def test_another_number_of_processes_goes_on_with_the_same_batches(two, tmp_path):
    out, said, lines = two[0], two[1], []
    alone(tmp_path / "whole")
    alone(out / "two_to_one", resume=True, say=lines.append)
    assert lines[0].endswith(
        "goes on in another number of processes: 2 until step 2, 1 from now on; "
        "the batches stay the same 4 images in the same order, but some random numbers differ"
    )
    assert "goes on in another number of processes: 1 until step 1, 2 from now on" in " ".join(said.split())
    whole = checkpoint.load(tmp_path / "whole" / "last.ckpt")
    metrics = [
        list(csv.DictReader((run / "metrics.csv").open()))
        for run in (tmp_path / "whole", out / "two_to_one", out / "one_to_two")
    ]
    for run, rows in zip((out / "two_to_one", out / "one_to_two"), metrics[1:]):
        saved = checkpoint.load(run / "last.ckpt")
        assert saved["step"] == whole["step"]
        for key, value in whole["model"].items():
            assert torch.allclose(saved["model"][key], value, rtol=1e-4, atol=1e-6), (run.name, key)
        for row, expected in zip(rows, metrics[0], strict=True):
            assert {k: float(v or 0) for k, v in row.items()} == pytest.approx(
                {k: float(v or 0) for k, v in expected.items()}, rel=1e-4
            )


def test_a_batch_that_the_processes_cannot_share_is_refused(scenes):
    with pytest.raises(
        InputError, match="batch counts the images of all processes: 4 must be a multiple of the 3 processes"
    ):
        build_train_loader(read_dataset(scenes, "train"), EvalTransform(64, 96), batch=4, world=3)
