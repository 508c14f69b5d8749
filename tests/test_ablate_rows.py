"""Tables about another figure than AP, with several references, rows that only test otherwise, and folders taken up again."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import SMALL
from fusedet import ablation, cli
from fusedet.ablation import cost, estimate, launcher, render, report, summary, summary_text, worker
from fusedet.ablation.plan import Plan, Run
from fusedet.api import validate
from fusedet.api.run_dir import write_json
from fusedet.config import Config, Train
from fusedet.data.dataset import DetectionDataset
from fusedet.data.synthetic import generate_dataset
from fusedet.errors import InputError
from fusedet.evaluation.mask_iou import encode_rle


def plan_of(folder: Path, text: str, data: Path, *more: str, seeds: int = 2) -> Plan:
    file = folder / "mine.yaml"
    file.write_text(text)
    return ablation.make_plan(
        ablation.load_table(file),
        [f"data={data}", "device=cpu", *more],
        seeds=seeds,
        out=folder / "out",
        say=lambda text: None,
    )


def truth(dataset: DetectionDataset, drop: float, late: float) -> list[dict[str, Any]]:
    """The objects as finds, without a share of them; boxes of a share are beside the object, masks always on it."""
    found = []
    for i, record in enumerate(dataset):
        for k, (box, label) in enumerate(zip(record.boxes.tolist(), record.labels.tolist())):
            if (7 * i + 3 * k) % 10 < 10 * drop:
                continue
            x, y, right, bottom = box
            x += 0.4 * (right - x) if (3 * i + k) % 10 < 10 * late else 0
            mask = encode_rle(record.segmentations[k], record.height, record.width)
            text = mask["counts"].decode() if isinstance(mask["counts"], bytes) else mask["counts"]
            found.append(
                {
                    "image_id": record.image_id,
                    "category_id": dataset.category_ids[label],
                    "bbox": [x, y, right - x, bottom - y],
                }
                | {"score": 0.9 - 0.01 * k, "segmentation": {"size": [record.height, record.width], "counts": text}}
            )
    return found


def finish(plan: Plan, find: Callable[[Run], list[dict[str, Any]]], masks: bool = False) -> None:
    """Every run of the plan as if it had been trained and had found that."""
    for row in plan.to_run():
        for cell in row:
            cell.folder.mkdir(parents=True)
            results = find(cell)
            figures = validate.score(plan.val, results, voc=False, evaluator="fusedet", masks=masks)
            (cell.folder / "config.yaml").write_text(cell.config.to_yaml())
            (cell.folder / "val.bbox.json").write_text(
                json.dumps([{k: v for k, v in r.items() if k != "segmentation"} for r in results])
            )
            (cell.folder / "val.segm.json").write_text(
                json.dumps([{k: v for k, v in r.items() if k != "bbox"} for r in results])
            )
            (cell.folder / "metrics.csv").write_text("epoch,step,AP,mask_AP\n1,2,0.1,0.2\n2,4,0.3,0.4\n")
            write_json(cell.folder / "metrics.json", figures)


def summed(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(summary, "measure_prediction", lambda *rest: {})
    return summary.summarize(plan, cost.count_costs(plan.configs, plan.classes), resamples=60)


# -- what a table is about

MASKS = """
base: mask_rcnn_r50
figure: mask_AP
overrides: ["data.size=[64,96]", model.pyramid.channels=16, "model.backbone={name: resnet18.tv_in1k, pretrained: false}"]
rows:
  - {label: boxes, published: {mask_AP: 34.5}}
  - {label: finds more, overrides: [train.lr=0.5], published: {mask_AP: 36.3}}
  - {label: better boxes, overrides: [train.lr=0.25]}
