"""More than 100 objects in an image: metrics with test.max_det detections equal those of pycocotools."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fusedet
from fusedet import evaluation
from fusedet.data.readers.auto import read_dataset
from fusedet.data.split_checks import describe_crowded_images

pytestmark = pytest.mark.usefixtures("unrendered")


def write_crowded(root: Path, counts: tuple[int, ...] = (230, 3)) -> Path:
    """Write a COCO json of two classes with so many objects per image on a grid of 20 pixels; no image is needed."""
    boxes = [(20.0 * (i % 20), 20.0 * (i // 20), 12.0, 9.0 + i % 5) for i in range(max(counts))]
    annotations = [
        {"image_id": n, "category_id": 1 + i % 17 // 16, "bbox": list(boxes[i]), "area": 99.0, "iscrowd": 0}
        for n, count in enumerate(counts)
        for i in range(count)
    ]
    (root / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (root / split).mkdir()
        for n in range(len(counts)):
            Image.new("RGB", (400, 400), "gray").save(root / split / f"{n}.png")
        whole = {
            "images": [{"id": n, "file_name": f"{n}.png", "width": 400, "height": 400} for n in range(len(counts))],
            "categories": [{"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}],
            "annotations": [{"id": i, **a} for i, a in enumerate(annotations, 1)],
        }
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(whole))
    return root


def disturb(dataset, seed: int) -> list[dict]:
    """Results near the ground truth, with random scores, shifts and false positives."""
    rng = np.random.default_rng(seed)
    results = []
    for record in dataset:
        for (x1, y1, x2, y2), label in zip(record.boxes.tolist(), record.labels.tolist()):
            for _ in range(int(rng.integers(1, 3))):
                dx, dy = rng.normal(0, 1.5, 2)
                box = [x1 + dx, y1 + dy, x2 - x1, y2 - y1]
                category = dataset.category_ids[label]
                results.append(
                    {"image_id": record.image_id, "category_id": category, "bbox": box, "score": float(rng.random())}
                )
    return results


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[dict], Callable[[int], Any]]:
    """A dataset, results, and the evaluation of pycocotools with a limit of detections, once for every limit."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root = write_crowded(tmp_path_factory.mktemp("crowded") / "data")
    dataset = read_dataset(root, "val")
    results = disturb(dataset, 0)
    truth = COCO(str(root / "annotations/instances_val.json"))

    @cache
    def evaluate(limit: int) -> Any:
        run = COCOeval(truth, truth.loadRes(results), "bbox")
        run.params.maxDets = [1, 10, limit]
        run.evaluate()
        run.accumulate()
        return run.eval

    return dataset, results, evaluate


