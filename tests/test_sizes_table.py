"""The tables on synthetic data of their own: what they run, the data that they make, and their report of size bins."""

import json
import shutil

import pytest

import fusedet
from fusedet import ablation
from fusedet.ablation import cost, render, report, summary
from fusedet.data.shape_drawing import SHAPES
from fusedet.errors import InputError
from test_ablate_rows import finish_runs, make_plan, make_results


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sizes", "seed_noise"])
def test_preview_counts_with_one_class_of_all_shapes(name):
    preview = fusedet.preview_ablation(name, say=lambda text: None)
    assert preview.classes == 1
    assert (preview.seconds, preview.basis) == (0, "")
    assert all(row["left"] == 3 for row in preview.rows)


def test_preview_counts_the_classes_that_the_rows_keep(tmp_path):
    """Those of the synthetic data, which is not generated."""
    (tmp_path / "mine.yaml").write_text(MINE)
    for texts, count in (
        ([], len(SHAPES)),
        (["data.rename={circle: round, ring: round}"], len(SHAPES) - 1),
        (["data.classes=[star]"], 1),
    ):
        preview = fusedet.preview_ablation(tmp_path / "mine.yaml", *texts, say=lambda text: None)
        assert preview.classes == count


def test_sizes_has_eight_bins_and_thousands_of_images():
    table = ablation.load_table("sizes")
    bins = {row.config(table).test.size_bins for row in table.rows}
    assert bins == {(4, 7, 11, 19, 32, 54, 90, 152, 256)}
    shares = table.synthetic["splits"]
    assert table.synthetic["images"] * shares["val"] / sum(shares.values()) == 2000


MINE = """
base: retinanet_tiny
synthetic: {images: 12, size: [64, 96], splits: {train: 1, val: 1}, seed: 3}
overrides:
  ["data.size=[64,96]", model.pyramid.channels=16, model.head.norm=false, model.backbone.name=test_resnet,
   "test.size_bins=[4,16,32,96]"]
rows:
  - {label: plain}
  - {label: more, overrides: [train.lr=0.5]}
"""


def test_a_table_generates_its_data_once(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text(MINE)
    said, plans = [], []
    monkeypatch.setattr("fusedet.ablation.experiment.run_plan", lambda plan, *_, **__: (plans.append(plan) or {}, {}))
    for _ in range(2):
        fusedet.ablate(tmp_path / "mine.yaml", out=tmp_path / "out", seeds=1, say=said.append, quiet=True)
    assert sum("generating 12 images" in text for text in said) == 1
    assert [len(plan.val) for plan in plans] == [6, 6]
    assert json.loads((tmp_path / "out" / "data" / "demo.json").read_text())["seed"] == 3


def test_other_data_replaces_the_synthetic_data(scenes, tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    preview = fusedet.preview_ablation(tmp_path / "mine.yaml", data=scenes, out=tmp_path / "out", say=lambda text: None)
    assert preview.seconds > 0
    assert not (tmp_path / "out").exists()


def test_a_wrong_argument_of_the_synthetic_data_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE.replace("seed: 3", "sede: 3"))
    with pytest.raises(InputError, match=r"mine.yaml: unknown key 'sede' of synthetic: did you mean 'seed'"):
        ablation.load_table(tmp_path / "mine.yaml")


def test_report_of_bins_and_noise(scenes, tmp_path, monkeypatch):
    plan = make_plan(tmp_path, MINE, scenes, seeds=2)
    finish_runs(plan, lambda run: make_results(plan.val, 0.2 + 0.2 * run.seed + 0.1 * (run.label == "more"), 0.2))
    monkeypatch.setattr(summary, "measure_prediction", lambda *args: {})
    made = summary.summarize_runs(plan, cost.count_costs(plan.configs, plan.classes), resamples=60)
    assert made["size_bins"] == ["AP 4-16 px", "AP 16-32 px", "AP 32-96 px"]
    plain, more = made["rows"]
    for name in made["size_bins"]:
        change = more["difference"][name]
        if change["value"] is not None:
            means = [row["measured"][name]["mean"] for row in (plain, more)]
            assert change["value"] == pytest.approx(means[1] - means[0])
            assert change["over_images"][0] <= change["value"] <= change["over_images"][1]
    assert plain["noise"]["between_seeds"] == pytest.approx(
        abs(plain["measured"]["AP"]["values"][0] - plain["measured"]["AP"]["values"][1]) / 2**0.5
    )
    sheets = {sheet.title: sheet for sheet in render.make_sheets(made)}
    assert [sheet.head[1:] for title, sheet in sheets.items() if "square root" in title] == [
        ["4-16 px", "16-32 px", "32-96 px"]
    ]
    assert any(title.startswith("Noise of AP") for title in sheets)
    (tmp_path / "page").mkdir()
    files = report.write_ablation_report(made, tmp_path / "page")
    assert "AP by size bin" in files["page"].read_text()
    assert "Power: with 2 seeds per row" in files["table"].read_text()
    assert "AP 4-16 px_difference_images_low" in files["spreadsheet"].read_text().splitlines()[0]


@pytest.mark.parametrize("short", ["plain", "more"])
def test_power_is_that_of_the_row_with_the_fewest_seeds(short, scenes, tmp_path, monkeypatch):
    plan = make_plan(tmp_path, MINE, scenes, seeds=3)
    finish_runs(plan, lambda run: make_results(plan.val, 0.2 + 0.2 * run.seed, 0.2))
    shutil.rmtree(plan.runs(short)[2].folder)
    monkeypatch.setattr(summary, "measure_prediction", lambda *args: {})
    made = summary.summarize_runs(plan, cost.count_costs(plan.configs, plan.classes), resamples=60)
    runs = {"plain": 3, "more": 3} | {short: 2}
    assert {row["label"]: row["noise"]["runs"] for row in made["rows"]} == runs
    assert [row["noise"]["seeds"] for row in made["rows"]] == [2, 2]
    shown = {row[0]: (row[1], row[-1]) for row in render.make_noise_sheet(made).rows}
    assert shown == {label: (str(count), "2") for label, count in runs.items()}
