"""A changed or damaged run directory: --resume refuses it in one sentence, changes nothing and executes nothing."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from fakes import FakeDetector, FakeLoader
from fusedet import cli, config, load
from fusedet.ablation import cost, worker
from fusedet.ablation.plan import Run
from fusedet.api import train as command
from fusedet.config import Train
from fusedet.data.readers.auto import read_dataset
from fusedet.engine import checkpoint
from fusedet.engine.checkpoint_validation import Checkpoint
from fusedet.engine.trainer import fit, setup
from fusedet.errors import InputError
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

State = dict[str, Any]
RECIPE = Train(epochs=2, optimizer="adamw", lr=0.05, warmup_steps=0, ema=0.9)
METRICS = {"AP": 0.5}
FIELDS = [field.alias or name for name, field in Checkpoint.model_fields.items()]


class Stops(FakeLoader):
    """A loader whose eleventh batch of all cannot be read."""

    def epoch(self, epoch: int, start: int = 0) -> Any:
        for number, batch in enumerate(super().epoch(epoch, start), start):
            if (epoch, number) == (1, 4):
                raise InputError("no such image")
            yield batch


def train(out: Path, loader: Any = None, resume: bool = True, **changes: Any) -> Any:
    torch.manual_seed(1)
    fabric, recipe = Fabric(accelerator="cpu", devices=1), changes.pop("recipe", RECIPE)
    options = {"validate": lambda module, epoch: METRICS, "quiet": True, "meta": {"config": "model: x"}, "log_every": 3}
    options |= changes
    return fit(setup(fabric, FakeDetector(0.5), loader or FakeLoader(), recipe, out=out, resume=resume, **options))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in the middle of its second epoch, between two rows of its table. Not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    out.mkdir()
    with pytest.raises(InputError, match="no such image"):
        train(out, Stops(), resume=False)
    state = checkpoint.load(out / "last.ckpt")
    assert (state["step"], state["position"], state["processes"][0]["meter"]["steps"], state["best"]) == (11, 4, 2, 0.5)
    return out


def put(key: str, value: Any) -> Callable[[State], None]:
    """Return a function that replaces a value by its key; "-" removes it."""

    def change(state: State) -> None:
        *path, last = key.split("/")
        place: Any = state
        for name in path:
            place = place[int(name) if isinstance(place, list) or name.isdecimal() else name]
        if value == "-":
            del place[last]
        else:
            place[int(last) if isinstance(place, list) or last.isdecimal() else last] = value

    return change


WRONG = {"none": None, "text": "x", "list": [], "mapping": {}, "tensor": torch.zeros(3), "absent": "-"}
OFTEN = ("none", "tensor", "absent")
FINE = {("best", "none"), ("metrics", "mapping"), ("scaler", "mapping"), ("made with", "mapping"), ("meta", "mapping")}
NUMPY = ("MT19937", [0] * 624, 3, 0, 0.0)
DAMAGES: dict[str, tuple[str, Callable[[State], None]]] = {
    f"{key} {name}": (key, put(key, copy.copy(value)))
    for key in FIELDS
    for name, value in WRONG.items()
    if (key, name) not in FINE
}
DAMAGES |= {
    f"{key} {name}": (text, put(key, value))
    for name, key, value, text in [
        ("negative", "step", -1, "step"),
        ("of another place", "step", 12, "step"),
        ("endless", "step", 2**64, "step"),
        ("true", "stale", True, "stale"),
        ("negative", "position", -3, "position"),
        ("behind the epoch", "position", 10**9, "position"),
        ("negative", "epoch", -1, "epoch"),
        ("of a tensor", "metrics/AP", torch.zeros(2), "metrics.AP"),
        ("negative", "tables/metrics.csv/rows", -5, "tables.metrics.csv.rows"),
        ("text", "tables/metrics.csv/rows", "a", "tables.metrics.csv.rows"),
        ("numbers", "tables/metrics.csv/columns", [1], "tables.metrics.csv.columns.0"),
        ("absent", "tables/speed.csv", "-", "tables.speed.csv"),
        ("empty", "processes", [], "processes"),
        ("absent", "processes/0/random", "-", "processes.0.random"),
        ("absent", "processes/0/meter", "-", "processes.0.meter"),
        ("text", "processes/0/meter/sums", "x", "processes.0.meter.sums"),
        ("absent", "processes/0/meter/sums", None, "processes.0.meter.sums"),
        ("too long", "processes/0/meter/sums", torch.zeros(9), "processes.0.meter.sums"),
        ("texts", "processes/0/random/python", ("a", "b", "c"), "processes.0.random.python.0"),
        ("short", "processes/0/random/python", (3, (1, 2), None), "processes.0.random"),
        ("short", "processes/0/random/torch", torch.zeros(3, dtype=torch.uint8), "processes.0.random"),
        ("floats", "processes/0/random/torch", torch.zeros(5056), "processes.0.random"),
        ("short", "processes/0/random/numpy", (1, 2), "processes.0.random.numpy"),
        ("other", "processes/0/random/numpy", ("PCG64", *NUMPY[1:]), "processes.0.random"),
        ("far", "processes/0/random/numpy", (*NUMPY[:2], 10**6, *NUMPY[3:]), "processes.0.random.numpy"),
        ("few", "processes/0/random/numpy", (NUMPY[0], [1], *NUMPY[2:]), "processes.0.random.numpy"),
        ("empty", "optimizer/param_groups", [], "the same options"),
        ("other", "optimizer/param_groups/0/params", [0], "the same options"),
        ("text", "optimizer/param_groups/0/lr", "x", "optimizer.param_groups.0.lr"),
        ("empty", "optimizer/state", {}, "optimizer.state"),
        ("lost", "optimizer/state/0", {}, "optimizer.state.0"),
        ("half lost", "optimizer/state/0/exp_avg", "-", "optimizer.state.0"),
        ("beyond", "optimizer/state/99", {}, "optimizer.state.99"),
        ("by text", "optimizer/state/x", {}, "optimizer.state"),
        ("of another shape", "optimizer/state/0/exp_avg", torch.zeros(1), "optimizer.state.0.exp_avg"),
        (
            "of whole numbers",
            "optimizer/state/0/exp_avg",
            torch.zeros(8, 3, dtype=torch.int64),
            "optimizer.state.0.exp_avg",
        ),
        ("of another shape", "optimizer/state/0/step", torch.zeros(2), "optimizer.state.0.step"),
        ("other", "scaler/scale", 1.0, "scaler"),
        ("a tensor", "plan/precision", torch.zeros(2), "plan.precision"),
        ("a number", "made with/torch", 3, "made with.torch"),
        ("a list", "meta/config", [[["x"]]], "meta.config"),
        ("text", "model/score.weight", "x", "model.score.weight"),
        ("of another shape", "model/score.weight", torch.zeros(2), "score.weight is (2,)"),
        ("text", "ema/score.weight", "x", "ema"),
        ("of another shape", "ema/score.weight", torch.zeros(2), "score.weight is (2,)"),
    ]
}
DAMAGES["ema mapping"] = ("does not fit this model: without body.0.weight", put("ema", {}))
DAMAGES["plan mapping"] = ("batches per epoch was None and is now 7", put("plan", {}))
DAMAGES["plan of other data"] = ("batches per epoch was 5 and is now 7", put("plan/batches per epoch", 5))
DAMAGES["a key that is no text"] = ("model", lambda state: state["model"].update({5: torch.zeros(1)}))
DAMAGES["averages of a run without"] = ("averaging", put("plan/averaging", False))


def changed(run: Path, out: Path, change: Callable[[State], None]) -> Path:
    shutil.copytree(run, out)
    state = checkpoint.load(out / "last.ckpt")
    change(state)
    torch.save(state, out / "last.ckpt")
    return out


def is_fast(name: str) -> bool:
    """Whether `make test` has a damage: one wrong value per field, and all that suit one field only."""
    key, _, kind = name.rpartition(" ")
    return key not in FIELDS or kind not in WRONG or kind == OFTEN[FIELDS.index(key) % len(OFTEN)]


@pytest.mark.parametrize(
    "name", [name if is_fast(name) else pytest.param(name, marks=pytest.mark.slow) for name in DAMAGES]
)
def test_a_whole_but_wrong_checkpoint_is_refused(stopped: Path, tmp_path: Path, name: str) -> None:
    text, change = DAMAGES[name]
    out = changed(stopped, tmp_path / "run", change)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(InputError) as caught:
        train(out)
    said = str(caught.value)
    assert text in said
    assert said.startswith(str(out / "last.ckpt"))
    assert "\n" not in said
    assert len(said) < 1000
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_harmless_changes_are_resumed(stopped: Path, tmp_path: Path) -> None:
    def older(state: State) -> None:
        state["made with"] = {}
        state["optimizer"]["more"] = state["more"] = 1
        for moments in state["optimizer"]["state"].values():  # two numbers that share their memory could not be moved
            moments["exp_avg_sq"] = torch.full((1,), 0.1).expand(moments["exp_avg_sq"].shape)
        for group in state["optimizer"]["param_groups"]:
            group |= {"weight_decay": "x", "betas": None, "maximize": True}  # the recipe says these

    lines: list[str] = []
    assert train(changed(stopped, tmp_path / "run", older), say=lines.append)["step"] == 14
    assert any("another torch: None until step 11" in line for line in lines)
    assert train(changed(stopped, tmp_path / "same", lambda state: None))["step"] == 14


def test_another_seed_is_refused(stopped: Path, tmp_path: Path) -> None:
    out = changed(stopped, tmp_path / "run", put("plan/seed", 3))
    loader = FakeLoader()
    loader.seed = 4  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="cannot be resumed: seed was 3 and is now 4"):
        train(out, loader)


def test_the_seed_of_a_run_may_not_change(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", str(run_copy), "--resume", "train.epochs=2", "train.seed=7"]) == 2
    assert "last.ckpt cannot be resumed: seed was 0 and is now 7" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("content", ['{"data": null}', "{}", "\udcff", "[" * 100_000])
def test_a_damaged_run_json(run_copy: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    (run_copy / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    assert cli.run(["train", str(run_copy), "--resume"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{run_copy}/run.json is damaged" in said.replace(" /", "/")


# -- code of untrusted files


@pytest.fixture
def poisoned(run_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A run whose best.safetensors alone names a class of another package, and the file that its import would leave."""
    ran = tmp_path / "ran"
    (tmp_path / "strange_parts.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom fusedet.models.necks import FPN as Neck\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    state, meta = checkpoint.load_weights(run_copy / "best.safetensors")
    tree = config.parse_yaml(meta["config"], "x")
    tree["model"]["neck"] = "strange_parts:Neck"
    checkpoint.save_weights(run_copy / "best.safetensors", state, meta | {"config": json.dumps(tree)})
    return run_copy, ran


def test_the_weights_of_a_run_name_no_class(
    poisoned: tuple[Path, Path], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's config is checked where it is read; its weights are only loaded into the model of that config."""
    run, ran = poisoned
    (run / "run.json").unlink()
    reported: list[list[State]] = []  # in the place of images
    for module in (command, worker):
        monkeypatch.setattr(
            module, "write_report", lambda dataset, results, metrics, out, title: reported.append(results) or {}
        )
    assert cli.run(["train", str(run), "--resume", "--json"]) == 0
    assert json.loads((run / "run.json").read_text())["data"].keys() == {"train", "val"}, "written again"
    options = [f"data={scenes}", *SMALL, "test.max_det=7"]
    cell = Run("a row", config.load("retinanet_tiny", [*options, f"out={tmp_path / 'scored'}"]), run)
    worker.score_trained_weights(cell, lambda text: None)
    most = [max(Counter(one["image_id"] for one in results).values()) for results in reported]
    assert most[0] > most[1] == 7
    cost.measure_prediction({"a row": cell}, read_dataset(scenes, "val"), torch.device("cpu"), seconds=0)
    assert not ran.exists()
    with pytest.raises(InputError, match="--trust"):
        load(run)
    load(run, trust=True)
    assert ran.exists(), "it could be imported"
