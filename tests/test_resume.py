"""What resuming depends on: intervals, tables, signals, other versions of torch, and deterministic algorithms."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from fakes import FakeDetector, FakeLoader
from fusedet.ablation.launcher import _check_exit
from fusedet.api.run_dir import create_run_dir
from fusedet.config import Config, Interval, Train, parse_interval
from fusedet.engine import checkpoint, train_state, trainer
from fusedet.engine.determinism import REFUSED, WORKSPACE, enable_determinism
from fusedet.engine.logging import Meter, MetricsTable
from fusedet.engine.signals import Interrupts
from fusedet.engine.trainer import Interrupted, fit, setup
from fusedet.errors import InputError, StorageError
from killing import differences


def settings(**changes: Any) -> Train:
    base: dict[str, Any] = {"epochs": 2, "lr": 0.05, "warmup_steps": 4, "milestones": (1,)}
    return Train(**base | changes)


RECIPE = settings()


def train(out: Path, recipe: Train = RECIPE, detector: Any = None, **options: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    out.mkdir(exist_ok=True)
    validate = lambda module, epoch: {"AP": float(module.score.weight.sum())}  # noqa: E731
    fabric, detector = Fabric(accelerator="cpu", devices=1), detector or FakeDetector(0.5)
    return fit(
        setup(fabric, detector, FakeLoader(), recipe, out=out, validate=validate, quiet=True, log_every=3, **options)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", Interval(seconds=90)),
        ("30min", Interval(seconds=1800)),
        ("1.5h", Interval(seconds=5400)),
        ("1h30min", Interval(seconds=5400)),
        ("500steps", Interval(steps=500)),
        ("1 step", Interval(steps=1)),
    ],
)
def test_intervals(text: str, expected: Interval) -> None:
    assert parse_interval(text, "key") == expected


@pytest.mark.parametrize("text", ["30", "min", "0steps", "2.5steps", "-1h", "0s", "30minutes", "1h30", ""])
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"train.checkpoint_every=.* such as 90s, 30min, 2h or 500steps"):
        Config(train=Train(checkpoint_every=text))


@pytest.mark.parametrize("every", ["3steps", "0.000000001s"])
def test_checkpoints_within_an_epoch_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: str
) -> None:
    train(tmp_path / "a")
    steps, write = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda path, state: (steps.append(state["step"]), write(path, state)))
    train(tmp_path / "b", settings(checkpoint_every=every))
    # after every third step or every single one, and after both epochs of seven
    assert steps == (
        [3, 6, 7, 9, 12, 14] if every == "3steps" else [1, 2, 3, 4, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 14]
    )
    assert not differences(tmp_path / "a", tmp_path / "b")


def test_a_second_interrupt_in_the_middle_of_a_step_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    """The weights may be half moved: nothing is saved."""

    class Impatient(FakeDetector):
        def loss(self, batch: Any) -> Any:
            if batch.ids[0] == 4 * 4:  # the fifth step
                os.kill(os.getpid(), signal.SIGINT)
                made.append("first")
                interrupts[0]._first -= 3
                os.kill(os.getpid(), signal.SIGINT)
                made.append("second")
            return super().loss(batch)

    made: list[str] = []
    interrupts: list[Interrupts] = []
    enter = Interrupts.__enter__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Interrupts, "__enter__", lambda self: (interrupts.append(self), enter(self))[1])
        with pytest.raises(Interrupted, match="by a second Ctrl-C after step 4") as stopped:
            train(tmp_path, settings(checkpoint_every="3steps"), Impatient(0.5))
    assert made == ["first"]
    assert stopped.value.code == 130
    assert checkpoint.load(tmp_path / "last.ckpt")["step"] == 3


def test_a_second_sigterm_does_not_take_away_the_checkpoint() -> None:
    def hold(interrupts: Interrupts) -> None:
        with interrupts.held():
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                interrupts._first -= 3

    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):
        hold(interrupts)
    assert (interrupts.received, interrupts.forced) == (signal.SIGTERM, False)


def test_a_table_goes_on_from_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    table = MetricsTable(file)
    for step in (1, 2):
        table.add({"step": step, "loss": 0.1 * step})
    state, text = table.state(), file.read_text()
    table.add({"step": 2, "AP": 0.5})
    with file.open("a") as half:
        half.write("3,0.")
    again = MetricsTable(file, state)
    assert (file.read_text(), again.lost) == (text, 0), "rows and columns of later are gone"
    file.write_text("\n".join(text.splitlines()[:2]) + "\n")
    assert MetricsTable(file, state).lost == 1


def test_another_torch_is_reported_and_another_precision_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, settings(epochs=1))
    lines: list[str] = []
    now = train_state.version
    monkeypatch.setattr(train_state, "version", lambda name: "9.9" if name in ("torch", "fusedet") else now(name))
    train(tmp_path, resume=True, say=lines.append)
    known = {name: now(name) for name in ("fusedet", "torch")}
    assert [line for line in lines if "goes on with another" in line] == [
        f"{tmp_path} goes on with another {k}: {v} until step 7, 9.9 from now on" for k, v in known.items()
    ]
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    with pytest.raises(InputError, match="precision was 32-true and is now bf16-mixed"):
        setup(fabric, FakeDetector(), FakeLoader(), RECIPE, out=tmp_path, resume=True, quiet=True)
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(InputError, match="images per batch was 4 and is now 2"):
        setup(fabric, FakeDetector(), FakeLoader(size=2), RECIPE, out=tmp_path, resume=True, quiet=True)


def test_rates_momentum_and_decay_are_as_the_options_say(tmp_path: Path) -> None:
    train(tmp_path, settings(epochs=1, momentum=0))
    assert not checkpoint.load(tmp_path / "last.ckpt")["optimizer"]["state"]
    train(tmp_path, settings(lr=0.01, momentum=0.5, weight_decay=0.25), resume=True)
    saved = checkpoint.load(tmp_path / "last.ckpt")["optimizer"]
    (group,) = saved["param_groups"]
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)
    assert group["lr"] == pytest.approx(0.001)
    assert len(saved["state"]) == len(group["params"]) == 8


def test_means_over_other_processes() -> None:
    states = [{"names": ["loss"], "sums": torch.tensor([float(n)]), "steps": 2} for n in (2, 6)]
    meter = Meter()
    meter.restore(Meter.mean(states), torch.device("cpu"))
    assert meter.pop_means(lambda values: values) == {"loss": 2.0}
    empty = {"names": [], "sums": None, "steps": 0}
    assert Meter.mean([empty, empty]) == empty


def test_what_a_killed_process_left_is_cleaned_and_no_hindrance(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.yaml.123.part").write_text("half")
    assert create_run_dir(out) == out
    train(out, settings(epochs=1))
    assert not list(out.glob(".*.part"))
    (out / ".last.ckpt.123.part").write_text("half")
    train(out, resume=True)
    assert not list(out.glob(".*.part"))
    with pytest.raises(InputError, match="not empty"):
        create_run_dir(out)


def test_best_weights_that_cannot_be_written_are_written_after_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("best.safetensors cannot be written: No space left on device")

    train(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_weights", full)
        with pytest.raises(StorageError, match="No space left"):
            train(tmp_path / "b")
    train(tmp_path / "b", resume=True)
    assert not differences(tmp_path / "a", tmp_path / "b")


def test_where_only_the_last_validation_is_to_be_done_again_nothing_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_best = trainer._keep_best

    def failing(run: train_state.TrainingRun, metrics: dict[str, float]) -> None:
        if run.state["epoch"] == 1:
            raise StorageError("metrics.csv cannot be written: No space left on device")
        keep_best(run, metrics)

    train(tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_keep_best", failing)
        with pytest.raises(StorageError, match="No space left"):
            train(tmp_path / "b")
    train(tmp_path / "b", resume=True)
    assert not differences(tmp_path / "a", tmp_path / "b")


def test_a_row_that_was_stopped_stops_the_table_with_its_code() -> None:
    for code in (130, 143):
        with pytest.raises(Interrupted, match="repeat the command") as stopped:
            _check_exit(SimpleNamespace(returncode=code), SimpleNamespace())  # type: ignore[arg-type]
        assert stopped.value.code == code


def test_deterministic_algorithms_are_asked_for_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WORKSPACE, raising=False)

    def now() -> tuple[Any, ...]:
        cudnn = torch.backends.cudnn
        return (
            torch.are_deterministic_algorithms_enabled(),
            cudnn.deterministic,
            cudnn.benchmark,
            os.environ.get(WORKSPACE),
        )

    before = now()
    with enable_determinism(False):
        assert now() == before
    with enable_determinism(True):
        assert now() == (True, True, False, ":4096:8")
    assert now() == before
    name = "adaptive_avg_pool2d_backward_cuda"
    with pytest.raises(InputError, match=f"torch has no deterministic {name} on this device"), enable_determinism(True):
        raise RuntimeError(f"{name} {REFUSED}, but you set 'torch.use_deterministic_algorithms(True)'")
    with pytest.raises(RuntimeError, match="else"), enable_determinism(True):
        raise RuntimeError("something else")
    assert now() == before
