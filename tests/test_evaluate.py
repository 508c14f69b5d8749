"""Metrics against the reference packages, values by hand and the rule of the VOC devkit."""

import importlib
import json
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedet import evaluation
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.readers.coco import read_coco
from fusedet.errors import InputError
from properties import property_test

FIGURES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def dataset(images, names=("cat", "dog"), ids=(7, 3), image_ids=None, size=(200, 200)):
    """DetectionDataset of images [[(box xyxy, label, ignore), ...], ...]."""

    def one(i, objects):
        boxes = np.array([o[0] for o in objects], dtype=float).reshape(-1, 4)
        area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        labels, ignore = np.array([o[1] for o in objects], dtype=int), np.array([o[2] for o in objects], dtype=bool)
        image_id = image_ids[i] if image_ids else i + 1
        return ImageAnnotations(
            image_id, Path(f"{i}.jpg"), *size, boxes, labels, ignore, area, [None] * len(objects), ignore
        )

    return DetectionDataset.build(
        names, ids, (one(i, o) for i, o in enumerate(images)), source="made", dataset_format="coco"
    )


def result(image_id, category_id, box, score):
    x1, y1, x2, y2 = box
    return {"image_id": image_id, "category_id": category_id, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


@pytest.mark.parametrize("evaluator", evaluation.EVALUATORS)
@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_cocos_own_example(shared, iou_type, evaluator):
    folder = shared / "data" / "coco_eval"
    data = read_coco(folder / "instances_val2014_100.json", folder, need_images=False)
    results = evaluation.load_results(folder / f"instances_val2014_fake{iou_type}100_results.json")
    expected = json.loads((folder / "expected.json").read_text())
    metrics = evaluation.evaluate_coco(data, results, iou_type=iou_type, evaluator=evaluator)
    assert [metrics[name] for name in expected["stats_order"]] == pytest.approx(expected[iou_type], abs=1e-6)


# Few sites and scores, so that ties, exact thresholds, crowds and all three sizes of area are met often.
SIDES = st.sampled_from([8, 10, 16, 32, 33, 40, 80, 96, 97, 100])
BOXES = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), *[st.sampled_from([0, 2, 5, 10, 40])] * 2, SIDES, SIDES)
OBJECTS = st.lists(st.tuples(BOXES, st.integers(0, 2), st.booleans()), max_size=5)
GUESSES = st.lists(st.tuples(BOXES, st.integers(0, 2), st.sampled_from([0.1, 0.3, 0.5, 0.5, 0.9])), max_size=14)


# the evaluators against each other: test_pycocotools.py, and with image ids in any order test_size_bins.py
@property_test(100, st.lists(st.tuples(OBJECTS, GUESSES), min_size=1, max_size=4), st.permutations([5, 2, 9, 11]))
def test_precision_recall_has_the_ap_of_the_metrics(images, image_ids):
    ids = (4, 1, 9)
    data = dataset([objects for objects, _ in images], names=("a", "b", "c"), ids=ids, image_ids=image_ids)
    results = [
        result(image_ids[i], ids[k], box, score) for i, (_, guesses) in enumerate(images) for box, k, score in guesses
    ]
    expected = evaluation.evaluate_coco(data, results, per_class=False)["AP50"]
    ap = evaluation.compute_precision_recall(data, results)["AP"]
    assert ap == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_more_than_a_hundred_detections_equal_pycocotools():
    rng = np.random.default_rng(0)

    def some(n):
        first = rng.integers(0, 100, (n, 2))
        return np.concatenate([first, first + rng.integers(5, 100, (n, 2))], axis=1).tolist()

    data = dataset([[(box, int(rng.integers(2)), rng.random() < 0.2) for box in some(20)] for _ in range(3)])
    results = [
        result(i, (7, 3)[int(rng.integers(2))], box, round(rng.random(), 2)) for i in (1, 2, 3) for box in some(300)
    ]
    own, other = (evaluation.evaluate_coco(data, results, evaluator=name) for name in ("fusedet", "pycocotools"))
    assert [own[name] for name in FIGURES] == pytest.approx([other[name] for name in FIGURES], abs=1e-12, nan_ok=True)


def test_pairs_in_blocks_change_nothing(monkeypatch):
    data = dataset([[((0, 0, 40, 40), 0, False), ((5, 5, 50, 50), 0, False)]] * 5)
    results = [result(i, 7, (j, j, 40 + j, 40 + j), 1 / (1 + j)) for i in range(1, 6) for j in range(12)]
    whole = evaluation.evaluate_coco(data, results, per_class=False)
    monkeypatch.setattr("fusedet.evaluation.coco_matching.BLOCK", 7)
    assert evaluation.evaluate_coco(data, results, per_class=False) == pytest.approx(whole, nan_ok=True)


