"""Comparison of two runs: what the command prints, writes and refuses."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fusedet import cli, evaluation, visualization
from fusedet.api.compare import conclude_comparison
from fusedet.api.worst_images import make_painter
from fusedet.data.readers.auto import read_dataset
from fusedet.data.synthetic import generate_dataset
from fusedet.evaluation.formatting import format_difference, format_interval
from fusedet.visualization import images
from test_cli import run_json, spoken

pytestmark = pytest.mark.usefixtures("unrendered")


def guesses(data: Path, split: str, *, recall: float, spread: float, seed: int) -> list[dict[str, Any]]:
    """Results from the ground truth: a share of the objects with noisy boxes, and false positives of low score."""
    rng = np.random.default_rng(seed)
    results = []
    for record in read_dataset(data, split):
        for (x1, y1, x2, y2), label in zip(record.boxes, record.labels, strict=True):
            if rng.random() < recall:
                moved = rng.normal(0, spread, 4) * [x2 - x1, y2 - y1, x2 - x1, y2 - y1]
                x, y, w, h = np.array([x1, y1, x2 - x1, y2 - y1]) + moved
                row = {"image_id": record.image_id, "category_id": int(label) + 1, "bbox": [x, y, abs(w), abs(h)]}
                results.append(row | {"score": float(rng.uniform(0.4, 1))})
        row = {"image_id": record.image_id, "category_id": int(rng.integers(1, 7)), "bbox": [5.0, 5.0, 20.0, 20.0]}
        results.append(row | {"score": float(rng.uniform(0, 0.6))})
    return results


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return generate_dataset(
        tmp_path_factory.mktemp("compare") / "data", images=60, size=(96, 128), splits={"val": 0.9, "test": 0.1}
    )


@pytest.fixture(scope="module")
def scored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, as `fusedet val` writes them, and their results; the second one is much better."""
    top = tmp_path_factory.mktemp("scored")
    folders = top / "plain", top / "better"
    for folder, recall, spread in zip(folders, (0.6, 0.95), (0.15, 0.04), strict=True):
        results = guesses(data, "val", recall=recall, spread=spread, seed=1)
        file = top / f"{folder.name}.json"
        file.write_text(json.dumps(results))
        assert cli.run(["val", str(file), f"data={data}", f"out={folder}"]) == 0
        (folder / "config.yaml").write_text(f"data: {{path: {data}, train: val}}\n")
    return top


