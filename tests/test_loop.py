"""The training loop: files, validation, EMA, accumulation, clipping, precision, divergence, resumption and loggers."""

import csv
import os
import re
import signal
import sys
import types
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision
from rich.console import Console

from fakes import FakeDetector, FakeLoader
from fusedet.config import Train
from fusedet.engine import checkpoint, logging
from fusedet.engine.ema import EMA
from fusedet.engine.precision import fabric_precision
from fusedet.engine.progress import Display, Pace
from fusedet.engine.signals import Interrupts
from fusedet.engine.trainer import Interrupted, fit, setup
from fusedet.errors import DivergenceError, InputError
from fusedet.types import Target

BASE = {"epochs": 3, "lr": 0.05, "warmup_steps": 4, "milestones": (2,), "batch": 12}


def settings(**changes) -> Train:
    return Train(**BASE | changes)


RECIPE = settings()


def train(out: Path, recipe: Train = RECIPE, *, loader=None, dropout: float = 0.5, kind=FakeDetector, **options):
    torch.manual_seed(1)
    out.mkdir(exist_ok=True)
    detector = kind(dropout)
    fabric = Fabric(accelerator="cpu", devices=1, precision=options.pop("precision", "32-true"))
    fabric.launch()
    options = {"log_every": 3, "quiet": True, **options}
    result = fit(setup(fabric, detector, loader or FakeLoader(), recipe, out=out, **options))
    return detector, result


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def scores(*values: float):
    """Return a validation that yields these values of AP in turn."""
    left = list(values)
    return lambda module, epoch: {"AP": left.pop(0)}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- what a training leaves behind


def test_a_training_learns_and_leaves_its_files(tmp_path):
    recipe = settings(epochs=30, milestones=(20,))
    detector, result = train(tmp_path, recipe, dropout=0, meta={"config": "model: x", "names": ["a", "b"]})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "metrics.csv", "speed.csv"]
    assert {k: result[k] for k in ("epoch", "step", "best")} == {"epoch": 30, "step": 210, "best": None}
    table = rows(tmp_path)
    assert float(table[-1]["loss"]) < 0.7 * float(table[0]["loss"])
    weights, meta = checkpoint.load_weights(tmp_path / "last.ckpt")
    assert same(weights, detector.state_dict())
    assert meta == {"config": "model: x", "names": '["a", "b"]'}


def test_the_table_has_a_row_per_interval_and_per_validation(tmp_path):
    train(tmp_path, validate=scores(0.1, 0.3, 0.2))
    table = rows(tmp_path)
    names = "epoch step lr loss loss_box loss_score grad_norm AP"
    assert list(table[0]) == names.split()
    steps = [(int(r["epoch"]), int(r["step"])) for r in table if r["loss"]]
    with (tmp_path / "speed.csv").open(newline="") as file:
        speeds = list(csv.DictReader(file))
    assert [(int(r["epoch"]), int(r["step"])) for r in speeds] == steps
    assert all(float(r["images_per_second"]) > 0 for r in speeds)
    # every third step and the last of each epoch of seven
    assert steps == [(1, 3), (1, 6), (1, 7), (2, 9), (2, 12), (2, 14), (3, 15), (3, 18), (3, 21)]
    assert [(r["step"], r["AP"]) for r in table if r["AP"]] == [("7", "0.1"), ("14", "0.3"), ("21", "0.2")]
    for row in table:
        if row["loss"]:
            assert float(row["loss"]) == pytest.approx(float(row["loss_box"]) + float(row["loss_score"]), rel=1e-5)
    assert float(table[-2]["lr"]) == pytest.approx(0.005)


def test_the_best_weights_are_those_of_the_best_validation(tmp_path):
    seen = []

    def validate(module, epoch):
        assert not any(part.training for part in module.modules())
        assert not torch.is_grad_enabled()
        seen.append({k: v.clone() for k, v in module.state_dict().items()})
        return {"AP": [0.1, 0.3, 0.2][epoch - 1]}

    detector, result = train(tmp_path, validate=validate)
    assert result["best"] == 0.3
    assert result["metrics"] == {"AP": 0.2}
    weights, meta = checkpoint.load_weights(tmp_path / "best.safetensors")
    assert same(weights, seen[1])
    assert (meta["weights"], meta["epoch"], meta["AP"]) == ("model", "2", "0.3")
    assert all(part.training for part in detector.modules())