def test_no_results_give_zeros():
    data = dataset([[((0, 0, 20, 20), 0, False)], []])
    for evaluator in evaluation.EVALUATORS:
        metrics = evaluation.evaluate_coco(data, [], evaluator=evaluator)
        assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == metrics["APs"] == 0
        assert np.isnan(metrics["APl"])
        assert np.isnan(metrics["classes"][1]["AP"])
    assert evaluation.evaluate_voc(data, [])["mAP"] == 0
    assert evaluation.compute_confusion_matrix(data, []).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert evaluation.compute_precision_recall(data, [])["AP"] == 0


def test_no_objects_give_nan():
    data = dataset([[], [((0, 0, 20, 20), 0, True)]])
    results = [result(1, 7, (0, 0, 5, 5), 0.5)]
    assert np.isnan(evaluation.evaluate_coco(data, results)["AP"])
    assert np.isnan(evaluation.evaluate_voc(data, results)["mAP"])
    assert np.isnan(evaluation.compute_precision_recall(data, results)["AP"])


def test_results_are_not_changed():
    results = [result(1, 7, (0, 0, 5, 5), 0.5)]
    before = json.dumps(results)
    for evaluator in evaluation.EVALUATORS:
        evaluation.evaluate_coco(dataset([[((0, 0, 5, 5), 0, False)]]), results, evaluator=evaluator)
    assert json.dumps(results) == before


def test_classes_count_what_is_not_ignored():
    data = dataset(
        [[((0, 0, 5, 5), 0, False), ((9, 9, 15, 15), 0, False), ((0, 0, 9, 9), 1, True)], [((0, 0, 5, 5), 0, False)]]
    )
    rows = evaluation.evaluate_coco(data, [result(1, 7, (0, 0, 5, 5), 0.5)])["classes"]
    assert [(row["name"], row["images"], row["objects"]) for row in rows] == [("cat", 2, 3), ("dog", 0, 0)]
    assert rows[0]["AP50"] == pytest.approx(34 / 101)  # one of three matched: precision 1 at the recalls 0 .. 0.33


def test_ground_truth_has_cocos_form():
    data = dataset([[((1, 2, 11, 22), 1, True)]])
    truth = evaluation.build_coco_ground_truth(data)
    assert truth["images"] == [{"id": 1, "file_name": "0.jpg", "height": 200, "width": 200}]
    assert truth["annotations"] == [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 1}
    ]
    assert truth["categories"] == [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]


def test_precision_recall_by_hand():
    data = dataset([[((0, 0, 10, 10), 0, False), ((50, 50, 60, 60), 0, False)]])
    results = [
        result(1, 7, box, s) for box, s in (((0, 0, 10, 10), 0.9), ((90, 90, 99, 99), 0.8), ((50, 50, 60, 60), 0.7))
    ]
    curve = evaluation.compute_precision_recall(data, results)["classes"][0]
    assert curve["precision"] == pytest.approx([1] * 51 + [2 / 3] * 50)
    assert curve["scores"].tolist() == [0.9] * 51 + [0.7] * 50
    assert curve["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_voc_by_hand():
    # Detections in falling score: right, false, right, a duplicate, one on a difficult object.
    data = dataset(
        [
            [((0, 0, 10, 10), 0, False), ((20, 20, 40, 40), 0, True)],
            [((0, 0, 10, 10), 0, False), ((50, 0, 60, 10), 0, False)],
        ]
    )
    results = [
        result(1, 7, (0, 0, 10, 10), 0.9),
        result(2, 7, (80, 80, 90, 90), 0.8),
        result(2, 7, (0, 0, 10, 9), 0.7),
        result(2, 7, (0, 0, 10, 10), 0.6),
        result(1, 7, (20, 20, 40, 40), 0.95),
    ]
    # Recall 1/3 at precision 1, 2/3 at precision 2/3.
    area = evaluation.evaluate_voc(data, results)
    assert area["classes"][0] == {"name": "cat", "AP": pytest.approx(1 / 3 + 2 / 9), "images": 2, "objects": 3}
    assert area["mAP"] == area["classes"][0]["AP"]
    assert evaluation.evaluate_voc(data, results, points=11)["mAP"] == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)