@pytest.fixture
def runs(scored: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the two run directories, with their results in `tmp_path`."""
    shutil.copytree(scored, tmp_path, dirs_exist_ok=True)
    return tmp_path / "plain", tmp_path / "better"


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.run([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def test_two_runs(capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = runs
    result = run_json(capsys, "compare", a, b, "--resamples", 60)
    assert Path(result["out"]) == b / "compare-plain"
    assert {file.name for file in (b / "compare-plain").iterdir()} == {"compare.json", "classes.png", "images.png"}
    stored = json.loads((b / "compare-plain/compare.json").read_text())
    assert {**result, "out": None, "files": None} == stored | {"out": None, "files": None}
    for side, folder in (("a", a), ("b", b)):
        own = json.loads((folder / "metrics.json").read_text())
        for name, row in result["metrics"].items():
            assert row[side] == pytest.approx(own[name], abs=1e-12)
        assert [row[side] for row in result["classes"]] == pytest.approx(
            [row["AP"] for row in own["classes"]], abs=1e-12
        )
        assert result["errors"][side]["AP50"] == pytest.approx(own["AP50"], abs=1e-12)
        assert result["stamp"]["data"] == own["stamp"]["data"]
    row = result["metrics"]["AP"]
    assert 0 < row["low"] < row["difference"] < row["high"]
    assert result["conclusion"].startswith("B is better than A")
    assert run_json(capsys, "compare", b, a, "--resamples", 60)["conclusion"].startswith("A is better than B")
    again = run_json(capsys, "compare", a, b, "--resamples", 60, f"out={tmp_path / 'o'}")
    assert again["metrics"] == result["metrics"]
    other = run_json(capsys, "compare", a, b, "--resamples", 60, "--bootstrap-seed", 1)["metrics"]["AP"]
    assert other["difference"] == row["difference"]
    assert (other["low"], other["high"]) != (row["low"], row["high"])


def test_printed_comparison(capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path]) -> None:
    said = spoken(capsys, "compare", *runs, "--resamples", 40)
    for part in (
        "B - A",
        "95 % over images",
        "APs",
        "triangle",
        "localization",
        "missed",
        "better than A",
        "another seed",
        "images.png",
    ):
        assert part in said


def test_results_files(capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    by_folder = run_json(capsys, "compare", *runs, "--resamples", 40)["metrics"]
    files = [tmp_path / f"{run.name}.json" for run in runs]
    result = run_json(capsys, "compare", *files, f"data={data}", "--resamples", 40)
    assert result["metrics"] == by_folder
    assert Path(result["out"]) == tmp_path / "compare-plain"
    mixed = run_json(capsys, "compare", runs[0], files[1], "--resamples", 40)
    assert mixed["metrics"] == by_folder, "one run says on which data the other's results are"


def test_the_same_twice(
    capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run directory whose name has a dot, as learning rates have."""
    titles: list[str] = []
    monkeypatch.setattr(visualization, "plot_differences", lambda rows, file, title, mean: titles.append(title))
    run = runs[0].rename(runs[0].with_name("lr0.01"))
    result = run_json(capsys, "compare", run, run, "--resamples", 40)
    assert Path(result["out"]).name == "compare-lr0.01"
    assert titles[0].startswith("lr0.01 less lr0.01: ")
    assert result["conclusion"] == "Nothing can be concluded: A and B are the same, detection by detection."
    assert all(
        row["difference"] == row["low"] == row["high"] == 0
        for row in result["metrics"].values()
        if row["difference"] is not None
    )
    assert not (Path(result["out"]) / "images.png").exists(), "there is no image on which they differ"


def test_another_split(capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], data: Path, tmp_path: Path) -> None:
    said = refused(capsys, "compare", *runs, "--split", "test")
    assert "no stored results on 'test'" in said
    assert f"fusedet val {runs[0]} --split test" in said
    for run in runs:
        file = tmp_path / f"{run.name}-test.json"
        file.write_text(json.dumps(guesses(data, "test", recall=0.9, spread=0.1, seed=3)))
        assert cli.run(["val", str(file), f"data={data}", "--split", "test", f"out={run / 'val-test'}"]) == 0
    result = run_json(capsys, "compare", *runs, "--split", "test", "--resamples", 40)
    assert (result["split"], result["stamp"]["images"]) == ("test", 6)