def test_parts_keep_their_mode_over_a_validation(tmp_path):
    class Frozen(FakeDetector):
        def train(self, mode: bool = True):
            super().train(mode)
            self.body[1].eval()
            return self

    torch.manual_seed(0)
    fabric, detector = Fabric(accelerator="cpu", devices=1), Frozen()
    fit(setup(fabric, detector, FakeLoader(2), settings(epochs=2), out=tmp_path, validate=scores(0, 0), quiet=True))
    assert [part.training for part in detector.body] == [True, False, True, True, True]


@pytest.mark.parametrize(("patience", "epochs"), [(None, 6), (2, 4)])
def test_early_stopping(tmp_path, patience, epochs):
    recipe = settings(epochs=6, patience=patience)
    _, result = train(tmp_path, recipe, validate=scores(0.1, 0.2, 0.2, float("nan"), 0.1, 0.1))
    assert result["epoch"] == epochs
    assert result["best"] == 0.2


def test_validation_every_second_epoch_and_at_the_end(tmp_path):
    seen = []
    train(tmp_path, settings(validate_every=2), validate=lambda module, epoch: seen.append(epoch) or {"AP": 0})
    assert seen == [2, 3]


def test_an_unknown_monitor_is_refused_and_the_epoch_is_not_lost(tmp_path):
    with pytest.raises(InputError, match="unknown metric to monitor 'AP5': did you mean 'AP50'"):
        train(tmp_path, settings(monitor="AP5"), validate=lambda module, epoch: {"AP50": 0.5})
    _, result = train(tmp_path, settings(monitor="AP50"), validate=lambda module, epoch: {"AP50": 0.5}, resume=True)
    assert result["step"] == 21


# -- averaged weights


def test_the_average_follows_the_formula():
    detector = FakeDetector()
    average = EMA(detector, decay=0.25)
    expected = detector.score.weight.detach().clone()
    for decay in (2 / 11, 0.25, 0.25):
        with torch.no_grad():
            detector.score.weight += 1
            detector.body[1].num_batches_tracked += 1
        expected = decay * expected + (1 - decay) * detector.score.weight.detach()
        average.update(detector)
        assert torch.allclose(average.module.score.weight, expected)
    assert average.module.body[1].num_batches_tracked == 3


def test_validation_and_the_best_file_take_the_averaged_weights(tmp_path):
    seen = []
    validate = lambda module, epoch: seen.append((module, dict(module.state_dict()))) or {"AP": epoch}  # noqa: E731
    detector, _ = train(tmp_path, settings(ema=0.9), validate=validate)
    module, weights = seen[-1]
    assert isinstance(module, FakeDetector)
    assert not same(weights, detector.state_dict())
    best, meta = checkpoint.load_weights(tmp_path / "best.safetensors")
    assert same(best, weights)
    assert meta["weights"] == "ema"
    assert same(checkpoint.load_weights(tmp_path / "last.ckpt")[0], weights)


# -- steps


def test_accumulated_batches_give_the_mean_gradient_and_a_short_last_step(tmp_path):
    recipe = settings(epochs=1, accumulate=3, lr=0.1, momentum=0, weight_decay=0, warmup_steps=0)
    torch.manual_seed(1)
    by_hand = FakeDetector()
    for group in ((0, 1, 2), (3, 4, 5), (6,)):
        batches = list(FakeLoader().epoch(0))
        sum(sum(by_hand.loss(batches[i]).values()) / len(group) for i in group).backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    detector, result = train(tmp_path, recipe, dropout=0)
    assert result["step"] == 3
    for mine, theirs in zip(detector.parameters(), by_hand.parameters()):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def test_the_gradient_norm_is_clipped_and_logged(tmp_path):
    recipe = settings(epochs=1, clip_norm=1e-3, lr=1.0, momentum=0, weight_decay=0, warmup_steps=0)
    torch.manual_seed(1)
    before = [p.detach().clone() for p in FakeDetector().parameters()]
    detector, _ = train(tmp_path, recipe, loader=FakeLoader(1), log_every=1)
    moved = torch.stack([(p.detach() - b).norm() for p, b in zip(detector.parameters(), before)]).norm()
    assert moved == pytest.approx(1e-3, rel=1e-2)
    assert float(rows(tmp_path)[0]["grad_norm"]) > 0.1


def test_loss_weights_change_the_total_only(tmp_path):
    class Weighted(FakeDetector):
        loss_weights: ClassVar[dict[str, float]] = {"loss_box": 0.0, "loss_score": 2.0}

    train(tmp_path, RECIPE, kind=Weighted)
    first = rows(tmp_path)[0]
    assert float(first["loss"]) == pytest.approx(2 * float(first["loss_score"]), rel=1e-5)
    assert float(first["loss_box"]) > 0