def devkit(objects, guesses, total, points):
    """VOCevaldet.m's loop on inclusive 1-based pixels.

    objects {image: [(box, difficult)]}, guesses [(image, box, score)].
    """
    taken, hits = set(), []
    for image, box, _ in sorted(guesses, key=lambda g: -g[2]):
        best, at = -1.0, None
        for j, (true, _) in enumerate(objects.get(image, [])):
            wide = min(box[2], true[2]) - max(box[0], true[0]) + 1
            high = min(box[3], true[3]) - max(box[1], true[1]) + 1
            if wide > 0 and high > 0:
                own, other = ((b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, true))
                overlap = wide * high / (own + other - wide * high)
                if overlap > best:
                    best, at = overlap, j
        if best < 0.5:
            hits.append(False)
        elif not objects[image][at][1]:
            hits.append((image, at) not in taken)
            taken.add((image, at))
    curve = [(Fraction(sum(hits[: i + 1]), total), Fraction(sum(hits[: i + 1]), i + 1)) for i in range(len(hits))]
    if points == 11:
        return float(
            sum(max((p for r, p in curve if r >= Fraction(t, 10)), default=0) for t in range(11)) / Fraction(11)
        )
    recalls = [Fraction(0), *(r for r, _ in curve)]
    return float(sum((b - a) * max(p for _, p in curve[i:]) for i, (a, b) in enumerate(pairwise(recalls))))


@pytest.mark.parametrize("points", ["area", 11])
@given(images=st.lists(st.tuples(OBJECTS, GUESSES), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_voc_equals_the_devkit(points, images):
    data = dataset([objects for objects, _ in images], names=("a", "b", "c"), ids=(1, 2, 3))
    results = [result(i, k + 1, box, score) for i, (_, guesses) in enumerate(images, 1) for box, k, score in guesses]
    rows = evaluation.evaluate_voc(data, results, points=points)["classes"]
    pixels = lambda b: (b[0] + 1, b[1] + 1, b[2], b[3])  # noqa: E731
    for k, row in enumerate(rows):
        objects = {i: [(pixels(b), d) for b, c, d in own if c == k] for i, (own, _) in enumerate(images, 1)}
        guesses = [(i, pixels(b), s) for i, (_, own) in enumerate(images, 1) for b, c, s in own if c == k]
        total = sum(not d for own in objects.values() for _, d in own)
        assert row["objects"] == total
        assert row["AP"] == pytest.approx(
            devkit(objects, guesses, total, points) if total else float("nan"), nan_ok=True
        )


def mistakes():
    data = dataset(
        [
            [((0, 0, 10, 10), 0, False), ((20, 20, 30, 30), 1, False), ((50, 50, 90, 90), 0, True)],
            [((0, 0, 10, 10), 1, False)],
            [((0, 0, 10, 10), 1, False)],
            [],
        ]
    )
    results = [
        result(1, 7, (0, 0, 10, 10), 0.9),  # right
        result(1, 7, (20, 20, 30, 30), 0.8),  # the dog taken for a cat
        result(1, 3, (20, 20, 30, 30), 0.7),  # the dog again, too late: false
        result(1, 7, (55, 55, 60, 60), 0.6),  # in the ignored object: does not count
        result(1, 3, (55, 55, 60, 60), 0.6),  # there too, but of another class: false
        result(2, 3, (0, 0, 10, 10), 0.2),  # below the score: the dog is missed
        result(3, 3, (0, 0, 10, 9), 0.5),  # right
    ]
    return data, results


def test_confusion_by_hand():
    matrix = evaluation.compute_confusion_matrix(*mistakes())
    assert matrix.tolist() == [[1, 0, 0], [1, 1, 1], [0, 2, 0]]


def test_worst_images_by_hand():
    assert evaluation.find_worst_images(*mistakes()) == [(1, 0.0, 1, 0), (0, 2 / 6, 1, 3)]
    assert evaluation.find_worst_images(*mistakes(), n=1) == [(1, 0.0, 1, 0)]


def test_equal_overlaps_prefer_the_own_class():
    both = ((0, 0, 10, 10), 1, False), ((0, 0, 10, 10), 0, False)
    for objects in (both, both[::-1]):
        matrix = evaluation.compute_confusion_matrix(
            dataset([objects]), [result(1, 7, (0, 0, 10, 10), 0.9), result(1, 3, (0, 0, 10, 10), 0.8)]
        )
        assert matrix.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"image_id": 99}, "unknown image_id, not in made: 99"),
        ({"category_id": 1}, "unknown category_id, not in made: 1"),
        ({"score": float("nan")}, "'score' of result 1"),
        ({"bbox": [0, 0, float("inf"), 1]}, "'bbox' of result 1"),
        ({"bbox": [0, 0, -1, 1]}, "'bbox' of result 1"),
        ({"bbox": [0, 0, 1]}, "'bbox' of result 1"),
        ({"image_id": "1"}, "'image_id' of result 1"),
        ({"score": None}, "'score' of result 1"),
        ({"score": True}, "'score' of result 1"),
        ({"image_id": True}, "'image_id' of result 1"),
        ({"bbox": [0, 0, "1", 1]}, "'bbox' of result 1"),
    ],
)
def test_bad_results_are_named(change, text):
    data, good = dataset([[((0, 0, 5, 5), 0, False)]]), result(1, 7, (0, 0, 5, 5), 0.5)
    for figure in (
        evaluation.evaluate_coco,
        evaluation.evaluate_voc,
        evaluation.compute_confusion_matrix,
        evaluation.find_worst_images,
        evaluation.compute_precision_recall,
    ):
        with pytest.raises(InputError, match=text.replace("[", r"\[")):
            figure(data, [good, good | change])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "not json"),
        ("{}", "must hold a list"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1]}]', "result 0 lacks 'score'"),
        ('[{"image_id": 1, "category_id": 1, "score": 1}]', "result 0 lacks 'bbox'"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, NaN], "score": 1}]', "'bbox' of result 0"),
        ("[3]", "result 0 lacks"),
        (b"\xff\xfe", "not json"),
    ],
)
def test_bad_result_files(tmp_path, content, text):
    file = tmp_path / "r.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=text) as error:
        evaluation.load_results(file)
    assert str(file) in str(error.value)


