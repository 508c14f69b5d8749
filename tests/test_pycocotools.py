"""COCO metrics against pycocotools on the raw annotation file: a test per quirk of its rules, and random data."""

import contextlib
import io
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fusedet import evaluation
from fusedet.data.readers.coco import read_coco
from properties import property_test

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
SIZE = 200


def annotation(box, image=1, category=1, **values):
    """An entry of `annotations`; its id and its area, where not given, are filled in by `write`."""
    return {
        "image_id": image,
        "category_id": category,
        "bbox": list(box),
        "area": box[2] * box[3],
        "iscrowd": 0,
    } | values


def detection(box, score, image=1, category=1):
    return {"image_id": image, "category_id": category, "bbox": list(box), "score": score}


def write(folder, annotations, images=1, categories=1):
    """A raw COCO file; ids of annotations count from 1, as pycocotools takes a match with id 0 for none."""
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIZE, "width": SIZE} for i in range(images, 0, -1)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(categories, 0, -1)],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(annotations, 1)],
    }
    file = Path(folder) / "instances.json"
    file.write_text(json.dumps(content))
    return file


def run_pycocotools(file, results, iou_type="bbox", thresholds=None):
    """The 12 metrics and each class's AP and AP50, NaN where pycocotools says -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(str(file))
        evaluator = COCOeval(ground_truth, ground_truth.loadRes(json.loads(json.dumps(results))), iou_type)
        if thresholds is not None:
            evaluator.params.iouThrs = np.array(thresholds)
        evaluator.evaluate()
        evaluator.accumulate()
        if thresholds is not None:
            return evaluator.eval["precision"][:, :, :, 0, -1].mean()
        evaluator.summarize()
    precision = evaluator.eval["precision"][..., 0, -1]  # (T, R, K)
    precision = np.where(precision < 0, np.nan, precision)
    values = [math.nan if value == -1 else value for value in evaluator.stats]
    return dict(zip(METRICS, values)), precision.mean(axis=(0, 1)), precision[0].mean(axis=0)


def evaluate(folder, annotations, results, images=1, categories=1, iou_type="bbox"):
    """The metrics, after asserting that every evaluator equals pycocotools on the raw file."""
    file = write(folder, annotations, images, categories)
    expected, ap, ap50 = run_pycocotools(file, results, iou_type)
    dataset = read_coco(file, folder, need_images=False)
    for evaluator in evaluation.EVALUATORS:
        metrics = evaluation.evaluate_coco(dataset, results, iou_type=iou_type, evaluator=evaluator)
        classes = metrics.pop("classes")
        assert metrics == pytest.approx(expected, abs=1e-12, nan_ok=True), evaluator
        assert [row["AP"] for row in classes] == pytest.approx(ap, abs=1e-12, nan_ok=True), evaluator
        assert [row["AP50"] for row in classes] == pytest.approx(ap50, abs=1e-12, nan_ok=True), evaluator
    return expected


BOX, FAR = (10, 10, 60, 40), (120, 120, 60, 60)


def test_the_ignore_key_is_overwritten_by_iscrowd(tmp_path):
    annotations = [
        entry for image in range(1, 6) for entry in (annotation(BOX, image), annotation(FAR, image, ignore=1))
    ]
    results = [detection(BOX, 0.9, image) for image in range(1, 6)]
    metrics = evaluate(tmp_path, annotations, results, images=5)
    assert metrics["AP"] == pytest.approx(51 / 101), "half of the instances are missed"
    metrics = evaluate(tmp_path, [entry | {"ignore": 0, "iscrowd": 1} for entry in annotations], results, images=5)
    assert math.isnan(metrics["AP"]), "crowds do not count, whatever `ignore` says"


def test_the_threshold_is_never_above_one_less_1e_10(tmp_path):
    file = write(tmp_path, [annotation((0, 0, 100, 100))])
    dataset = read_coco(file, tmp_path, need_images=False)
    for below, expected in ((5e-11, 1), (2e-10, 0)):
        results = [detection((0, 0, 100, 100 * (1 - below)), 0.9)]
        assert run_pycocotools(file, results, thresholds=[1.0]) == pytest.approx(expected)
        assert evaluation.compute_precision_recall(dataset, results, iou=1.0)["AP"] == pytest.approx(expected)


def test_of_equal_overlaps_the_later_ground_truth_is_matched(tmp_path):
    left, right, middle = annotation((0, 0, 30, 20)), annotation((10, 0, 30, 20)), (5, 0, 30, 20)
    results = [detection(middle, 0.9), detection((0, 0, 20, 20), 0.8)]  # the second one matches `left` only
    assert evaluate(tmp_path, [left, right], results)["AP50"] == pytest.approx(1)
    assert evaluate(tmp_path, [right, left], results)["AP50"] == pytest.approx(51 / 101)


def test_overlaps_are_of_the_decimal_sizes_of_the_file(tmp_path):
    """9.0 + 33.9 - 9.0 is not 33.9 in floating point: one bit would decide which of the two is matched first."""
    left, right = annotation((9.0, 27.0, 33.9, 16.9)), annotation((10.8, 27.0, 33.9, 16.9))
    results = [detection((9.9, 27.0, 33.9, 16.9), 0.9), detection((9.0, 27.0, 23.7, 16.9), 0.8)]
    evaluate(tmp_path, [left, right], results)
    evaluate(tmp_path, [right, left], results)


def test_a_crowd_is_matched_many_times(tmp_path):
    annotations = [annotation(BOX), annotation((100, 100, 80, 80), iscrowd=1)]
    results = [detection((110 + 5 * i, 110, 40, 40), 0.9 - i / 100) for i in range(5)] + [detection(BOX, 0.1)]
    assert evaluate(tmp_path, annotations, results)["AP"] == pytest.approx(1)
    annotations[1]["iscrowd"] = 0
    assert evaluate(tmp_path, annotations, results)["AP50"] < 0.5


def test_an_area_of_exactly_1024_is_small_and_medium(tmp_path):
    metrics = evaluate(tmp_path, [annotation((0, 0, 32, 32))], [detection((0, 0, 32, 32), 0.9)])
    assert (metrics["APs"], metrics["APm"]) == pytest.approx((1, 1))
    assert math.isnan(metrics["APl"])
    metrics = evaluate(tmp_path, [annotation((0, 0, 96, 96))], [detection((0, 0, 96, 96), 0.9)])
    assert (metrics["APm"], metrics["APl"]) == pytest.approx((1, 1))


def test_the_size_of_an_instance_is_its_annotated_area(tmp_path):
    metrics = evaluate(tmp_path, [annotation((0, 0, 100, 100), area=500)], [detection((0, 0, 100, 100), 0.9)])
    assert metrics["APs"] == pytest.approx(1)
    assert math.isnan(metrics["APl"])


def test_the_overlap_with_a_crowd_is_divided_by_the_detections_area(tmp_path):
    annotations = [annotation(BOX), annotation((100, 0, 100, 200), iscrowd=1)]
    inside = [detection((110, 10, 10, 10), 0.9), detection(BOX, 0.5)]  # IoU 1 with the crowd, 0.005 by the union
    assert evaluate(tmp_path, annotations, inside)["AP"] == pytest.approx(1)
    mostly_outside = [detection((96, 10, 10, 10), 0.9), detection(BOX, 0.5)]  # 0.6 of it lies in the crowd
    metrics = evaluate(tmp_path, annotations, mostly_outside)
    assert metrics["AP50"] == pytest.approx(1)
    assert metrics["AP75"] == pytest.approx(0.5)


def test_absent_classes_leave_the_mean(tmp_path):
    annotations = [annotation(BOX, category=2), annotation(FAR, category=3, iscrowd=1)]
    results = [detection(BOX, 0.9, category=category) for category in (1, 2, 3)]
    metrics = evaluate(tmp_path, annotations, results, categories=3)
    assert metrics["AP"] == pytest.approx(1), "classes 1 and 3 have no instance that counts"


def test_the_hundred_best_detections_of_an_image_and_class_count(tmp_path):
    results = [detection(FAR, 0.9) for _ in range(100)] + [detection(BOX, 0.1)]
    assert evaluate(tmp_path, [annotation(BOX)], results)["AP"] == 0
    assert evaluate(tmp_path, [annotation(BOX)], results[1:])["AP"] == pytest.approx(1 / 100)


STEPS = st.sampled_from([0, 0.1, 2.5, 5, 10.3, 40])
SIDES = st.sampled_from([8, 10.1, 16, 20.2, 32, 32.7, 40, 80, 96, 97.3])
BOXES = st.tuples(STEPS, STEPS, SIDES, SIDES)
ENTRIES = st.builds(
    annotation,
    BOXES,
    image=st.integers(1, 3),
    category=st.integers(1, 3),
    iscrowd=st.sampled_from([0, 0, 1]),
    ignore=st.sampled_from([0, 0, 1]),
)
DETECTIONS = st.builds(
    detection,
    BOXES,
    score=st.sampled_from([0.1, 0.3, 0.5, 0.5, 0.9]),
    image=st.integers(1, 3),
    category=st.integers(1, 3),
)


@property_test(100, st.lists(ENTRIES, max_size=12), st.lists(DETECTIONS, min_size=1, max_size=30))
def test_random_boxes(annotations, results):
    with tempfile.TemporaryDirectory() as folder:
        evaluate(folder, annotations, results, images=3, categories=3)


@property_test(30, st.lists(ENTRIES, max_size=12), st.lists(DETECTIONS, min_size=1, max_size=30))
def test_random_masks(annotations, results):
    def polygon(box):
        x, y, width, height = box
        return [[x, y, x + width, y, x + width, y + height, x, y + height]]

    annotations = [entry | {"segmentation": polygon(entry["bbox"])} for entry in annotations]
    masks = [coco_mask.frPyObjects(polygon(result["bbox"]), SIZE, SIZE)[0] for result in results]
    results = [
        {key: value for key, value in result.items() if key != "bbox"}
        | {"segmentation": {"size": mask["size"], "counts": mask["counts"].decode()}}
        for result, mask in zip(results, masks)
    ]
    with tempfile.TemporaryDirectory() as folder:
        evaluate(folder, annotations, results, images=3, categories=3, iou_type="segm")