"""


def test_a_table_about_masks(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, MASKS, scenes)
    share = {"boxes": (0.4, 0.5), "finds more": (0.1, 0.5), "better boxes": (0.4, 0.0)}
    finish(plan, lambda cell: truth(plan.val, *share[cell.label]), masks=True)
    found = summed(plan, monkeypatch)
    _, more, boxes = found["rows"]
    for row in (more, boxes):  # the difference is that of the masks, and the data itself lies in its interval
        change = row["difference"]["mask_AP"]
        assert change["value"] == pytest.approx(
            row["measured"]["mask_AP"]["mean"] - found["rows"][0]["measured"]["mask_AP"]["mean"]
        )
        assert change["over_images"][0] <= change["value"] <= change["over_images"][1]
    assert more["conclusion"].startswith("mask_AP ")
    assert boxes["difference"]["mask_AP"] == {"value": 0.0, "over_images": [0.0, 0.0], "over_seeds": [0.0, 0.0]}
    assert boxes["measured"]["AP"]["mean"] > found["rows"][0]["measured"]["AP"]["mean"]
    sheet = render.make_difference_sheet(found)
    assert sheet.head[1:3] == ["mask_AP published", "mask_AP measured"]
    assert sheet.rows[1][sheet.head.index("published difference")] == "+1.8"
    files = report.write_report(found, tmp_path / "out")
    line = list(csv.DictReader(files["spreadsheet"].read_text().splitlines()))[1]
    assert float(line["published_mask_AP_difference"]) == pytest.approx(1.8)
    assert float(line["mask_AP_difference"]) == more["difference"]["mask_AP"]["value"]
    assert "mask_AP against cost" in files["page"].read_text()


def test_a_table_about_masks_needs_a_detector_of_masks(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"mine.yaml, row 'a': the table is about mask_AP, but this row's detector finds no masks"
    ):
        plan_of(tmp_path, "base: retinanet_tiny\nfigure: mask_AP\nrows: [{label: a}]\n", scenes, *SMALL)
    with pytest.raises(InputError, match=r"unknown figure in .*mine.yaml: figure 'mask': did you mean 'mask_AP'"):
        plan_of(tmp_path, "base: retinanet_tiny\nfigure: mask\nrows: [{label: a}]\n", scenes)


FOUR = """
base: retinanet_tiny
figure: VOC_AP
note: a word | two
rows:
  - {label: A, published: {VOC_AP: 65.3}}
  - {label: A+, reference: A, overrides: [train.lr=0.5], published: {VOC_AP: 66.4}}
  - {label: B, reference: B, overrides: [train.lr=0.25], published: {VOC_AP: 71.0}}
  - {label: B+, reference: B, overrides: [train.lr=0.125], published: {delta_VOC_AP: 1.27}, note: no target}
