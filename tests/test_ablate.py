"""`fusedet ablate`: what is run, how it resumes, what the table and the page show, and what is refused before a run."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import fusedet
from fusedet import ablation, cli
from fusedet.ablation import cost, estimate, experiment, launcher, render, summary, summary_text, worker
from fusedet.ablation.plan import Plan, Run
from fusedet.config import Config
from fusedet.errors import DivergenceError, InputError
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

TABLE = """
title: Two rows <b>
base: retinanet_tiny
reference: plain
rows:
  - {label: "plain, 1 conv", overrides: [model.neck=fpn]}
  - {label: plain, overrides: [model.neck=fpn], published: {AP: 35.5, APl: 48.1}, params_M: 37.74, time_ms: 96.8, note: "from | a table"}
  - {label: "FPN*+BFP", overrides: ["model.neck=[fpn,bfp]"], published: {AP: 36.4}}
  - {label: theirs, cited: true, published: {AP: 41.0}, split: test-dev}
"""
SLUGS = ["plain_1_conv", "fpn_bfp"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tables") / "mine.yaml"
    file.write_text(TABLE)
    return file


@pytest.fixture(scope="module")
def done(scenes: Path, table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of an ablation with two seeds. Not to be changed."""
    out = tmp_path_factory.mktemp("ablations") / "out"
    assert (
        cli.run(["ablate", str(table), f"data={scenes}", f"out={out}", "--seeds", "2", "--resamples", "60", *SMALL])
        == 0
    )
    return out


