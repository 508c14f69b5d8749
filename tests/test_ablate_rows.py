"""Tables about other metrics than AP, several references, rows that differ in their test section, resumed folders."""

import csv
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusedet import ablation, cli, evaluation
from fusedet.ablation import cost, estimate, launcher, power, render, report, summary, summary_text, worker
from fusedet.ablation.plan import Plan, Run
from fusedet.api import detector_evaluation
from fusedet.api.run_dir import write_json
from fusedet.config import Config, Train
from fusedet.data.class_balance import compute_repeat_factors, count_entries
from fusedet.data.dataset import DetectionDataset
from fusedet.data.synthetic import generate_dataset
from fusedet.data.tiling import tile_dataset
from fusedet.errors import DivergenceError, InputError
from fusedet.evaluation.mask_iou import encode_rle
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")


def make_plan(folder: Path, text: str, data: Path, *more: str, seeds: int = 2) -> Plan:
    file = folder / "mine.yaml"
    file.write_text(text)
    return ablation.make_plan(
        ablation.load_table(file),
        [f"data={data}", "device=cpu", *more],
        seeds=seeds,
        out=folder / "out",
        say=lambda text: None,
    )


def make_results(dataset: DetectionDataset, dropped: float, shifted: float) -> list[dict[str, Any]]:
    """The ground truth as detections, without a fraction of them; a fraction has shifted boxes, masks are exact."""
    results = []
    for i, record in enumerate(dataset):
        for k, (box, label) in enumerate(zip(record.boxes.tolist(), record.labels.tolist())):
            if (7 * i + 3 * k) % 10 < 10 * dropped:
                continue
            x, y, right, bottom = box
            x += 0.4 * (right - x) if (3 * i + k) % 10 < 10 * shifted else 0
            mask = encode_rle(record.segmentations[k], record.height, record.width)
            text = mask["counts"].decode() if isinstance(mask["counts"], bytes) else mask["counts"]
            results.append(
                {
                    "image_id": record.image_id,
                    "category_id": dataset.category_ids[label],
                    "bbox": [x, y, right - x, bottom - y],
                }
                | {"score": 0.9 - 0.01 * k, "segmentation": {"size": [record.height, record.width], "counts": text}}
            )
    return results


def finish_runs(plan: Plan, detect: Callable[[Run], list[dict[str, Any]]], masks: bool = False) -> None:
    """Write every run of the plan as if it had been trained and had these detections."""
    for row in plan.selected_runs():
        for run in row:
            run.folder.mkdir(parents=True)
            results = detect(run)
            metrics = detector_evaluation.evaluate_results(plan.val, results, run.config.test, masks=masks).metrics
            (run.folder / "config.yaml").write_text(run.config.to_yaml())
            (run.folder / "val.bbox.json").write_text(
                json.dumps([{k: v for k, v in r.items() if k != "segmentation"} for r in results])
            )
            (run.folder / "val.segm.json").write_text(
                json.dumps([{k: v for k, v in r.items() if k != "bbox"} for r in results])
            )
            (run.folder / "metrics.csv").write_text("epoch,step,AP,mask_AP\n1,2,0.1,0.2\n2,4,0.3,0.4\n")
            write_json(run.folder / "metrics.json", metrics)