"""


def test_figures_of_voc_and_several_references(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(tmp_path, FOUR, scenes, *SMALL)
    share = {"A": 0.5, "A+": 0.3, "B": 0.2, "B+": 0.0}
    finish(plan, lambda cell: truth(plan.val, share[cell.label], 0.0))
    shutil.rmtree(plan.runs("B+")[1].folder)
    found = summed(plan, monkeypatch)
    rows = {row["label"]: row for row in found["rows"]}
    assert [row["reference"] for row in found["rows"]] == ["A", "A", "B", "B"]
    for label, base in (("A+", "A"), ("B+", "B")):
        means = [rows[one]["measured"]["VOC_AP"]["mean"] for one in (base, label)]
        assert rows[label]["difference"]["VOC_AP"]["value"] == pytest.approx(means[1] - means[0])
        assert rows[label]["difference"]["VOC_AP"]["over_images"] is None
        assert rows[label]["difference"]["AP"]["over_images"] is not None
        assert "Over images there is no interval of it" in rows[label]["conclusion"]
    assert rows["A"]["difference"] is rows["B"]["difference"] is None
    assert rows["B"]["conclusion"] == "The baseline: what other rows are compared with."
    sheet = render.make_difference_sheet(found)
    assert sheet.title == "VOC_AP in percent, means over the seeds that finished"
    columns = [sheet.head.index(name) for name in ("seeds", "compared with", "published difference")]
    assert [[row[i] for i in columns] for row in sheet.rows] == [
        ["2/2", "", "-"],
        ["2/2", "A", "+1.1"],
        ["2/2", "", "-"],
        ["1/2", "B", "+1.27"],
    ]
    assert any(line.startswith("Over images: none.") for line in summary_text.describe_coverage(found))
    files = report.write_report(found, tmp_path / "out")
    for name in ("table", "page"):
        text = files[name].read_text()
        for part in ("+1.27", "no target", "Finished seeds, of 2: B+ 1", "Over images: none", "a word"):
            assert part in text, (name, part)
        assert str(tmp_path) not in text  # nothing of the machine's folders


def test_references_run_before_what_is_compared_with_them(scenes: Path, tmp_path: Path) -> None:
    text = FOUR.replace("B+, reference: B", "B+, reference: C") + "  - {label: C, overrides: [train.lr=0.75]}\n"
    plan = plan_of(tmp_path, text, scenes, *SMALL)
    assert [row[0].label for row in plan.to_run()] == ["A", "A+", "B", "C", "B+"]


def test_an_unknown_reference_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: retinanet_tiny\nrows: [{label: aa}, {label: b, reference: a}]\n")
    with pytest.raises(InputError, match=r"unknown row in .*mine.yaml, row 'b': reference 'a': did you mean 'aa'"):
        ablation.load_table(tmp_path / "mine.yaml")


def test_what_was_scored_without_an_object_is_drawn_without_it(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure that is NaN in every run: no point, no crash."""
    plan = plan_of(tmp_path, FOUR.replace("figure: VOC_AP\n", ""), scenes, *SMALL)
    finish(plan, lambda cell: truth(plan.val, 0.2, 0.0))
    for file in plan.out.rglob("metrics.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"AP": None}))
    found = summed(plan, monkeypatch)
    assert "AP" not in found["rows"][0]["measured"]
    assert render.make_difference_sheet(found).rows[0][2] == "not measured"
    assert "AP against cost" not in report.write_report(found, tmp_path / "out")["page"].read_text()


# -- rows that differ in their test section alone

TESTS = """
base: retinanet_tiny
rows:
  - {label: plain}
  - {label: both ways, overrides: [test.flip=true, "test.scales=[64,80]"]}
"""


def test_a_row_that_only_tests_otherwise_is_not_trained(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, TESTS, scenes, *SMALL, seeds=1)
    real, trained = worker.train, []
    monkeypatch.setattr(worker, "train", lambda config, **rest: (trained.append(config.out), real(config, **rest)))
    found, _ = ablation.run_plan(plan, ablation.LaunchOptions(resamples=40), say=lambda text: None, quiet=True)
    source = plan.out / "plain" / "seed0"
    assert trained == [str(source)]
    both = found["rows"][1]
    assert (both["weights_of"], both["runs"][0]["state"]) == ("plain", "finished")
    assert (
        both["cost"]["prediction"]["p50_ms"] > found["rows"][0]["cost"]["prediction"]["p50_ms"]
    )  # four views, not one
    assert "both ways: the weights of 'plain', scored as this row's test section says" in summary_text.collect_notes(
        found
    )
    # the figures are those of val with the same options
    words = ["val", str(source), "test.flip=true", "test.scales=[64,80]", f"out={tmp_path / 'again'}"]
    assert cli.run(words) == 0
    own, again = (
        json.loads((out / "val.bbox.json").read_text()) for out in (source / "test-both_ways", tmp_path / "again")
    )
    assert own == again
    assert own != json.loads((source / "val.bbox.json").read_text())
    # taken up where it stopped, without a training
    before = (source / "test-both_ways" / "metrics.json").read_text()
    (source / "test-both_ways" / "metrics.json").unlink()
    ablation.run_plan(plan, ablation.LaunchOptions(resamples=40), say=lambda text: None, quiet=True)
    assert len(trained) == 1
    assert (source / "test-both_ways" / "metrics.json").read_text() == before


def test_what_scores_weights_waits_for_them(tmp_path: Path) -> None:
    source = tmp_path / "a" / "seed0"
    train = Run("a", Config(train=Train(seed=0), out=str(source)))
    score = Run("b", Config(train=Train(seed=0), out=str(source / "test-b")), source)
    queue = launcher.Queue([[train], [score]], estimate.Clock({"a": 1.0, "b": 1.0}, {}), beside=2)
    assert queue.take() == train
    assert queue.take() is None
    source.mkdir(parents=True)
    (source / "metrics.json").write_text("{}")
    assert queue.take() == score
    failed = launcher.Queue([[score]], estimate.Clock({"b": 1.0}, {}))
    (source / "metrics.json").unlink()
    (source / "failed.json").write_text("{}")
    assert failed.take() is None
    assert failed.left == []  # its training has failed: the budget is not to blame


# -- small data, and folders taken up again


def test_a_dry_run_on_a_few_images(tmp_path: Path) -> None:
    data = generate_dataset(tmp_path / "few", images=4, seed=0, size=(64, 96), splits={"train": 0.5, "val": 0.5})
    plan = plan_of(tmp_path, TESTS, data, *SMALL, "train.epochs=5", seeds=1)
    rows, basis = ablation.preview_plan(plan, say=lambda text: None)
    assert basis.startswith("one training step of 'plain'")
    assert all(row["seconds"] > 0 for row in rows[:2])


def test_a_folder_knows_its_table_by_what_it_runs(scenes: Path, tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TESTS, scenes, *SMALL)
    launcher.write_marker(plan, ["fusedet", "ablate", str(tmp_path / "mine.yaml"), f"data={scenes}"])
    marker = tmp_path / "out" / "ablation.json"
    assert str(tmp_path) not in marker.read_text()

    def taken_up(name: str, text: str) -> None:
        file = tmp_path / "elsewhere" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        launcher.check_out_dir(replace(plan, table=ablation.load_table(file)))

    taken_up("mine", TESTS)
    taken_up("renamed", TESTS + "note: other words\n")
    taken_up("mine", TESTS + "  - {label: third, overrides: [train.lr=0.5]}\n")
    with pytest.raises(InputError, match="holds another table of that name"):
        taken_up("mine", "base: retinanet_tiny\nrows: [{label: x}]\n")
    with pytest.raises(InputError, match="holds the ablation of mine, not of "):
        taken_up("renamed", TESTS + "  - {label: third, overrides: [train.lr=0.5]}\n")
    for old in ("mine", str(tmp_path / "mine.yaml")):  # as it was written before
        marker.write_text(json.dumps({"table": old, "commands": []}))
        taken_up("mine", TESTS + "  - {label: third, overrides: [train.lr=0.5]}\n")


def test_time_of_all_sessions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Run("a", Config(out=str(tmp_path / "a")))

    def train(config: Config, **rest: Any) -> None:
        cell.folder.mkdir(exist_ok=True)
        (cell.folder / "config.yaml").write_text("{}")
        (cell.folder / "last.ckpt").write_text("")
        clock[0] += 5
        if stop:
            raise KeyboardInterrupt

    clock, stop = [0.0], True
    monkeypatch.setattr(worker, "train", train)
    monkeypatch.setattr(worker.time, "perf_counter", lambda: clock[0])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            worker.execute_run(cell)
    stop = False
    worker.execute_run(cell)
    assert json.loads((cell.folder / "time.json").read_text()) == {
        "seconds": 15,
        "resumed": True,
        "sessions": [5, 5, 5],
    }
    (cell.folder / "time.json").unlink()  # as after a first session that was killed
    worker.execute_run(cell)
    assert json.loads((cell.folder / "time.json").read_text()) == {
        "seconds": None,
        "resumed": True,
        "sessions": [None, 5],
    }
