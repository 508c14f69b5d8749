"""`fusedet ablate`: what is run, how it goes on after a stop, what the table and the page say, and what is refused before anything runs."""

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
from rich.console import Console

from conftest import SMALL
from fusedet import ablation, cli
from fusedet.ablation import cost, estimate, launcher, render, summary_text, worker
from fusedet.ablation.plan import Plan, Run
from fusedet.config import Config
from fusedet.engine.trainer import NonFinite
from fusedet.errors import InputError

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
    """The folder of an ablation with two seeds. Not to be changed."""
    out = tmp_path_factory.mktemp("ablations") / "out"
    assert (
        cli.run(["ablate", str(table), f"data={scenes}", f"out={out}", "--seeds", "2", "--resamples", "60", *SMALL])
        == 0
    )
    return out


@pytest.fixture
def plan(scenes: Path, table: Path, tmp_path: Path) -> Plan:
    return ablation.make_plan(
        ablation.load_table(table), [f"data={scenes}", *SMALL], seeds=2, out=tmp_path / "out", say=lambda text: None
    )


def load(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "table.json").read_text()))


def row(found: dict[str, Any], label: str) -> dict[str, Any]:
    return next(one for one in found["rows"] if one["label"] == label)


# -- what is run


def test_equal_rows_are_trained_once(done: Path) -> None:
    runs = sorted(str(file.parent.relative_to(done)) for file in done.rglob("metrics.json"))
    assert runs == sorted(f"{slug}/seed{s}" for slug in SLUGS for s in (0, 1))
    found = load(done)
    assert row(found, "plain")["same_as"] == "plain, 1 conv"
    assert row(found, "plain")["measured"] == row(found, "plain, 1 conv")["measured"]


def test_folders_do_not_depend_on_what_is_chosen(plan: Plan, scenes: Path, table: Path, tmp_path: Path) -> None:
    few = ablation.make_plan(
        ablation.load_table(table),
        [f"data={scenes}", *SMALL],
        rows=["FPN*+BFP"],
        seeds=1,
        out=tmp_path / "out",
        say=lambda t: None,
    )
    assert [[c.folder.parent.name for c in cells] for cells in few.to_run()] == [["fpn_bfp"]]
    assert few.runs("plain")[0] == plan.runs("plain, 1 conv")[0]
    assert [cell.seed for cell in plan.runs("plain")] == [0, 1]


def test_labels_of_rows_may_hold_commas(scenes: Path, table: Path) -> None:
    def chosen(*rows: str) -> tuple[str, ...]:
        return ablation.make_plan(ablation.load_table(table), rows=rows, need_data=False).chosen

    assert chosen("plain, 1 conv,FPN*+BFP") == ("plain, 1 conv", "FPN*+BFP")
    assert chosen("plain,plain, 1 conv") == ("plain", "plain, 1 conv")
    assert chosen("plain", "FPN*+BFP", "plain") == ("plain", "FPN*+BFP")


def test_labels_that_look_alike_have_their_own_folders(tmp_path: Path) -> None:
    file = tmp_path / "t.yaml"
    rows = "".join(
        f"  - {{label: '{label}', overrides: [model.neck={neck}]}}\n"
        for label, neck in [("A*", "fpn"), ("A", "pafpn"), ("*", "bifpn")]
    )
    file.write_text(f"base: retinanet_tiny\nrows:\n{rows}")
    plan = ablation.make_plan(ablation.load_table(file), need_data=False, out=tmp_path)
    assert [plan.runs(label)[0].folder.parent.name for label in plan.configs] == ["a", "a-2", "row"]