def test_bf16_reaches_the_network_and_leaves_the_boxes_alone(tmp_path):
    seen = []

    class Watched(FakeDetector):
        def loss(self, batch):
            seen.append((self(batch.images)[0].dtype, batch.targets[0].boxes.dtype))
            return super().loss(batch)

    fabric = Fabric(accelerator="cpu", devices=1, precision=fabric_precision("bf16", "cpu"))
    fit(setup(fabric, Watched(), FakeLoader(2), settings(epochs=1), out=tmp_path, quiet=True))
    assert seen == [(torch.bfloat16, torch.float32)] * 2


def test_compile_takes_the_forward_and_gives_it_back(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    detector, _ = train(tmp_path / "a", settings(compile=True), dropout=0, validate=scores(1, 2, 3))
    assert "forward" not in vars(detector)
    plain, _ = train(tmp_path / "b", dropout=0, validate=scores(1, 2, 3))
    for mine, theirs in zip(detector.parameters(), plain.parameters()):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_precision_names():
    assert [fabric_precision(name, "cpu") for name in ("auto", "fp32", "bf16")] == ["32-true", "32-true", "bf16-mixed"]
    with pytest.raises(InputError, match="fp16 needs a GPU"):
        fabric_precision("fp16", torch.device("cpu"))


# -- stopping


def spoilt(where: tuple[int, int]):
    def change(epoch, number, batch):
        if (epoch, number) != where:
            return batch
        bad = Target(torch.full((1, 4), float("nan")), torch.zeros(1, dtype=torch.int64))
        return replace(batch, targets=(bad, *batch.targets[1:]))

    return change


def test_a_loss_that_is_not_finite_stops_before_the_weights_take_it(tmp_path):
    _, _ = train(tmp_path / "good", settings(epochs=1))
    with pytest.raises(
        DivergenceError,
        match=r"the loss term 'loss_box' is nan at step 10, images 408, 409, 410, 411: .*what was saved before is still whole",
    ):
        train(tmp_path / "bad", loader=FakeLoader(change=spoilt((1, 2))))
    good, bad = (checkpoint.load(tmp_path / name / "last.ckpt") for name in ("good", "bad"))
    assert bad["step"] == 7
    assert same(good["model"], bad["model"])


def test_a_gradient_that_is_not_finite_stops_before_the_weights_take_it(tmp_path):
    class Rooted(FakeDetector):
        loss_weights: ClassVar[dict[str, float]] = FakeDetector.loss_weights | {"loss_root": 1.0}

        def loss(self, batch):
            terms = super().loss(batch)
            return terms | {"loss_root": (terms["loss_box"] * 0).sqrt()}

    detector = Rooted()
    before = {k: v.clone() for k, v in detector.named_parameters()}
    with pytest.raises(DivergenceError, match="the gradient norm is nan at step 1, images 0, 1, 2, 3"):
        fit(setup(Fabric(accelerator="cpu", devices=1), detector, FakeLoader(), RECIPE, out=tmp_path, quiet=True))
    assert same(dict(detector.named_parameters()), before)
    assert not (tmp_path / "last.ckpt").exists()


def test_the_loss_term_is_named(tmp_path):
    class Named(FakeDetector):
        loss_weights: ClassVar[dict[str, float]] = FakeDetector.loss_weights | {"loss_extra": 1.0}

        def loss(self, batch):
            return super().loss(batch) | {"loss_extra": torch.tensor(float("inf"))}

    with pytest.raises(DivergenceError, match="'loss_extra' is inf at step 1") as caught:
        fit(setup(Fabric(accelerator="cpu", devices=1), Named(), FakeLoader(), RECIPE, out=tmp_path, quiet=True))
    assert caught.value.exit_code == 3


def signaled(where: tuple[int, int], number: int = signal.SIGINT):
    def change(epoch, i, batch):
        if (epoch, i) == where:
            os.kill(os.getpid(), number)
        return batch

    return change


FULL = {"ema": 0.9, "clip_norm": 1.0}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("where", ["in a step", "between steps", "in the validation"])
def test_an_interrupted_training_resumes_bit_for_bit(tmp_path, where, accumulate):
    recipe = settings(**FULL, accumulate=accumulate)

    def validate(module, epoch):
        torch.rand(1)
        if where == "in the validation" and epoch == 2 and not (tmp_path / "b" / "stopped").exists() and stop:
            (tmp_path / "b" / "stopped").touch()
            os.kill(os.getpid(), signal.SIGINT)
        return {"AP": float(module.score.weight.sum())}

    class Stopping(FakeDetector):
        def loss(self, batch):
            if where == "in a step" and stop and batch.ids[0] == 4 * 104:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().loss(batch)

    def run(out: Path, change=lambda e, i, batch: batch, resume: bool = False):
        torch.manual_seed(1)
        out.mkdir(exist_ok=True)
        detector = Stopping(0.5)
        fabric = Fabric(accelerator="cpu", devices=1)
        loader = FakeLoader(change=change)
        fit(setup(fabric, detector, loader, recipe, out=out, validate=validate, resume=resume, quiet=True, log_every=4))

    stop = False
    run(tmp_path / "a")
    stop = True
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"to go on: fusedet train .* --resume"):
        run(tmp_path / "b", signaled((1, 4)) if where == "between steps" else lambda e, i, batch: batch)
    assert signal.getsignal(signal.SIGINT) is handler
    between = checkpoint.load(tmp_path / "b" / "last.ckpt")
    expected = {"in a step": (5, 6), "between steps": (4, 4), "in the validation": (7, 7)}[where]
    assert (between["epoch"], between["position"]) == (1, expected[accumulate - 1])
    torch.rand(17)
    stop = False
    # rows behind the checkpoint, as a crash leaves them
    with (tmp_path / "b" / "metrics.csv").open("a") as file:
        file.write("9,999,1,1,1,1,1,1,1\n2,13")
    run(tmp_path / "b", resume=True)

    a, b = (checkpoint.load(tmp_path / name / "last.ckpt") for name in "ab")
    assert same(a["model"], b["model"])
    assert same(a["ema"], b["ema"])
    assert a["step"] == b["step"] == 3 * -(-7 // accumulate)
    assert a["best"] == b["best"]
    best = [checkpoint.load_weights(tmp_path / name / "best.safetensors") for name in "ab"]
    assert same(best[0][0], best[1][0])
    assert best[0][1] == best[1][1]
    assert (tmp_path / "a" / "metrics.csv").read_bytes() == (tmp_path / "b" / "metrics.csv").read_bytes()


def test_a_finished_training_resumes_to_its_end_at_once(tmp_path):
    _, first = train(tmp_path, validate=scores(1, 2, 3))
    detector, again = train(tmp_path, validate=scores(), resume=True)
    assert again == first
    assert same(detector.state_dict(), checkpoint.load(tmp_path / "last.ckpt")["model"])


def test_more_epochs_may_be_asked_for(tmp_path):
    train(tmp_path)
    assert train(tmp_path, settings(epochs=4), resume=True)[1]["step"] == 28


def test_a_training_in_fp16_resumes(tmp_path):
    """The scaler's counters are integers, which its update needs. Autocast, which a CPU lacks, is left out."""

    class Scaled(MixedPrecision):
        def __init__(self):
            super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", growth_interval=5))

        def forward_context(self):
            return nullcontext()

        def convert_input(self, data):
            return data

    def run(out: Path, epochs: int, resume: bool = False):
        torch.manual_seed(1)
        out.mkdir(exist_ok=True)
        fabric, recipe = Fabric(accelerator="cpu", devices=1, plugins=[Scaled()]), settings(epochs=epochs)
        fit(setup(fabric, FakeDetector(0.5), FakeLoader(), recipe, out=out, quiet=True, resume=resume))
        return checkpoint.load(out / "last.ckpt")

    run(tmp_path / "b", 2)
    whole, resumed = run(tmp_path / "a", 3), run(tmp_path / "b", 3, resume=True)
    assert same(whole["model"], resumed["model"])
    assert whole["scaler"] == resumed["scaler"]
    assert resumed["scaler"]["_growth_tracker"] == 21 % 5


def test_the_averaged_copy_validates_with_the_loss_of_the_epoch(tmp_path):
    seen = []

    class Dependent(FakeDetector):
        epoch = -1

        def set_epoch(self, epoch):
            self.epoch = epoch

    def validate(module, epoch):
        seen.append((module.epoch, epoch))
        return {"AP": 0.0}

    train(tmp_path, settings(ema=0.9), kind=Dependent, validate=validate)
    assert seen == [(0, 1), (1, 2), (2, 3)]


def test_resuming_what_cannot_be_resumed(tmp_path):
    with pytest.raises(InputError, match="no checkpoint exists at"):
        train(tmp_path, resume=True)
    train(tmp_path)
    table = (tmp_path / "metrics.csv").read_text()
    with pytest.raises(InputError, match="already holds a training"):
        train(tmp_path)
    with pytest.raises(InputError, match="batches per epoch was 7 and is now 5"):
        train(tmp_path, loader=FakeLoader(5), resume=True)
    with pytest.raises(InputError, match="averaging was False and is now True"):
        train(tmp_path, settings(ema=0.9), resume=True)
    assert (tmp_path / "metrics.csv").read_text() == table
    checkpoint.save(tmp_path / "last.ckpt", {"model": {}})
    with pytest.raises(InputError, match="cannot be resumed: it holds no best, ema, "):
        train(tmp_path, resume=True)


def test_a_held_section_ends_before_the_interruption():
    done = []

    def hold(interrupts):
        with interrupts.held():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(True)

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        hold(interrupts)
    assert done
    with Interrupts(agreed=True) as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        with interrupts.held():
            pass
        assert interrupts.received == signal.SIGINT
        interrupts._first -= 3
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# -- what is shown and logged


def test_remaining_time_counts_validations():
    assert Pace().remaining(100, 1) == ""
    assert Pace(steps=10, step_seconds=20).remaining(30, 2) == "over 60 s left"
    assert Pace(steps=10, step_seconds=20).remaining(30, 0) == "60 s left"
    assert Pace(steps=10, step_seconds=20, validations=2, validation_seconds=60).remaining(1800, 2) == "1 h 1 min left"


def test_plain_lines_without_a_terminal(capsys, tmp_path):
    fabric = Fabric(accelerator="cpu", devices=1)
    fit(setup(fabric, FakeDetector(), FakeLoader(), RECIPE, out=tmp_path, validate=scores(0.5, 0.6, 0.4)))
    said = capsys.readouterr().out
    assert re.search(r"^epoch 1/3, step 7/7: over \d+ s left · loss ", said, re.MULTILINE)
    assert "epoch 2/3: AP 0.6 (best)\n" in said
    assert "epoch 3/3: AP 0.4\n" in said


def test_a_bar_on_a_terminal():
    console = Console(force_terminal=True, width=160, record=True)
    with Display(3, 7, console=console) as display:
        display.step(2, 5)
        display.show(2, 5, {"loss": 1.25, "lr": 0.01}, "0:01:00 left")
        display.say("a line")
    said = console.export_text()
    assert "epoch 2/3" in said
    assert "5/7" in said
    assert "0:01:00 left · loss 1.25 · lr 0.01" in said


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    train(tmp_path, loggers=logging.make_loggers(["tensorboard"], tmp_path), validate=scores(1, 2, 3))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"loss", "loss_box", "lr", "AP"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("AP")] == [(7, 1.0), (14, 2.0), (21, 3.0)]