def test_absent_result_file(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        evaluation.load_results(tmp_path / "absent.json")


def test_good_result_file(tmp_path):
    results = [result(1, 7, (0, 0, 5, 5), 0.5)]
    (tmp_path / "r.json").write_text(json.dumps(results))
    assert evaluation.load_results(tmp_path / "r.json") == results


def test_masks_must_be_there_and_fit():
    without_masks = dataset([[((0, 0, 5, 5), 0, False)]])
    with pytest.raises(InputError, match="1 instances of made have no mask"):
        evaluation.evaluate_coco(without_masks, [], iou_type="segm")
    empty = dataset([[]])
    wrong = {"image_id": 1, "category_id": 7, "score": 0.5}
    with pytest.raises(InputError, match="result 0 lacks 'segmentation'"):
        evaluation.evaluate_coco(empty, [wrong], iou_type="segm")
    with pytest.raises(InputError, match=r"size \[5, 5\], it must be the image's \[200, 200\]"):
        evaluation.evaluate_coco(empty, [wrong | {"segmentation": {"size": [5, 5], "counts": "0"}}], iou_type="segm")


def test_unknown_names_are_refused():
    data = dataset([[]])
    with pytest.raises(InputError, match="did you mean 'pycocotools'"):
        evaluation.evaluate_coco(data, [], evaluator="pycocotool")
    with pytest.raises(InputError, match="unknown iou_type"):
        evaluation.evaluate_coco(data, [], iou_type="box")
    with pytest.raises(InputError, match="points must be"):
        evaluation.evaluate_voc(data, [], points=10)
    with pytest.raises(InputError, match="iou must lie"):
        evaluation.compute_confusion_matrix(data, [], iou=0)


def test_missing_package_says_how_to_install(monkeypatch):
    def absent(name, *rest):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(InputError, match="pip install pycocotools"):
        evaluation.evaluate_coco(dataset([[]]), [], evaluator="pycocotools")


def test_stamp_changes_with_what_is_evaluated():
    data, results = dataset([[((0, 0, 5, 5), 0, False)], []]), [result(1, 7, (0, 0, 5, 5), 0.5)]
    one = evaluation.create_stamp(data, results)
    assert one["evaluator"].startswith("fusedet ")
    assert (one["images"], one["detections"], one["iou_type"], one["max_dets"]) == (2, 1, "bbox", [1, 10, 100])
    assert one == evaluation.create_stamp(data, results)
    other = evaluation.create_stamp(
        dataset([[((0, 0, 5, 5), 0, False)], []], image_ids=[1, 3]), results, "pycocotools", iou_type="segm"
    )
    assert other["image_ids"] != one["image_ids"]
    assert other["evaluator"].startswith("pycocotools 2")


def test_stamp_refuses_an_unknown_evaluator():
    with pytest.raises(InputError, match="unknown evaluator"):
        evaluation.create_stamp(dataset([[]]), [], "coco")


def test_numbers_of_numpy_and_integers_are_those_of_python():
    data = dataset([[((1, 2, 30, 40), 0, False)], [((5, 5, 50, 50), 0, False)]])
    plain = [result(1, 7, (1.0, 2.0, 30.0, 40.0), 1.0), result(2, 7, (5.0, 5.0, 50.0, 48.0), 0.0)]
    other = [
        {
            "image_id": np.int32(r["image_id"]),
            "category_id": np.int64(r["category_id"]),
            "bbox": np.array(r["bbox"], dtype=np.float32),
            "score": int(r["score"]),
        }
        for r in plain
    ]
    tables = [evaluation.build_detection_table(data, rows) for rows in (plain, other)]
    for name, column in vars(tables[0]).items():
        np.testing.assert_array_equal(getattr(tables[1], name), column)
        assert getattr(tables[1], name).dtype == column.dtype