def test_a_finished_table_runs_nothing(
    done: Path, scenes: Path, table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    monkeypatch.setattr(worker, "train", lambda *a, **k: pytest.fail("trained again"))
    assert (
        cli.run(["ablate", str(table), f"data={scenes}", f"out={out}", "--seeds", "2", "--resamples", "50", *SMALL])
        == 0
    )
    assert load(out)["rows"][0]["measured"] == load(done)["rows"][0]["measured"]
    # both calls are in the report, with paths from here
    assert [words[1:3] for words in load(out)["commands"]] == [["ablate", summary_text.shorten_path(str(table))]] * 2


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


def test_killed_and_started_again_gives_the_same_table(scenes: Path, table: Path, tmp_path: Path) -> None:
    words = ["ablate", str(table), f"data={scenes}", "--seeds", "2", "--resamples", "60", *SMALL, "train.epochs=2"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    dead = subprocess.run(
        [sys.executable, "-c", KILLED, *words, f"out={tmp_path / 'a'}"], env=env, capture_output=True, timeout=300
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()[-2000:]
    assert not (tmp_path / "a" / "table.json").exists()
    assert not (tmp_path / "a" / "fpn_bfp" / "seed0" / "metrics.json").exists()
    for name in ("a", "b"):
        assert cli.run([*words, f"out={tmp_path / name}"]) == 0
    a, b = (load(tmp_path / name) for name in ("a", "b"))
    times = [json.loads((tmp_path / "a" / "fpn_bfp" / f"seed{s}" / "time.json").read_text()) for s in (0, 1)]
    assert [one["resumed"] for one in times] == [True, False]
    assert times[0]["seconds"] is None  # nobody knows how long the killed session was
    assert times[1]["seconds"] == sum(times[1]["sessions"]) > 0
    assert "training time not known</td><td>1 runs" in (tmp_path / "a" / "report.html").read_text()
    for one, other in zip(a["rows"], b["rows"]):
        assert [one.get(key) for key in ("measured", "difference", "classes", "conclusion")] == [
            other.get(key) for key in ("measured", "difference", "classes", "conclusion")
        ]
    shown = [[sheet.rows for sheet in render.make_sheets(found)[:2]] for found in (a, b)]
    assert shown[0] == shown[1]


def test_a_run_that_stopped_before_its_first_checkpoint_begins_anew(plan: Plan) -> None:
    cell = plan.runs("plain")[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "config.yaml").write_text(cell.config.to_yaml())
    (cell.folder / "best.safetensors.part").write_text("half")
    data = plan.data["plain"]
    assert cell.state(data) == "absent"
    worker.execute_run(cell, say=lambda text: None, quiet=True)
    assert cell.state(data) == "finished"
    (cell.folder / "metrics.json").write_text('{"AP": 0.')  # cut off when it was written
    assert cell.state(data) == "begun"


def test_a_run_that_diverged_is_told_and_the_others_go_on(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    real = worker.train

    def train(config: Any, **options: Any) -> Any:
        if "fpn_bfp" in str(config.out):
            Path(config.out).mkdir(parents=True)
            (Path(config.out) / "config.yaml").write_text(config.to_yaml())
            raise NonFinite("loss is nan at step 3")
        return real(config, **options)

    monkeypatch.setattr(worker, "train", train)
    found, files = ablation.run_plan(plan, ablation.LaunchOptions(resamples=40), say=lambda text: None, quiet=True)
    one = row(found, "FPN*+BFP")
    assert ([run["state"] for run in one["runs"]], one["measured"], one["difference"]) == (
        ["failed", "failed"],
        None,
        None,
    )
    assert "loss is nan at step 3" in files["page"].read_text()
    assert one["conclusion"] == "Not measured: nothing can be said."


def test_two_devices_run_side_by_side(plan: Plan, done: Path) -> None:
    """Two processes that share the CPU, each with a run of its own; what they find is what one process finds."""
    cells = plan.runs("plain")
    queue = launcher.Queue(
        [cells[:]], estimate.make_clock(plan, cost.count_costs(plan.configs, plan.classes)), beside=2
    )
    said: list[str] = []
    launcher.run_local(queue, ["cpu", "cpu"], said.append)
    assert len(said) == len(cells) == len(queue.clock.seconds[cells[0].label]) == 2
    for cell in cells:
        assert cell.state(plan.data["plain"]) == "finished"
        figures = [
            json.loads((out / cell.folder.relative_to(plan.out) / "metrics.json").read_text())["AR100"]
            for out in (plan.out, done)
        ]
        assert figures[0] == pytest.approx(figures[1], abs=1e-3)
        assert "epoch 1/1" in Path(f"{cell.folder}.log").read_text()


def test_what_a_process_says_last_is_told(plan: Plan) -> None:
    cell = plan.runs("plain")[0]
    broken = replace(cell, config=replace(cell.config, data=replace(cell.config.data, path="/nowhere")))
    queue = launcher.Queue([[broken]], estimate.Clock({}, {}))
    with pytest.raises(
        InputError, match=r"row 'plain, 1 conv', seed 0, ended with 2: /nowhere does not exist.*seed0\.log"
    ):
        launcher.run_local(queue, ["cpu", "cpu"], lambda text: None)


class Jobs:
    """Takes submitit's place: jobs of an earlier call are still running, those submitted now run when they are waited for."""

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

            def submit(self, function: Callable[..., None], cell: Run, *rest: Any) -> Job:
                jobs.submitted.append(cell.folder.parent.name)
                return Job(Path(), f"job{len(jobs.submitted)}", lambda: function(cell, *rest))

        self.module = SimpleNamespace(AutoExecutor=AutoExecutor, SlurmJob=Job)


def stop_at_once(config: Config, **options: Any) -> None:
    """A training that leaves nothing to go on from."""
    Path(str(config.out)).mkdir(parents=True)
    (Path(str(config.out)) / "config.yaml").write_text(config.to_yaml())


def test_a_job_per_run_is_submitted_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs()
    monkeypatch.setitem(sys.modules, "submitit", jobs.module)
    monkeypatch.setattr(launcher, "find_spec", lambda name: True)
    monkeypatch.setattr(launcher, "which", lambda name: name)
    monkeypatch.setattr(worker, "train", stop_at_once)
    launch = ablation.LaunchOptions(launcher="slurm", slurm={"timeout_min": 5}, resamples=40)
    said: list[str] = []
    with pytest.raises(InputError, match="--budget goes with --launcher local"):
        ablation.run_plan(plan, replace(launch, budget=5.0))
    ablation.run_plan(plan, launch, say=said.append)
    assert jobs.submitted == ["plain_1_conv"] * 2 + ["fpn_bfp"] * 2
    assert (jobs.options, jobs.waited) == ({"name": "fusedet", "timeout_min": 5}, ["job1", "job2", "job3", "job4"])
    # nothing has finished: the same command waits for the same jobs
    ablation.run_plan(plan, launch, say=said.append)
    assert len(jobs.submitted) == 4
    assert jobs.waited == ["job1", "job2", "job3", "job4"] * 2


# -- budget and estimate


def test_the_budget_says_what_is_left(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    ablation.run_plan(plan, ablation.LaunchOptions(budget=0.001, resamples=40), say=said.append, quiet=True)
    left = next(text for text in said if "undone" in text)
    assert re.search(
        r"leaves 4 runs undone, about .*: 'plain, 1 conv' seed 0, 'plain, 1 conv' seed 1, 'FPN\*\+BFP' seed 0", left
    )
    assert "timing a training step of 'plain, 1 conv'" in said
    found = load(plan.out)
    assert [one["state"] for one in row(found, "plain")["runs"]] == ["absent"] * 2
    assert render.make_cost_sheet(found).rows[2][5:] == ["not measured"] * 4
    assert not list(plan.out.rglob("config.yaml"))


# -- dry run


def test_dry_run_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ablate", "smsl_table2", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {one["label"]: one for one in found["rows"]}
    assert list(rows) == ["FPN", "FPN+SMSL", "PANet*", "PANet*+SMSL", "Mask", "Mask+SMSL", "Cascade", "Cascade+SMSL"]
    for one in rows.values():
        assert one["trainable"] / 1e6 == pytest.approx(one["params_M"], abs=0.011)
        assert set(one["published"]) == {"AP", "AP50", "AP75"}
        assert (one["left"], one["seconds"]) == (3, None)


def test_dry_run_with_data_estimates(
    scenes: Path, table: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["ablate", str(table), f"data={scenes}", f"out={tmp_path / 'x'}", "--dry-run", *SMALL]
    assert cli.run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plain, same, other, cited = found["rows"]
    assert (plain["left"], same["left"], other["left"], cited["left"]) == (3, 0, 3, None)
    assert found["basis"].startswith("one training step of 'plain")
    assert found["seconds"] == pytest.approx(plain["seconds"] + other["seconds"])
    assert other["seconds"] / plain["seconds"] == pytest.approx(other["multiply_adds"] / plain["multiply_adds"])
    assert not (tmp_path / "x").exists()


def test_dry_run_after_a_run_rests_on_it(
    done: Path, scenes: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        cli.run(["ablate", str(table), f"data={scenes}", f"out={done}", "--seeds", "3", "--dry-run", "--json", *SMALL])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["basis"].startswith("what 4 finished runs took")
    assert [one["left"] for one in found["rows"]] == [1, 0, 1, None]
    seconds = [json.loads((done / "fpn_bfp" / f"seed{s}" / "time.json").read_text())["seconds"] for s in (0, 1)]
    assert found["rows"][2]["seconds"] == pytest.approx(sum(seconds) / 2)


def test_tables_are_whole_where_no_terminal_breaks_them(capsys: pytest.CaptureFixture[str]) -> None:
    """In a terminal of 60 columns words of the head are whole and labels folded, in a file every row is a line."""
    sheet = render.Sheet(
        "t", ["row", *(["multiply-adds (G)"] * 12)], [["a label of more than twenty-four letters", *(["250.49"] * 12)]]
    )
    render.print_sheet(Console(), sheet)
    assert any(
        line.count("250.49") == 12 and "of more than twenty-four letters" in line
        for line in capsys.readouterr().out.splitlines()
    )
    text = io.StringIO()
    few = render.Sheet(
        "t", ["row", "multiply-adds (G)", "AP"], [["a label of more than twenty-four letters", "250.49", "1.0"]]
    )
    render.print_sheet(Console(file=text, force_terminal=True, width=60), few)
    assert "multiply-adds" in text.getvalue()
    assert "…" not in text.getvalue()


# -- the summary


def test_figures_are_those_of_the_runs(done: Path) -> None:
    found = load(done)
    for label, slug in (("plain", SLUGS[0]), ("FPN*+BFP", SLUGS[1])):
        own = [json.loads((done / slug / f"seed{s}" / "metrics.json").read_text()) for s in (0, 1)]
        measured = row(found, label)["measured"]
        for name in ("AP", "AP50", "AR100"):
            values = [100 * one[name] for one in own]
            assert measured[name]["values"] == pytest.approx(values)
            assert measured[name]["mean"] == pytest.approx(sum(values) / 2)
            half = 12.706 * abs(values[0] - values[1]) / 2  # t of one degree of freedom; s / sqrt(2) = |a - b| / 2
            assert measured[name]["high"] - measured[name]["mean"] == pytest.approx(half, rel=1e-3)
    change = row(found, "FPN*+BFP")["difference"]["AP50"]["value"]
    means = [row(found, label)["measured"]["AP50"]["mean"] for label in ("plain", "FPN*+BFP")]
    assert change == pytest.approx(means[1] - means[0], abs=1e-6)
    assert row(found, "plain")["difference"] is None
    assert len(row(found, "FPN*+BFP")["classes"]) == len(found["data"]["classes"])


def test_cost_is_counted_and_measured(done: Path) -> None:
    found = load(done)
    plain, other = row(found, "plain")["cost"], row(found, "FPN*+BFP")["cost"]
    assert other["trainable"] > plain["trainable"]
    assert other["multiply_adds"] > plain["multiply_adds"]
    for one in (plain, other):
        speed = one["prediction"]
        assert 0 < speed["p50_ms"] <= speed["p95_ms"]
        assert speed["images"] == 8  # all there are
        assert speed["peak_MiB"] * 2**20 > 4 * one["parameters"]
        assert one["training"]["images_per_second"] > 0


# -- the files


def test_files_say_the_same(done: Path) -> None:
    found = load(done)
    lines = list(csv.DictReader((done / "table.csv").read_text().splitlines()))
    assert [line["row"] for line in lines] == [one["label"] for one in found["rows"]]
    assert float(lines[2]["AP_mean"]) == row(found, "FPN*+BFP")["measured"]["AP"]["mean"]
    assert (lines[1]["published_AP"], lines[1]["published_params_M"], lines[3]["AP_mean"]) == ("35.5", "37.74", "")
    text = (done / "table.md").read_text()
    for sheet in render.make_sheets(found):
        for cells in sheet.rows:
            assert "| " + " | ".join(cell.replace("*", "\\*") for cell in cells) + " |" in text
    for one in found["rows"]:
        assert one["cited"] or one["conclusion"] in text


def test_cited_rows_are_shown_as_cited(done: Path) -> None:
    first, _, cost_table = render.make_sheets(load(done))
    assert first.rows[3][:3] == ["theirs", "41.0", "cited"]
    assert "cited" in cost_table.rows[3]
    assert "conclusion" not in load(done)["rows"][3]


def test_the_page_stands_alone(done: Path) -> None:
    text = (done / "report.html").read_text()
    assert not re.search(r'(src|href|action)="(?!#|data:,)', text)
    assert not re.search(r"@import|url\((?!#)", text)
    assert "<script" not in text
    assert "Two rows &lt;b&gt;" in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    found = load(done)
    for part in (
        found["data"]["val"]["fingerprint"],
        found["data"]["train"]["fingerprint"],
        "torch ",
        "ablate ",
        "learning",
    ):
        assert part in text or part.title() in text


# -- mistakes, each one sentence before anything runs


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.run(["ablate", *words]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert text.count("\n") == 1
    return text


def test_mistakes(
    scenes: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "train", lambda *a, **k: pytest.fail("something has run"))
    out, data, mine = f"out={tmp_path / 'out'}", f"data={scenes}", str(table)
    assert "which table?" in refused(capsys)
    assert "did you mean 'smsl_table2'" in refused(capsys, "smsl_tabl2", data, out)
    assert "no output directory: add out=" in refused(capsys, mine, data)
    assert "no data: add data=" in refused(capsys, mine, out)
    assert "did you mean 'plain'" in refused(capsys, mine, data, out, "--rows", "plane")
    assert "row 'theirs' is cited" in refused(capsys, mine, data, out, "--rows", "theirs")
    assert "row 'plain, 1 conv': " in (text := refused(capsys, mine, data, out, "data.val=test"))
    assert "no split 'test'" in text
    assert "does not fit" in refused(capsys, mine, data, out, "train.epoch=1")
    assert "mine.yaml, row 'plain, 1 conv': unknown value of train.monitor" in refused(
        capsys, mine, data, out, "train.monitor=APX"
    )
    assert "finds no masks" in refused(capsys, mine, data, out, "train.monitor=mask_AP")
    assert "--budget 2x is no time" in refused(capsys, mine, data, out, "--budget", "2x")
    assert cli.run(["ablate", mine, data, out, "--launcher", "pbs"]) == 2
    assert "'pbs' is not one of 'local', 'slurm'" in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "one table at a time" in refused(capsys, mine, "necks", data, out)
    assert not (tmp_path / "out").exists()


def test_slurm_that_is_not_there(
    scenes: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    words = [str(table), f"data={scenes}", f"out={tmp_path / 'out'}", "--launcher", "slurm"]
    monkeypatch.setattr(launcher, "find_spec", lambda name: None)
    assert "pip install 'fusedet[slurm]'" in refused(capsys, *words)
    monkeypatch.setattr(launcher, "find_spec", lambda name: True)
    monkeypatch.setattr(launcher, "which", lambda name: None)
    assert "this machine has no srun" in refused(capsys, *words)


def test_a_row_of_the_middle_that_cannot_be_built(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(
        "base: retinanet_tiny\nrows:\n  - {label: a}\n  - {label: b, overrides: [model.neck.gait=cag, model.neck=mse_fpn]}\n"
    )
    text = refused(capsys, str(file), f"data={scenes}", f"out={tmp_path / 'out'}", *SMALL)
    assert "row 'b': unknown option of model.neck 'mse_fpn': 'gait'" in text


def test_folders_of_others_are_refused(
    done: Path,
    scenes: Path,
    table: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker, "train", lambda *a, **k: pytest.fail("something has run"))
    out = Path(shutil.copytree(done, tmp_path / "out"))
    words = [str(table), f"data={scenes}", f"out={out}", "--seeds", "2", *SMALL]
    text = refused(capsys, *words, "train.epochs=5")
    assert "seed0 holds a run with train.epochs=1, but row 'plain, 1 conv' is asked for with train.epochs=5" in text
    assert "holds the ablation of" in refused(capsys, "necks", f"data={scenes}", f"out={out}")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert "holds no ablation: nothing is overwritten" in refused(
        capsys, str(table), f"data={scenes}", f"out={other}", *SMALL
    )
    about = out / "fpn_bfp" / "seed1" / "run.json"
    about.write_text(about.read_text().replace(load(done)["data"]["train"]["fingerprint"], "0" * 16))
    assert "was trained on other data" in refused(capsys, *words)


def test_one_ablation_at_a_time_in_a_folder(plan: Plan) -> None:
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