def test_loggers_that_are_absent_or_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(logging, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="'wandb' is not installed: pip install wandb"):
        logging.make_loggers(["wandb"], tmp_path)
    with pytest.raises(
        InputError, match=r"unknown value 'tensorbord' of train\.loggers\.0: did you mean 'tensorboard'"
    ):
        Train(loggers=["tensorbord"])


def test_services_get_every_row_and_their_end(tmp_path, monkeypatch):
    calls: list[tuple] = []
    run = types.SimpleNamespace(
        log=lambda row, step: calls.append((row["AP"], step)), finish=lambda exit_code: calls.append(exit_code)
    )
    wandb = types.SimpleNamespace(init=lambda **options: run)
    mlflow = types.SimpleNamespace(
        start_run=lambda run_name: run,
        log_metrics=lambda row, step: calls.append((row["AP"], step)),
        end_run=calls.append,
    )
    monkeypatch.setattr(logging, "find_spec", lambda name: True)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    for name, end in (("wandb", 0), ("mlflow", "FINISHED")):
        calls.clear()
        (logger,) = logging.make_loggers([name], tmp_path)
        logger.log_metrics({"AP": 0.5}, step=7)
        logger.finalize("success")
        assert calls == [(0.5, 7), end]


def test_mlflow_takes_the_names_of_all_metrics(tmp_path, monkeypatch):
    """Its names of metrics have letters, digits, and some signs, without @."""
    seen = {}
    mlflow = types.SimpleNamespace(start_run=lambda run_name: True, log_metrics=lambda row, step: seen.update(row))
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    logging.MLflow(tmp_path).log_metrics({"AP": 0.5, "mask_AP@300": 0.25}, step=7)
    assert seen == {"AP": 0.5, "mask_AP_at_300": 0.25}