def summarize(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(summary, "measure_prediction", lambda *args: {})
    return summary.summarize_runs(plan, cost.count_costs(plan.configs, plan.classes), resamples=60)


# -- the metric of a table

MASKS = """
base: mask_rcnn_r50
metric: mask_AP
overrides: ["data.size=[64,96]", model.pyramid.channels=16, "model.backbone={name: test_resnet, pretrained: false}"]
rows:
  - {label: boxes, published: {mask_AP: 34.5}}
  - {label: more recall, overrides: [train.lr=0.5], published: {mask_AP: 36.3}}
  - {label: better boxes, overrides: [train.lr=0.25]}
"""


@pytest.mark.slow
def test_table_about_masks(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(tmp_path, MASKS, scenes)
    share = {"boxes": (0.4, 0.5), "more recall": (0.1, 0.5), "better boxes": (0.4, 0.0)}
    finish_runs(plan, lambda run: make_results(plan.val, *share[run.label]), masks=True)
    report_data = summarize(plan, monkeypatch)
    _, more, boxes = report_data["rows"]
    for row in (more, boxes):  # the difference is that of the masks, and lies in its interval over images
        change = row["difference"]["mask_AP"]
        assert change["value"] == pytest.approx(
            row["measured"]["mask_AP"]["mean"] - report_data["rows"][0]["measured"]["mask_AP"]["mean"]
        )
        assert change["over_images"][0] <= change["value"] <= change["over_images"][1]
    assert more["conclusion"].startswith("mask_AP ")
    assert boxes["difference"]["mask_AP"] == {"value": 0.0, "over_images": [0.0, 0.0], "over_seeds": [0.0, 0.0]}
    assert boxes["measured"]["AP"]["mean"] > report_data["rows"][0]["measured"]["AP"]["mean"]
    sheet = render.make_difference_sheet(report_data)
    assert sheet.head[1:3] == ["mask_AP published", "mask_AP measured"]
    assert sheet.rows[1][sheet.head.index("published difference")] == "+1.8"
    files = report.write_ablation_report(report_data, tmp_path / "out")
    line = list(csv.DictReader(files["spreadsheet"].read_text().splitlines()))[1]
    assert float(line["published_mask_AP_difference"]) == pytest.approx(1.8)
    assert float(line["mask_AP_difference"]) == more["difference"]["mask_AP"]["value"]
    assert "mask_AP against cost" in files["page"].read_text()


def test_table_about_masks_needs_a_mask_detector(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"mine.yaml, row 'a': the table's metric is mask_AP, but this row's detector predicts no masks",
    ):
        make_plan(tmp_path, "base: retinanet_tiny\nmetric: mask_AP\nrows: [{label: a}]\n", scenes, *SMALL)
    with pytest.raises(InputError, match=r"mine.yaml: unknown metric 'mask': did you mean 'mask_AP'"):
        make_plan(tmp_path, "base: retinanet_tiny\nmetric: mask\nrows: [{label: a}]\n", scenes)


FOUR = """
base: retinanet_tiny
metric: VOC_AP
note: a remark | two
rows:
  - {label: A, published: {VOC_AP: 65.3}}
  - {label: A+, reference: A, overrides: [train.lr=0.5], published: {VOC_AP: 66.4}}
  - {label: B, reference: B, overrides: [train.lr=0.25], published: {VOC_AP: 71.0}}
  - {label: B+, reference: B, overrides: [train.lr=0.125], published: {delta_VOC_AP: 1.27}, note: no target}
"""


def test_voc_metrics_and_several_references(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_plots", lambda *args: {})
    plan = make_plan(tmp_path, FOUR, scenes, *SMALL)
    share = {"A": 0.5, "A+": 0.3, "B": 0.2, "B+": 0.0}
    finish_runs(plan, lambda run: make_results(plan.val, share[run.label], 0.0))
    shutil.rmtree(plan.runs("B+")[1].folder)
    report_data = summarize(plan, monkeypatch)
    rows = {row["label"]: row for row in report_data["rows"]}
    assert [row["reference"] for row in report_data["rows"]] == ["A", "A", "B", "B"]
    for label, base in (("A+", "A"), ("B+", "B")):
        means = [rows[name]["measured"]["VOC_AP"]["mean"] for name in (base, label)]
        assert rows[label]["difference"]["VOC_AP"]["value"] == pytest.approx(means[1] - means[0])
        assert rows[label]["difference"]["VOC_AP"]["over_images"] is None
        assert rows[label]["difference"]["AP"]["over_images"] is not None
        assert "There is no interval over images" in rows[label]["conclusion"]
    assert rows["A"]["difference"] is rows["B"]["difference"] is None
    assert rows["B"]["conclusion"] == "The baseline of the other rows."
    sheet = render.make_difference_sheet(report_data)
    assert sheet.title == "VOC_AP in percent, means over the seeds that finished"
    columns = [sheet.head.index(name) for name in ("seeds", "compared with", "published difference")]
    assert [[row[i] for i in columns] for row in sheet.rows] == [
        ["2/2", "", "-"],
        ["2/2", "A", "+1.1"],
        ["2/2", "", "-"],
        ["1/2", "B", "+1.27"],
    ]
    assert any(line.startswith("Over images: none.") for line in summary_text.describe_coverage(report_data))
    files = report.write_ablation_report(report_data, tmp_path / "out")
    for name in ("table", "page"):
        text = files[name].read_text()
        for part in ("+1.27", "no target", "Finished seeds, of 2: B+ 1", "Over images: none", "a remark"):
            assert part in text, (name, part)
        assert str(tmp_path) not in text  # no machine-specific paths


def test_references_run_before_the_rows_compared_with_them(scenes: Path, tmp_path: Path) -> None:
    text = FOUR.replace("B+, reference: B", "B+, reference: C") + "  - {label: C, overrides: [train.lr=0.75]}\n"
    plan = make_plan(tmp_path, text, scenes, *SMALL)
    assert [row[0].label for row in plan.selected_runs()] == ["A", "A+", "B", "C", "B+"]


CITED = """
base: retinanet_tiny
rows:
  - {label: plain, published: {AP: 35.5}}
  - {label: more, overrides: [train.lr=0.5], published: {AP: 36.4}}
  - {label: quoted, cited: true, base: retinanet_tiny, overrides: [train.lr=0.25], published: {AP: 43.6}}
  - {label: shown, cited: true, published: {AP: 41.0}}
"""


def test_cited_rows_with_a_base_are_reported(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their own metrics and noise stand beside the cited metrics; they are no baseline of other rows."""
    plan = make_plan(tmp_path, CITED, scenes, *SMALL)
    finish_runs(plan, lambda run: make_results(plan.val, 0.2 + 0.1 * run.seed, 0.2))
    monkeypatch.setattr(power, "describe_power", lambda noise, seeds: {"runs": noise.runs})  # takes a second
    report_data = summarize(plan, monkeypatch)
    plain, more, quoted, shown = report_data["rows"]
    assert [row["cited"] for row in report_data["rows"]] == [False, False, False, True]
    assert (quoted["published"], quoted["measured"]["AP"]["mean"]) == ({"AP": 43.6}, plain["measured"]["AP"]["mean"])
    assert (len(quoted["runs"]), quoted["noise"]["runs"], quoted["difference"]) == (2, 2, None)
    assert quoted["conclusion"] == "Compared with no other row."
    assert plain["conclusion"] == "The baseline of the other rows."
    assert more["difference"]["AP"]["value"] == 0
    assert "measured" not in shown
    sheet = render.make_difference_sheet(report_data)
    assert "AP - 'plain'" in sheet.head
    assert [cells[1:3] for cells in sheet.rows[2:]] == [["43.6", sheet.rows[0][2]], ["41.0", "cited"]]


def test_unknown_reference_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: retinanet_tiny\nrows: [{label: aa}, {label: b, reference: a}]\n")
    with pytest.raises(InputError, match=r"mine.yaml: unknown reference 'a' of row 'b': did you mean 'aa'"):
        ablation.load_table(tmp_path / "mine.yaml")


@pytest.mark.slow
def test_metric_without_a_value_is_left_out(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A metric that is NaN in every run has no point in the plot."""
    plan = make_plan(tmp_path, FOUR.replace("metric: VOC_AP\n", ""), scenes, *SMALL)
    finish_runs(plan, lambda run: make_results(plan.val, 0.2, 0.0))
    for file in plan.out.rglob("metrics.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"AP": None}))
    report_data = summarize(plan, monkeypatch)
    assert "AP" not in report_data["rows"][0]["measured"]
    assert render.make_difference_sheet(report_data).rows[0][2] == "not measured"
    assert "AP against cost" not in report.write_ablation_report(report_data, tmp_path / "out")["page"].read_text()


# -- rows that differ in their test section only

TESTS = """
base: retinanet_tiny
rows:
  - {label: plain}
  - {label: with TTA, overrides: [test.flip=true, "test.scales=[64,80]"]}
"""


@pytest.mark.slow
def test_row_with_another_test_section_is_not_trained(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(tmp_path, TESTS, scenes, *SMALL, seeds=1)
    real, trained = worker.train, []
    monkeypatch.setattr(
        worker, "train", lambda config, **options: (trained.append(config.out), real(config, **options))
    )
    report_data, _ = ablation.run_plan(plan, ablation.LaunchOptions(resamples=40), say=lambda text: None, quiet=True)
    source = plan.out / "plain" / "seed0"
    assert trained == [str(source)]
    augmented = report_data["rows"][1]
    assert (augmented["weights_of"], augmented["runs"][0]["state"]) == ("plain", "finished")
    assert (
        augmented["cost"]["prediction"]["p50_ms"] > report_data["rows"][0]["cost"]["prediction"]["p50_ms"]
    )  # four copies, not one
    assert "with TTA: the weights of 'plain', scored with this row's test section" in summary_text.collect_notes(
        report_data
    )
    # The metrics are those of `fusedet val` with the same options.
    arguments = ["val", str(source), "test.flip=true", "test.scales=[64,80]", f"out={tmp_path / 'again'}"]
    assert cli.run(arguments) == 0
    own, again = (
        json.loads((out / "val.bbox.json").read_text()) for out in (source / "test-with_tta", tmp_path / "again")
    )
    assert own == again
    assert own != json.loads((source / "val.bbox.json").read_text())
    # Resumed without a training.
    before = (source / "test-with_tta" / "metrics.json").read_text()
    (source / "test-with_tta" / "metrics.json").unlink()
    monkeypatch.setattr(summary, "measure_prediction", lambda *args: {})
    ablation.run_plan(plan, ablation.LaunchOptions(resamples=40), say=lambda text: None, quiet=True)
    assert len(trained) == 1
    assert (source / "test-with_tta" / "metrics.json").read_text() == before


def test_rows_with_the_same_weights_are_compared_by_seed(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise between seeds cancels; a seed that one of the rows lacks is left out."""
    plan = make_plan(tmp_path, TESTS, scenes, *SMALL, seeds=3)
    finish_runs(plan, lambda run: make_results(plan.val, 0.3 * run.seed + 0.1 * (run.label == "plain"), 0.0))
    (plan.runs("with TTA")[2].folder / "metrics.json").unlink()
    monkeypatch.setattr(power, "describe_power", lambda noise, seeds: {})  # takes a second
    plain, augmented = summarize(plan, monkeypatch)["rows"]
    values = [row["measured"]["AP"]["values"] for row in (plain, augmented)]
    expected = evaluation.compute_seed_difference(values[0][: len(values[1])], values[1], paired=True)
    change = augmented["difference"]["AP"]
    assert change["value"] == pytest.approx(expected.value)
    assert change["over_seeds"] == pytest.approx([expected.low, expected.high])
    assert change["over_images"][0] <= change["value"] <= change["over_images"][1]


def test_scoring_waits_for_the_weights(tmp_path: Path) -> None:
    source = tmp_path / "a" / "seed0"
    train = Run("a", Config(train=Train(seed=0), out=str(source)))
    score = Run("b", Config(train=Train(seed=0), out=str(source / "test-b")), source)
    queue = launcher.Queue([[train], [score]], estimate.Clock({"a": 1.0, "b": 1.0}, {}), parallel=2)
    assert queue.take_next() == train
    assert queue.take_next() is None
    source.mkdir(parents=True)
    (source / "metrics.json").write_text("{}")
    assert queue.take_next() == score
    failed = launcher.Queue([[score]], estimate.Clock({"b": 1.0}, {}))
    (source / "metrics.json").unlink()
    (source / "failed.json").write_text("{}")
    assert failed.take_next() is None
    assert failed.left == []  # its training has failed, which is not for lack of budget


# -- small data, and resumed folders


def test_dry_run_on_a_few_images(tmp_path: Path) -> None:
    data = generate_dataset(tmp_path / "few", images=4, seed=0, size=(64, 96), splits={"train": 0.5, "val": 0.5})
    plan = make_plan(tmp_path, TESTS, data, *SMALL, "train.epochs=5", seeds=1)
    rows, basis = ablation.preview_plan(plan, say=lambda text: None)
    assert basis.startswith("one training step of 'plain'")
    assert all(row["seconds"] > 0 for row in rows[:2])


def test_dry_run_of_a_row_with_the_weights_of_another_row(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs need the trainings of the other row, which count even if that row is not selected."""
    plan = replace(make_plan(tmp_path, TESTS, scenes, *SMALL, seeds=3), selected=("with TTA",))
    monkeypatch.setattr(
        estimate, "time_training_step", lambda plan, label, multiply_adds, clock: setattr(clock, "rate", 1.0)
    )
    rows, _ = ablation.preview_plan(plan, say=lambda text: None)
    assert [row["left"] for row in rows] == [3, 3]
    assert min(row["seconds"] for row in rows) > 0
    rows, _ = ablation.preview_plan(replace(plan, data={}), say=lambda text: None)
    assert [row["left"] for row in rows] == [3, 3]


SAMPLING = """
base: retinanet_tiny
rows:
  - {label: plain}
  - {label: tiles, overrides: ["data.tiles={size: 64, overlap: 0.2}"]}
  - {label: balance, overrides: [train.balance=1]}
"""


def test_estimates_count_the_images_of_an_epoch(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on tiles or repeated images takes the time of all of them, and the timed step is one of tiles."""
    plan = make_plan(tmp_path, SAMPLING, scenes, *SMALL, "train.epochs=5")
    train = plan.data["plain"][0]
    factors = compute_repeat_factors(train, 1)
    epochs = {"plain": len(train), "tiles": len(tile_dataset(train, 64, 0.2, 0.0)), "balance": count_entries(factors)}
    assert len(train) < min(epochs["tiles"], epochs["balance"])
    plain = estimate.count_work(plan, "plain", 1.0)
    for label, images in epochs.items():
        assert estimate.count_work(plan, label, 1.0) - plain == 3 * 5 * (images - len(train))
    timed = []
    real = estimate.build_train_loader
    monkeypatch.setattr(
        estimate,
        "build_train_loader",
        lambda images, *args, **options: timed.append(images) or real(images, *args, **options),
    )
    clock = estimate.Clock({}, {})
    estimate.time_training_step(plan, "tiles", 1.0, clock)
    assert len(timed[0]) == epochs["tiles"]
    monkeypatch.setattr(estimate, "_measure_seconds", lambda *args: (3.0, 1.0))
    for label in epochs:  # a step takes three times a prediction, as `count_work` assumes
        estimate.time_training_step(plan, label, 1.0, clock)
        assert clock.rate == pytest.approx(1)


def test_output_directory_is_recognized_by_what_the_table_runs(scenes: Path, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, TESTS, scenes, *SMALL)
    launcher.write_marker(plan, ["fusedet", "ablate", str(tmp_path / "mine.yaml"), f"data={scenes}"])
    marker = tmp_path / "out" / "ablation.json"
    assert str(tmp_path) not in marker.read_text()

    def resume(name: str, text: str) -> None:
        file = tmp_path / "elsewhere" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        launcher.check_out_dir(replace(plan, table=ablation.load_table(file)))

    resume("mine", TESTS)
    resume("renamed", TESTS + "note: another remark\n")
    resume("mine", TESTS + "  - {label: third, overrides: [train.lr=0.5]}\n")
    with pytest.raises(InputError, match="has another table of that name"):
        resume("mine", "base: retinanet_tiny\nrows: [{label: x}]\n")
    with pytest.raises(InputError, match="has the ablation of mine, not of "):
        resume("renamed", TESTS + "  - {label: third, overrides: [train.lr=0.5]}\n")
    for old in ("mine", str(tmp_path / "mine.yaml")):  # as older versions wrote it
        marker.write_text(json.dumps({"table": old, "commands": []}))
        resume("mine", TESTS + "  - {label: third, overrides: [train.lr=0.5]}\n")


def test_only_finished_runs_are_counted_by_the_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was stopped or has diverged took less time than a whole one."""

    def train(config: Config, **options: Any) -> None:
        folder = Path(str(config.out))
        folder.mkdir()
        (folder / "config.yaml").write_text("{}")
        now[0] += 5
        if error := errors.get(folder.name):
            raise error
        (folder / "metrics.json").write_text("{}")

    now, clock = [0.0], estimate.Clock({"a": 1.0}, {})
    errors = {"stopped": KeyboardInterrupt(), "diverged": DivergenceError("loss is nan at step 3")}
    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: now[0])
    for name, expected in (("stopped", None), ("diverged", None), ("whole", 5)):
        run = Run("a", Config(out=str(tmp_path / name)))
        with suppress(KeyboardInterrupt):
            worker.execute_run(run)
        assert json.loads((run.folder / "time.json").read_text())["seconds"] == 5
        clock.add(run)
        assert clock.expected("a") == expected


def test_time_of_all_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run("a", Config(out=str(tmp_path / "a")))

    def train(config: Config, **options: Any) -> None:
        run.folder.mkdir(exist_ok=True)
        (run.folder / "config.yaml").write_text("{}")
        (run.folder / "last.ckpt").write_text("")
        clock[0] += 5
        if stop:
            raise KeyboardInterrupt

    clock, stop = [0.0], True
    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock[0])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            worker.execute_run(run)
    stop = False
    worker.execute_run(run)
    assert json.loads((run.folder / "time.json").read_text()) == {
        "seconds": 15,
        "resumed": True,
        "sessions": [5, 5, 5],
    }
    (run.folder / "time.json").unlink()  # as after a first session that was killed
    worker.execute_run(run)
    assert json.loads((run.folder / "time.json").read_text()) == {
        "seconds": None,
        "resumed": True,
        "sessions": [None, 5],
    }
