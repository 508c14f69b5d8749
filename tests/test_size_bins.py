"""AP by size bin: against pycocotools with its own area ranges, by hand, resampled, and as `val` prints it."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import fusedet
from fusedet import cli, evaluation, visualization
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError
from fusedet.evaluation.bootstrap import METRICS, resample_metrics
from properties import property_test
from test_evaluate import GUESSES, OBJECTS, dataset, result

pytestmark = pytest.mark.usefixtures("unrendered")

IDS = (4, 1, 9)
EDGES = (0, 10, 16, 33, 80, 97.5)


def build(images, image_ids):
    """Dataset and results of images [(objects, guesses), ...]."""
    data = dataset([objects for objects, _ in images], names=("a", "b", "c"), ids=IDS, image_ids=image_ids)
    return data, [result(image_ids[i], IDS[k], box, s) for i, (_, own) in enumerate(images) for box, k, s in own]


def run_pycocotools(data, results):
    """AP and AR of each bin by COCOeval with one area range per bin."""
    ground_truth = COCO()
    ground_truth.dataset = json.loads(json.dumps(evaluation.build_coco_ground_truth(data)))
    ground_truth.createIndex()
    detections = ground_truth.loadRes(results)
    run = COCOeval(ground_truth, detections, "bbox")
    run.params.areaRng = [[low**2, high**2] for low, high in pairwise(EDGES)]
    run.params.areaRngLbl = [str(high) for high in EDGES[1:]]
    run.evaluate()
    run.accumulate()
    precision, recall = (np.where(run.eval[name] < 0, np.nan, run.eval[name]) for name in ("precision", "recall"))
    with warnings.catch_warnings(action="ignore"):  # of bins without objects
        return np.nanmean(precision[..., -1], axis=(0, 1, 2)), np.nanmean(recall[..., -1], axis=(0, 1))


@property_test(60, st.lists(st.tuples(OBJECTS, GUESSES), min_size=1, max_size=4), st.permutations([5, 2, 9, 11]))
def test_equals_pycocotools_with_these_area_ranges(images, image_ids):
    data, results = build(images, image_ids)
    rows = [evaluation.evaluate_coco(data, results, evaluator=name, size_bins=EDGES) for name in evaluation.EVALUATORS]
    own = rows[0]["size_bins"]
    for metrics in rows[1:]:
        for name in ("AP", "AR", "objects"):
            expected = [row[name] for row in metrics["size_bins"]]
            assert [row[name] for row in own] == pytest.approx(expected, abs=1e-12, nan_ok=True)
    plain = evaluation.evaluate_coco(data, results)
    assert {name: rows[0][name] for name in METRICS} == pytest.approx({n: plain[n] for n in METRICS}, nan_ok=True)
    if results and len(data.labels):
        ap, ar = run_pycocotools(data, results)
        assert [row["AP"] for row in own] == pytest.approx(list(ap), abs=1e-12, nan_ok=True)
        assert [row["AR"] for row in own] == pytest.approx(list(ar), abs=1e-12, nan_ok=True)


@property_test(
    30, st.data(), st.lists(st.tuples(OBJECTS, GUESSES), min_size=2, max_size=4), st.permutations([5, 2, 9, 11])
)
def test_resamples_of_the_bins_equal_the_evaluation(data, images, image_ids):
    """A resample without an image equals the evaluation of the dataset without it, bin by bin."""
    whole, results = build(images, image_ids)
    left_out = data.draw(st.integers(0, len(images) - 1))
    weights = np.ones((2, len(images)), dtype=np.int16)
    weights[1, left_out] = 0
    resampled = resample_metrics(whole, results, weights, size_bins=EDGES)
    assert resampled.names[len(METRICS) :] == (
        "AP 0-10 px",
        "AP 10-16 px",
        "AP 16-33 px",
        "AP 33-80 px",
        "AP 80-97.5 px",
    )
    kept = [i for i in range(len(images)) if i != left_out]
    part = build([images[i] for i in kept], [image_ids[i] for i in kept])
    for column, (own_data, own_results) in enumerate([(whole, results), part]):
        bins = evaluation.evaluate_coco(own_data, own_results, size_bins=EDGES)["size_bins"]
        expected = [row["AP"] for row in bins]
        assert resampled.metrics[len(METRICS) :, column] == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_bins_by_hand():
    """Objects with sides of 8, 16 and 64 pixels: the first is found, the second missed, the third on an edge."""
    boxes = [(0, 0, 8, 8), (20, 20, 36, 36), (100, 100, 164, 164)]
    data = dataset([[(box, 0, False) for box in boxes] + [((0, 100, 8, 108), 0, True)]], names=("a",), ids=(4,))
    results = [result(1, 4, boxes[0], 0.9), result(1, 4, boxes[2], 0.8), result(1, 4, (60, 0, 76, 16), 0.95)]
    rows = evaluation.evaluate_coco(data, results, size_bins=[0, 10, 32, 64, 100])["size_bins"]
    assert [(row["from"], row["to"], row["objects"]) for row in rows] == [
        (0, 10, 1),
        (10, 32, 1),
        (32, 64, 1),
        (64, 100, 1),
    ], "an edge belongs to both bins; ignored objects do not count"
    assert [row["AP"] for row in rows] == pytest.approx([1, 0, 1, 1]), "the false positive counts in its own bin only"
    assert [row["AR"] for row in rows] == [1, 0, 1, 1]


@pytest.mark.usefixtures("rendered")
def test_val_prints_bins_of_stored_results(scenes, trained, tmp_path, capsys):
    out = tmp_path / "val"
    arguments = [f"data={scenes}", "test.size_bins=[0,16,32,128]", f"out={out}"]
    assert cli.run(["val", str(trained / "val.bbox.json"), *arguments]) == 0
    printed = capsys.readouterr().out
    for text in ("size in pixels", "0 to 16", "16 to 32", "32 to 128"):
        assert text in printed
    stored = json.loads((out / "metrics.json").read_text())["size_bins"]
    data, results = read_dataset(scenes, "val"), evaluation.load_results(trained / "val.bbox.json")
    expected = evaluation.evaluate_coco(data, results, size_bins=[0, 16, 32, 128])["size_bins"]
    assert [row["objects"] for row in stored] == [row["objects"] for row in expected]
    assert [row["AP"] for row in stored] == pytest.approx([row["AP"] for row in expected], abs=1e-12, nan_ok=True)
    assert (out / "sizes.png").stat().st_size > 1000


def test_wrong_edges_are_refused():
    for edges in ([4], [], [8, 4], [4, 4], [-1, 4], [0, 1e9]):
        with pytest.raises(InputError, match=r"test\.size_bins"):
            fusedet.resolve_config("retinanet_tiny", [f"test.size_bins={edges}"])


@pytest.mark.usefixtures("rendered")
def test_plot_has_a_bar_per_bin(tmp_path):
    bins = [
        {"from": 2.0**i, "to": 2.0 ** (i + 1), "AP": ap, "AR": ap, "objects": 9} for i, ap in enumerate([0.1, None])
    ]
    file = tmp_path / "sizes.svg"
    visualization.plot_ap_by_size({"AP": 0.4, "APs": 0.1, "APm": 0.4, "APl": 0.6, "size_bins": bins}, file)
    assert file.stat().st_size > 1000