@pytest.mark.parametrize("evaluator", evaluation.EVALUATORS)
@pytest.mark.parametrize("limit", [pytest.param(150, marks=pytest.mark.slow), 300])
def test_more_detections_equal_pycocotools(crowded: Any, evaluator: str, limit: int) -> None:
    """The oracle is pycocotools itself, given the limits by its own parameter."""
    dataset, results, evaluate = crowded
    values = evaluate(limit)

    def average(values: np.ndarray) -> float:
        return float(values[values > -1].mean()) if (values > -1).any() else float("nan")

    precision, recall = values["precision"][..., -1], values["recall"][..., -1]
    expected = {
        f"AP@{limit}": average(precision[..., 0]),
        f"AP50@{limit}": average(precision[0, ..., 0]),
        f"AP75@{limit}": average(precision[5, ..., 0]),
        f"APs@{limit}": average(precision[..., 1]),
        f"AR@{limit}": average(recall[..., 0]),
        f"ARs@{limit}": average(recall[..., 1]),
    }
    plain = evaluation.evaluate_coco(dataset, results, evaluator=evaluator)
    metrics = evaluation.evaluate_coco(dataset, results, evaluator=evaluator, max_det=limit)
    assert {key: metrics[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert metrics[f"AR@{limit}"] > metrics["AR100"] + 0.02, "the limit makes a difference here"
    assert {key: metrics[key] for key in evaluation.COCO_METRICS} == pytest.approx(
        {key: plain[key] for key in evaluation.COCO_METRICS}, nan_ok=True
    ), "AP stays COCO's"
    assert [row[f"AP@{limit}"] for row in metrics["classes"]] == pytest.approx(
        [average(precision[:, :, k, 0]) for k in range(2)]
    )


def test_up_to_100_detections_add_no_metric(tmp_path: Path) -> None:
    dataset = read_dataset(write_crowded(tmp_path, (3, 2)), "val")
    results = disturb(dataset, 1)
    plain = evaluation.evaluate_coco(dataset, results, per_class=False)
    for limit in (1, 50, 100):
        limited = evaluation.evaluate_coco(dataset, results, per_class=False, max_det=limit)
        assert limited == pytest.approx(plain, nan_ok=True)


def test_perfect_results_of_230_objects(tmp_path: Path) -> None:
    """With perfect results AP with 100 detections is below 1 and AP with 230 is 1; val says so and warns."""
    root = write_crowded(tmp_path / "data")
    dataset = read_dataset(root, "val")
    perfect = [
        {"image_id": r.image_id, "category_id": dataset.category_ids[k], "score": 1.0}
        | {"bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]]}
        for r in dataset
        for box, k in zip(r.boxes.tolist(), r.labels.tolist())
    ]
    file = tmp_path / "perfect.json"
    file.write_text(json.dumps(perfect))
    said: list[str] = []
    result = fusedet.validate(file, data=root, out=tmp_path / "a", say=said.append)
    assert result.metrics["AP"] < 0.8
    assert any("1 image" in s and "max_det=100" in s and "set test.max_det=230" in s for s in said)
    said.clear()
    result = fusedet.validate(file, data=root, test={"max_det": 230}, out=tmp_path / "b", say=said.append)
    assert result.metrics["AP@230"] == result.metrics["AR@230"] == 1
    assert result.metrics["AP"] < 0.8
    assert result.metrics["stamp"]["max_dets"] == [1, 10, 100, 230]
    assert not said
    assert "AP@230" in str(result)
    assert "AR@230" in str(result)


def test_doctor_warns_of_crowded_images(tmp_path: Path) -> None:
    root = write_crowded(tmp_path)
    warnings = fusedet.check_dataset(data=root, read_images=False).reports["val"].warnings
    assert any("more than test.max_det=100 objects, up to 230" in w and "0.png" in w for w in warnings)
    warnings = fusedet.check_dataset(data=root, test={"max_det": 230}, read_images=False).reports["val"].warnings
    assert not any("max_det" in w for w in warnings)


def test_ignored_objects_do_not_crowd_an_image(tmp_path: Path) -> None:
    root = write_crowded(tmp_path, (110, 1))
    file = root / "annotations/instances_val.json"
    content = json.loads(file.read_text())
    for annotation in content["annotations"][:20]:
        annotation["iscrowd"] = 1
    file.write_text(json.dumps(content))
    assert describe_crowded_images(read_dataset(root, "train"), 100)
    assert describe_crowded_images(read_dataset(root, "val"), 100) is None


def test_monitor_may_be_a_metric_of_the_limit() -> None:
    from fusedet.api.train_inputs import check_monitor

    check_monitor(fusedet.resolve_config("retinanet_r18_small", ["test.max_det=300", "train.monitor=AP@300"]))
    with pytest.raises(fusedet.InputError, match=r"train\.monitor"):
        check_monitor(fusedet.resolve_config("retinanet_r18_small", ["train.monitor=AP@300"]))


def test_case_of_200_objects(shared: Path, tmp_path: Path) -> None:
    case = shared / "cases/07-more-than-100-objects"
    said: list[str] = []
    result = fusedet.validate(case / "perfect.json", data=case / "data", out=tmp_path / "a", say=said.append)
    assert said
    assert result.metrics["AP"] < 1
    result = fusedet.validate(case / "perfect.json", data=case / "data", test={"max_det": 300}, out=tmp_path / "b")
    assert result.metrics["AP@300"] == 1