@pytest.fixture
def unplotted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no plots for the page: they are most of the time of a report."""
    monkeypatch.setattr("fusedet.ablation.report.draw_plots", lambda *args: {})


@pytest.fixture(scope="module")
def checked_plan(scenes: Path, table: Path) -> Plan:
    return ablation.make_plan(ablation.load_table(table), [f"data={scenes}", *SMALL], seeds=2, say=lambda text: None)


@pytest.fixture
def plan(checked_plan: Plan, tmp_path: Path) -> Plan:
    """The plan of the table with an output directory of its own."""
    return replace(checked_plan, out=tmp_path / "out")


def load(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "table.json").read_text()))


def get_row(summary: dict[str, Any], label: str) -> dict[str, Any]:
    return next(row for row in summary["rows"] if row["label"] == label)


# -- what is run


def test_equal_rows_are_trained_once(done: Path) -> None:
    runs = sorted(str(file.parent.relative_to(done)) for file in done.rglob("metrics.json"))
    assert runs == sorted(f"{slug}/seed{s}" for slug in SLUGS for s in (0, 1))
    report = load(done)
    assert get_row(report, "plain")["same_as"] == "plain, 1 conv"
    assert get_row(report, "plain")["measured"] == get_row(report, "plain, 1 conv")["measured"]


def test_run_directories_do_not_depend_on_the_selected_rows(plan: Plan) -> None:
    few = replace(plan, selected=("FPN*+BFP",), seeds=1)
    assert [[run.folder.parent.name for run in runs] for runs in few.selected_runs()] == [["fpn_bfp"]]
    assert few.runs("plain")[0] == plan.runs("plain, 1 conv")[0]
    assert [run.seed for run in plan.runs("plain")] == [0, 1]


def test_labels_of_rows_may_contain_commas(table: Path) -> None:
    def select(*rows: str) -> tuple[str, ...]:
        return ablation.make_plan(ablation.load_table(table), SMALL, rows=rows, need_data=False).selected

    assert select("plain, 1 conv,FPN*+BFP") == ("plain, 1 conv", "FPN*+BFP")
    assert select("plain,plain, 1 conv") == ("plain", "plain, 1 conv")
    assert select("plain", "FPN*+BFP", "plain") == ("plain", "FPN*+BFP")


def test_similar_labels_have_separate_run_directories(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    rows = "".join(
        f"  - {{label: '{label}', overrides: [model.neck={neck}]}}\n"
        for label, neck in [("A*", "fpn"), ("A", "pafpn"), ("*", "bifpn")]
    )
    file.write_text(f"base: retinanet_tiny\nrows:\n{rows}")
    plan = ablation.make_plan(ablation.load_table(file), SMALL, need_data=False, out=tmp_path)
    assert [plan.runs(label)[0].folder.parent.name for label in plan.configs] == ["a", "a-2", "row"]


@pytest.mark.usefixtures("unplotted")
def test_finished_table_runs_nothing(
    done: Path, scenes: Path, table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    monkeypatch.setattr(worker, "train", lambda *a, **k: pytest.fail("trained again"))
    monkeypatch.setattr(summary, "measure_prediction", lambda *args: {})
    assert (
        cli.run(["ablate", str(table), f"data={scenes}", f"out={out}", "--seeds", "2", "--resamples", "50", *SMALL])
        == 0
    )
    assert load(out)["rows"][0]["measured"] == load(done)["rows"][0]["measured"]
    # Both commands are in the report, with paths relative to the working directory.
    assert [command[1:3] for command in load(out)["commands"]] == [
        ["ablate", summary_text.shorten_path(str(table))]
    ] * 2


KILLED = """
import os, signal, sys
from fusedet import cli
from fusedet.engine import trainer
save = trainer.save
def saved(run):
    save(run)
    if run.out.parts[-2:] == ("fpn_bfp", "seed0") and run.state["epoch"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
trainer.save = saved
sys.exit(cli.run(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_run_is_resumed_to_the_same_table(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: retinanet_tiny\nrows:\n  - {label: FPN*+BFP, overrides: ['model.neck=[fpn,bfp]']}\n")
    arguments = ["ablate", str(file), f"data={scenes}", "--seeds", "1", "--resamples", "60", *SMALL, "train.epochs=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments, f"out={tmp_path / 'a'}"], env=env, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert not (tmp_path / "a" / "table.json").exists()
    assert not (tmp_path / "a" / "fpn_bfp" / "seed0" / "metrics.json").exists()
    monkeypatch.setattr(summary, "measure_prediction", lambda *args: {})
    for name in ("a", "b"):
        assert cli.run([*arguments, f"out={tmp_path / name}"]) == 0
    a, b = (load(tmp_path / name) for name in ("a", "b"))
    times = [json.loads((tmp_path / name / "fpn_bfp" / "seed0" / "time.json").read_text()) for name in ("a", "b")]
    assert [time["resumed"] for time in times] == [True, False]
    assert times[0]["seconds"] is None  # the duration of the killed session is unknown
    assert times[1]["seconds"] == sum(times[1]["sessions"]) > 0
    assert "training time unknown</td><td>1 runs" in (tmp_path / "a" / "report.html").read_text()
    for resumed, whole in zip(a["rows"], b["rows"], strict=True):
        for key in ("measured", "difference", "classes", "conclusion"):
            assert resumed.get(key) == whole.get(key)
    tables = [[sheet.rows for sheet in render.make_sheets(summary)[:2]] for summary in (a, b)]
    assert tables[0] == tables[1]


def test_run_without_a_checkpoint_starts_again(plan: Plan) -> None:
    run = plan.runs("plain")[0]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.config.to_yaml())
    (run.folder / "best.safetensors.part").write_text("half")
    data = plan.data["plain"]
    assert run.state(data) == "absent"
    worker.execute_run(run, say=lambda text: None, quiet=True)
    assert run.state(data) == "finished"
    (run.folder / "metrics.json").write_text('{"AP": 0.')  # truncated while it was written
    assert run.state(data) == "resumable"


@pytest.mark.usefixtures("unplotted")
def test_diverged_run_is_reported_and_the_others_continue(
    plan: Plan, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(config: Any, **options: Any) -> None:
        out = Path(config.out)
        if "fpn_bfp" in str(out):
            out.mkdir(parents=True)
            (out / "config.yaml").write_text(config.to_yaml())
            raise DivergenceError("loss is nan at step 3")
        shutil.copytree(done / out.relative_to(plan.out), out)

    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(summary, "measure_prediction", lambda *args: {})
    report, files = ablation.run_plan(plan, ablation.LaunchOptions(resamples=40), say=lambda text: None, quiet=True)
    row = get_row(report, "FPN*+BFP")
    assert [run["state"] for run in row["runs"]] == ["failed", "failed"]
    assert row["measured"] is row["difference"] is None
    assert row["conclusion"] == "Not measured: no conclusion."
    assert [run["state"] for run in get_row(report, "plain")["runs"]] == ["finished", "finished"]
    assert "loss is nan at step 3" in files["page"].read_text()


FAKE_WORKER = """
import json, os, pathlib, sys
task = json.load(sys.stdin)
out = pathlib.Path(task["config"]["out"])
out.mkdir()
(out / "time.json").write_text(json.dumps({"seconds": 2.0, "resumed": False}))
(out / "metrics.json").write_text("{}")
print(task["label"], "on", task["config"]["device"], "with", os.environ["OMP_NUM_THREADS"])
"""


@pytest.mark.parametrize(("devices", "threads"), [(["cuda:0", "cuda:1"], 6), (["cpu", "cpu"], 3)])
def test_each_device_has_a_process(
    devices: list[str], threads: int, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fake_worker.py").write_text(FAKE_WORKER)
    monkeypatch.setattr(worker, "__name__", "fake_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    runs = plan.runs("plain")
    queue = launcher.Queue([runs[:]], estimate.Clock({"plain, 1 conv": 1.0}, {}), parallel=2)
    messages: list[str] = []
    launcher.run_local(queue, devices, messages.append)
    assert len(messages) == len(runs) == 2
    assert queue.clock.seconds == {"plain, 1 conv": [2.0, 2.0]}
    logs = {Path(f"{run.folder}.log").read_text().strip() for run in runs}
    assert logs == {f"plain, 1 conv on {device} with {threads}" for device in devices}


def test_devices_have_as_many_runs_as_asked() -> None:
    assert launcher.list_devices("cpu") == ["cpu"]
    assert launcher.list_devices("cpu", 3) == ["cpu"] * 3


@pytest.mark.slow
def test_two_processes_train_as_one_does(plan: Plan, done: Path) -> None:
    """Two processes that share the CPU, each with a run of its own, measure what one process measures."""
    runs = plan.runs("plain")
    clock = estimate.make_clock(plan, cost.count_costs(plan.configs, plan.classes))
    launcher.run_local(launcher.Queue([runs[:]], clock, parallel=2), ["cpu", "cpu"], lambda text: None)
    for run in runs:
        assert run.state(plan.data["plain"]) == "finished"
        files = [out / run.folder.relative_to(plan.out) / "metrics.json" for out in (plan.out, done)]
        ours, theirs = (json.loads(file.read_text())["AR100"] for file in files)
        assert ours == pytest.approx(theirs, abs=1e-3)
        assert "epoch 1/1" in Path(f"{run.folder}.log").read_text()


def test_worker_ends_with_the_code_of_its_error(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plan.runs("plain")[0]
    config = run.config.replace(data=run.config.data.replace(path="/nowhere"))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps({"label": run.label, "config": config.tree()})))
    assert worker.main() == 2
    assert capsys.readouterr().err.startswith("/nowhere does not exist")


def test_last_line_of_a_failed_process_is_reported(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "failing_worker.py").write_text(
        "import sys\nprint('a line')\nprint('/nowhere does not exist')\nsys.exit(2)"
    )
    monkeypatch.setattr(worker, "__name__", "failing_worker")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    queue = launcher.Queue([[plan.runs("plain")[0]]], estimate.Clock({}, {}))
    message = r"row 'plain, 1 conv', seed 0, ended with exit code 2: /nowhere does not exist.*seed0\.log"
    with pytest.raises(InputError, match=message):
        launcher.run_local(queue, ["cpu", "cpu"], lambda text: None)


class Jobs:
    """Stands in for submitit: jobs of an earlier call are still running, new jobs run when they are waited for."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.options: dict[str, Any] = {}
        self.waited: list[str] = []
        jobs = self

        class Job:
            def __init__(self, folder: Path, job_id: str, call: Callable[[], None] | None = None) -> None:
                self.job_id, self.call = job_id, call

            def done(self) -> bool:
                return False

            def exception(self) -> Exception | None:
                jobs.waited.append(self.job_id)
                try:
                    if self.call:
                        self.call()
                except InputError as error:
                    return error
                return None

        class AutoExecutor:
            def __init__(self, folder: Path, cluster: str) -> None:
                assert cluster == "slurm"

            def update_parameters(self, **options: Any) -> None:
                jobs.options = options

            def submit(self, function: Callable[..., None], run: Run, *args: Any) -> Job:
                jobs.submitted.append(run.folder.parent.name)
                return Job(Path(), f"job{len(jobs.submitted)}", lambda: function(run, *args))

        self.module = SimpleNamespace(AutoExecutor=AutoExecutor, SlurmJob=Job)


def stop_at_once(config: Config, **options: Any) -> None:
    """A training that leaves nothing to resume from."""
    Path(str(config.out)).mkdir(parents=True)
    (Path(str(config.out)) / "config.yaml").write_text(config.to_yaml())


def test_each_run_is_submitted_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    monkeypatch.setitem(sys.modules, "submitit", jobs.module)
    monkeypatch.setattr(launcher, "find_spec", lambda name: True)
    monkeypatch.setattr(launcher, "which", lambda name: name)
    monkeypatch.setattr(worker, "train", stop_at_once)
    monkeypatch.setattr(experiment, "write_ablation_report", lambda *args: {})
    launch = ablation.LaunchOptions(launcher="slurm", slurm={"timeout_min": 5}, resamples=40)
    messages: list[str] = []
    with pytest.raises(InputError, match="--budget needs --launcher local"):
        ablation.run_plan(plan, replace(launch, budget=5.0))
    with pytest.raises(InputError, match="--parallel needs --launcher local"):
        ablation.run_plan(plan, replace(launch, parallel=2))
    ablation.run_plan(plan, launch, say=messages.append)
    assert jobs.submitted == ["plain_1_conv"] * 2 + ["fpn_bfp"] * 2
    assert (jobs.options, jobs.waited) == ({"name": "fusedet", "timeout_min": 5}, ["job1", "job2", "job3", "job4"])
    # Nothing has finished: the same command waits for the same jobs.
    ablation.run_plan(plan, launch, say=messages.append)
    assert len(jobs.submitted) == 4
    assert jobs.waited == ["job1", "job2", "job3", "job4"] * 2


# -- budget and estimate


def test_budget_reports_what_it_leaves_out(plan: Plan) -> None:
    messages: list[str] = []
    ablation.run_plan(plan, ablation.LaunchOptions(budget=0.001, resamples=40), say=messages.append, quiet=True)
    left = next(text for text in messages if "leaves out" in text)
    assert re.search(
        r"leaves out 4 runs, about .*: 'plain, 1 conv' seed 0, 'plain, 1 conv' seed 1, 'FPN\*\+BFP' seed 0", left
    )
    assert "timing a training step of 'plain, 1 conv'" in messages
    report = load(plan.out)
    assert [run["state"] for run in get_row(report, "plain")["runs"]] == ["absent"] * 2
    assert render.make_cost_sheet(report).rows[2][5:] == ["not measured"] * 4
    assert not list(plan.out.rglob("config.yaml"))


# -- dry run


def test_dry_run_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rows of smsl_table2: the counted parameters are the published ones."""
    published = {row.label: row for row in ablation.load_table("smsl_table2").rows}
    rows = [
        {"label": label, "overrides": list(row.overrides), "published": dict(row.published), "params_M": row.params_M}
        for label, row in published.items()
        if label in ("FPN", "FPN+SMSL")
    ]
    file = tmp_path / "mine.yaml"
    file.write_text(
        json.dumps({"base": published["FPN"].base or ablation.load_table("smsl_table2").base, "rows": rows})
    )
    assert cli.run(["ablate", str(file), "--dry-run", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in report["rows"]] == ["FPN", "FPN+SMSL"]
    for row in report["rows"]:
        assert row["trainable"] / 1e6 == pytest.approx(row["params_M"], abs=0.011)
        assert set(row["published"]) == {"AP", "AP50", "AP75"}
        assert (row["left"], row["seconds"]) == (3, None)


def test_dry_run_with_data_estimates_the_time(
    scenes: Path, table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["ablate", str(table), f"data={scenes}", f"out={tmp_path / 'x'}", "--dry-run", *SMALL]
    assert cli.run([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    plain, same, other, cited = report["rows"]
    assert (plain["left"], same["left"], other["left"], cited["left"]) == (3, 0, 3, None)
    assert report["basis"].startswith("one training step of 'plain")
    assert report["seconds"] == pytest.approx(plain["seconds"] + other["seconds"])
    assert other["seconds"] / plain["seconds"] == pytest.approx(other["multiply_adds"] / plain["multiply_adds"])
    assert not (tmp_path / "x").exists()


def test_dry_run_estimates_from_finished_runs(
    done: Path, scenes: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.run(["ablate", str(table), f"data={scenes}", f"out={done}", "--seeds", "3", "--dry-run", "--json", *SMALL])
        == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["basis"].startswith("4 finished runs")
    assert [row["left"] for row in report["rows"]] == [1, 0, 1, None]
    seconds = [json.loads((done / "fpn_bfp" / f"seed{s}" / "time.json").read_text())["seconds"] for s in (0, 1)]
    assert report["rows"][2]["seconds"] == pytest.approx(sum(seconds) / 2)


@pytest.mark.parametrize(
    ("width", "columns", "label"), [(1000, 12, "of more than twenty-four letters"), (60, 1, "a label of more than")]
)
def test_table_fits_the_width(width: int, columns: int, label: str) -> None:
    """Words of the head stay whole; labels are folded in a narrow terminal only."""
    row = ["a label of more than twenty-four letters", *(["250.49"] * columns)]
    text = io.StringIO()
    sheet = render.Sheet("t", ["row", *(["multiply-adds (G)"] * columns)], [row])
    Console(file=text, width=width).print(render.sheet_table(sheet))
    assert any(line.count("250.49") == columns and label in line for line in text.getvalue().splitlines())
    assert text.getvalue().count("multiply-adds") == columns
    assert "…" not in text.getvalue()


# -- the summary


def test_metrics_are_those_of_the_runs(done: Path) -> None:
    report = load(done)
    for label, slug in (("plain", SLUGS[0]), ("FPN*+BFP", SLUGS[1])):
        own = [json.loads((done / slug / f"seed{s}" / "metrics.json").read_text()) for s in (0, 1)]
        measured = get_row(report, label)["measured"]
        for name in ("AP", "AP50", "AR100"):
            values = [100 * run[name] for run in own]
            assert measured[name]["values"] == pytest.approx(values)
            assert measured[name]["mean"] == pytest.approx(sum(values) / 2)
            half = 12.706 * abs(values[0] - values[1]) / 2  # t of one degree of freedom; s / sqrt(2) = |a - b| / 2
            assert measured[name]["high"] - measured[name]["mean"] == pytest.approx(half, rel=1e-3)
    change = get_row(report, "FPN*+BFP")["difference"]["AP50"]["value"]
    means = [get_row(report, label)["measured"]["AP50"]["mean"] for label in ("plain", "FPN*+BFP")]
    assert change == pytest.approx(means[1] - means[0], abs=1e-6)
    assert get_row(report, "plain")["difference"] is None
    assert len(get_row(report, "FPN*+BFP")["classes"]) == len(report["data"]["classes"])


def test_cost_is_counted_and_measured(done: Path) -> None:
    report = load(done)
    plain, other = get_row(report, "plain")["cost"], get_row(report, "FPN*+BFP")["cost"]
    assert other["trainable"] > plain["trainable"]
    assert other["multiply_adds"] > plain["multiply_adds"]
    for costs in (plain, other):
        speed = costs["prediction"]
        assert 0 < speed["p50_ms"] <= speed["p95_ms"]
        assert speed["images"] == 8  # the whole split
        assert speed["peak_MiB"] * 2**20 > 4 * costs["parameters"]
        assert costs["training"]["images_per_second"] > 0


# -- the files


def test_all_files_agree(done: Path) -> None:
    report = load(done)
    lines = list(csv.DictReader((done / "table.csv").read_text().splitlines()))
    assert [line["row"] for line in lines] == [row["label"] for row in report["rows"]]
    assert float(lines[2]["AP_mean"]) == get_row(report, "FPN*+BFP")["measured"]["AP"]["mean"]
    assert (lines[1]["published_AP"], lines[1]["published_params_M"], lines[3]["AP_mean"]) == ("35.5", "37.74", "")
    text = (done / "table.md").read_text()
    for sheet in render.make_sheets(report):
        for cells in sheet.rows:
            assert "| " + " | ".join(cell.replace("*", "\\*") for cell in cells) + " |" in text
    for row in report["rows"]:
        assert row["cited"] or row["conclusion"] in text


def test_cited_rows_are_marked(done: Path) -> None:
    first, *_, cost_table = render.make_sheets(load(done))
    assert first.rows[3][:3] == ["theirs", "41.0", "cited"]
    assert "cited" in cost_table.rows[3]
    assert "conclusion" not in load(done)["rows"][3]


def test_page_is_self_contained(done: Path) -> None:
    text = (done / "report.html").read_text()
    assert not re.search(r'(src|href|action)="(?!#|data:,)', text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "<script" not in text
    assert "Two rows &lt;b&gt;" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    report = load(done)
    for part in (
        report["data"]["val"]["fingerprint"],
        report["data"]["train"]["fingerprint"],
        "torch ",
        "ablate ",
        "learning",
    ):
        assert part in text or part.title() in text


# -- wrong input: one sentence before anything runs


def read_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.run(["ablate", *arguments]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_wrong_input(
    scenes: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "train", lambda *a, **k: pytest.fail("something has run"))
    out, data, mine = f"out={tmp_path / 'out'}", f"data={scenes}", str(table)
    assert "which table?" in read_error(capsys)
    assert "did you mean 'smsl_table2'" in read_error(capsys, "smsl_tabl2", data, out)
    assert "no output directory: add out=" in read_error(capsys, mine, data)
    assert "no data: add data=" in read_error(capsys, mine, out)
    assert "did you mean 'plain'" in read_error(capsys, mine, data, out, "--rows", "plane")
    assert "row 'theirs' is cited" in read_error(capsys, mine, data, out, "--rows", "theirs")
    assert "row 'plain, 1 conv': " in (text := read_error(capsys, mine, data, out, "data.val=test"))
    assert "no split 'test'" in text
    assert "does not fit" in read_error(capsys, mine, data, out, "train.epoch=1")
    assert "mine.yaml, row 'plain, 1 conv': unknown value 'APX' of train.monitor" in read_error(
        capsys, mine, data, out, "train.monitor=APX"
    )
    assert "no masks" in read_error(capsys, mine, data, out, "train.monitor=mask_AP")
    assert "mine.yaml, row 'plain, 1 conv': train.batch=auto may choose another number in every run" in read_error(
        capsys, mine, data, out, "train.batch=auto"
    )
    assert "--budget 2x is not a duration" in read_error(capsys, mine, data, out, "--budget", "2x")
    assert cli.run(["ablate", mine, data, out, "--launcher", "pbs"]) == 2
    assert "'pbs' is not one of 'local', 'slurm'" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "one table at a time" in read_error(capsys, mine, "necks", data, out)
    assert not (tmp_path / "out").exists()


def test_too_few_seeds_or_resamples(tmp_path: Path) -> None:
    """Python refuses what the command line refuses, before it reads the table."""
    for call in (fusedet.ablate, fusedet.estimate_power):
        for option, least in (("seeds", 1), ("resamples", 40)):
            with pytest.raises(InputError, match=f"^{option}={least - 1} must be {least} or more$"):
                call(tmp_path / "absent.yaml", out=tmp_path / "out", **{option: least - 1})
    with pytest.raises(InputError, match=r"^seeds=0 must be 1 or more$"):
        fusedet.preview_ablation(tmp_path / "absent.yaml", seeds=0)


def test_slurm_is_not_installed(
    scenes: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    arguments = [str(table), f"data={scenes}", f"out={tmp_path / 'out'}", "--launcher", "slurm", *SMALL]
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    assert "pip install 'fusedet[slurm]'" in read_error(capsys, *arguments)
    monkeypatch.setattr(launcher, "find_spec", lambda name: True)
    monkeypatch.setattr(launcher, "which", lambda name: None)
    assert "this machine has no srun" in read_error(capsys, *arguments)


def test_row_that_cannot_be_built(scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(
        "base: retinanet_tiny\nrows:\n  - {label: a}\n  - {label: b, overrides: [model.neck.gait=cag, model.neck=mse_fpn]}\n"
    )
    text = read_error(capsys, str(file), f"data={scenes}", f"out={tmp_path / 'out'}", *SMALL)
    assert "row 'b': unknown option 'gait' of model.neck 'mse_fpn'" in text


def test_foreign_output_directories_are_refused(
    done: Path, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "train", lambda *args, **options: pytest.fail("something has run"))
    plan = replace(plan, out=Path(shutil.copytree(done, tmp_path / "copy")))

    def read_refusal(plan: Plan) -> str:
        with pytest.raises(InputError) as refusal:
            ablation.run_plan(plan, ablation.LaunchOptions())
        return str(refusal.value)

    longer = {label: c.replace(train=c.train.replace(epochs=5)) for label, c in plan.configs.items()}
    text = read_refusal(replace(plan, configs=longer))
    assert "seed0 has a run with train.epochs=1, but row 'plain, 1 conv' needs train.epochs=5" in text
    assert "has the ablation of mine, not of necks" in read_refusal(replace(plan, table=ablation.load_table("necks")))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert "has no ablation: nothing is overwritten" in read_refusal(replace(plan, out=other))
    about = plan.out / "fpn_bfp" / "seed1" / "run.json"
    about.write_text(about.read_text().replace(load(done)["data"]["train"]["fingerprint"], "0" * 16))
    assert "was trained on other data" in read_refusal(plan)


def test_output_directory_is_locked(plan: Plan) -> None:
    plan.out.mkdir()
    code = "import sys, time, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, str(plan.out / launcher.LOCK)], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline().strip() == b"1"
            with pytest.raises(InputError, match="is in use by another fusedet ablate"):
                ablation.run_plan(plan, ablation.LaunchOptions())
        finally:
            other.kill()


def test_rows_are_scored_on_the_same_images(scenes: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    file.write_text("base: retinanet_tiny\nrows:\n  - {label: a}\n  - {label: b, overrides: [data.val=train]}\n")
    with pytest.raises(
        InputError, match=r"row 'b' is scored on .* but row 'a' on .* rows are compared on the same images"
    ):
        ablation.make_plan(ablation.load_table(file), [f"data={scenes}", *SMALL], say=lambda text: None)