def test_wrong_input(capsys: pytest.CaptureFixture[str], runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = runs
    files = [tmp_path / f"{run.name}.json" for run in runs]
    assert "do not say on which data they were made: add data=PATH" in refused(capsys, "compare", *files)
    assert "neither a run directory, a name of published weights nor a results file" in refused(
        capsys, "compare", a, tmp_path / "no"
    )
    assert "one too many" in refused(capsys, "compare", a, b, "third")
    assert "changes nothing" in refused(capsys, "compare", a, b, "model.neck=fpn")
    assert "not empty" in refused(capsys, "compare", a, b, f"out={a}")
    other = generate_dataset(tmp_path / "other", images=60, seed=1, size=(96, 128), splits={"val": 0.9, "test": 0.1})
    said = refused(capsys, "compare", a, b, f"data={other}")
    assert "other data" in said
    assert "same images and annotations" in said
    few = generate_dataset(tmp_path / "few", images=10, size=(96, 128), splits={"val": 0.9, "test": 0.1})
    assert "unknown image_id, not in" in refused(capsys, "compare", *files, f"data={few}")
    (b / "metrics.json").write_text("{}")
    assert "has no stamp" in refused(capsys, "compare", a, b)


def test_conclusion() -> None:
    def say(low: float, high: float) -> str:
        return conclude_comparison({"difference": (low + high) / 2, "low": low, "high": high}, 36)

    assert say(-0.01, 0.03) == (
        "Nothing can be concluded about which is better: the difference of AP is +0.010, "
        "but its 95 % interval over the 36 images -0.010 to +0.030 holds 0."
    )
    assert say(0.01, 0.03).startswith(
        "B is better than A on images such as these: AP 0.020 higher, 95 % interval over the 36 images +0.010"
    )
    assert say(-0.03, -0.01).startswith("A is better than B on images such as these: AP 0.020 higher")
    assert say(0, 0).startswith("Nothing")
    assert say(np.nan, np.nan) == "Nothing can be concluded: the data hold no object that counts."


def test_only_0_is_printed_as_0() -> None:
    assert [format_difference(value) for value in (0.0, -0.0004, 0.5, math.nan)] == ["+0.000", "-0.0004", "+0.500", "-"]
    assert format_interval((-0.0004, 1)) == "-0.0004 to 1.0000"
    assert format_interval((0, 1), 2, signed=True) == "+0.00 to +1.00"
    assert format_interval((math.nan, 1)) == format_interval((None, 1)) == format_interval(None) == ""


def test_images_that_differ_most(data: Path) -> None:
    dataset = read_dataset(data, "val")
    objects = np.diff(dataset.offsets.numpy())
    busy, quiet = int(objects.argmax()), int(np.flatnonzero(objects == 1)[0])
    truth = [
        {"image_id": r.image_id, "category_id": int(k) + 1, "bbox": [*box[:2], *(box[2:] - box[:2])], "score": 0.9}
        for r in dataset
        for box, k in zip(r.boxes, r.labels, strict=True)
    ]
    without = [r for r in truth if r["image_id"] != dataset[quiet].image_id]
    first = next(i for i, r in enumerate(without) if r["image_id"] == dataset[busy].image_id)
    del without[first]
    result = evaluation.find_differing_images(dataset, truth, without)
    n = int(objects[busy])
    assert [row[0] for row in result] == [quiet, busy]
    assert result[0][1:] == ((1, 0, 0), (0, 1, 0))
    assert result[1][1:] == ((1, 0, 0), (pytest.approx(2 * (n - 1) / (2 * n - 1)), 1, 0))
    assert evaluation.find_differing_images(dataset, truth, truth) == []


def test_drawn_counts_are_those_of_the_captions(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below an image and in its caption, with confused classes and ignored objects."""
    whole = read_dataset(data, "val")
    ignore = torch.arange(len(whole.labels)) % 5 == 0
    dataset = replace(whole, ignore=ignore)
    results = guesses(data, "val", recall=0.8, spread=0.1, seed=2)
    for result in results[::4]:
        result["category_id"] = result["category_id"] % 6 + 1
    strips: list[str] = []
    monkeypatch.setattr(
        images, "_legend", lambda image, items, pen: strips.append(" ".join(text for text, *_ in items)) or image
    )
    paint, rows = make_painter(dataset, results), evaluation.find_worst_images(dataset, results, n=99)
    assert len(rows) > 40
    confused = 0
    for i, quality, misses, false in rows:
        paint(i)
        correct, *counts, wrong = map(int, re.findall(r"\d+", strips[-1]))
        assert counts == [misses, false]
        assert quality == pytest.approx(2 * correct / (2 * correct + misses + false))
        confused += wrong
    pairs = evaluation.compute_confusion_matrix(dataset, results)[:-1, :-1]
    assert confused == pairs.sum() - np.trace(pairs) > 0


@pytest.fixture
def heights(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The heights of the saved figures in inches. None is rendered."""
    heights: list[float] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **options: heights.append(figure.get_figheight()))
    return heights


def plot_differences(folder: Path, count: int) -> None:
    """Plot so many classes, the same with a class without objects, and the same with their mean."""
    mean = {"name": "all", "difference": 0.01, "low": -0.01, "high": 0.03}
    rows = [mean | {"name": f"class {k}"} for k in range(count)]
    absent = {"name": "absent", "difference": math.nan, "low": math.nan, "high": math.nan}
    for name, given, above in (("a", rows, None), ("b", [*rows, absent], None), ("c", rows, mean)):
        visualization.plot_differences(given, folder / f"{name}.png", "B less A", above)


@pytest.mark.parametrize("count", [0, 1, 6])
def test_plot_of_differences(tmp_path: Path, heights: list[float], count: int) -> None:
    plot_differences(tmp_path, count)
    assert heights[0] == heights[1], "a class without objects has no row"
    assert (heights[2] > heights[0]) == (count > 0)


@pytest.mark.usefixtures("rendered")
def test_images_of_plots_are_as_high_as_their_figures(tmp_path: Path) -> None:
    plot_differences(tmp_path, 1)
    pixels = [Image.open(tmp_path / f"{name}.png").height for name in "abc"]
    assert pixels[0] == pixels[1] < pixels[2]


def test_plot_of_many_differences_is_no_larger(tmp_path: Path, heights: list[float]) -> None:
    values = np.random.default_rng(0).normal(0, 0.05, 100)
    rows = [{"name": f"class {k}", "difference": v, "low": v - 0.05, "high": v + 0.04} for k, v in enumerate(values)]
    for name, given in (("all", rows), ("some", rows[:40])):
        visualization.plot_differences(given, tmp_path / f"{name}.png")
    assert heights[0] == heights[1]
