"""Intervals: the bootstrap against repeated images, its coverage of a known difference, and printed t tables."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import strategies as st

from fusedet import evaluation
from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation.bootstrap import (
    METRICS,
    ResampledMetrics,
    average_runs,
    compute_difference,
    draw_image_weights,
    resample_metrics,
)
from fusedet.evaluation.confidence_intervals import compute_percentile_interval, t_quantile
from fusedet.evaluation.results import DetectionTable
from properties import property_test
from test_evaluate import GUESSES, OBJECTS, dataset, result

IDS = (4, 1, 9)


def repeated(images, image_ids, weights):
    """COCO's metrics of the data in which image i really occurs weights[i] times: the slow reference.

    Scores are replaced by falling ones in COCO's order on the data itself (score, then image id, then the order of the
    results), and copies get ids beside their original's: so ties stand as `resample_metrics` says.
    """
    rows = [
        (-score, image_ids[i], n, i, box, k)
        for i, (_, own) in enumerate(images)
        for n, (box, k, score) in enumerate(own)
    ]
    ranked = {
        (i, n): 1 - place / 1000 for place, (_, _, n, i, _, _) in enumerate(sorted(rows, key=lambda row: row[:3]))
    }
    copies = [(i, 100 * image_ids[i] + c) for i, weight in enumerate(weights) for c in range(weight)]
    data = dataset(
        [images[i][0] for i, _ in copies], names=("a", "b", "c"), ids=IDS, image_ids=[new for _, new in copies]
    )
    results = [
        result(new, IDS[k], box, ranked[i, n]) for i, new in copies for n, (box, k, _) in enumerate(images[i][1])
    ]
    return evaluation.evaluate_coco(data, results)


@property_test(
    100, st.data(), st.lists(st.tuples(OBJECTS, GUESSES), min_size=1, max_size=4), st.permutations([5, 2, 9, 11])
)
def test_equals_images_really_repeated(data, images, image_ids):
    weights = np.array(
        data.draw(
            st.lists(st.lists(st.integers(0, 3), min_size=len(images), max_size=len(images)), min_size=3, max_size=3)
        )
    )
    weights[weights.sum(axis=1) == 0] = 1
    whole = dataset([objects for objects, _ in images], names=("a", "b", "c"), ids=IDS, image_ids=image_ids)
    results = [result(image_ids[i], IDS[k], box, score) for i, (_, own) in enumerate(images) for box, k, score in own]
    resampled = resample_metrics(whole, results, np.array([np.ones(len(images), int), *weights], dtype=np.int16))
    itself = evaluation.evaluate_coco(whole, results)
    for column, expected in enumerate([itself, *(repeated(images, image_ids, row) for row in weights)]):
        assert resampled.metrics[:, column] == pytest.approx(
            [expected[name] for name in METRICS], abs=1e-12, nan_ok=True
        )
        assert resampled.classes[:, column] == pytest.approx(
            [row["AP"] for row in expected["classes"]], abs=1e-12, nan_ok=True
        )


@pytest.mark.parametrize("block", [1, 50, 1 << 19])
def test_blocks_do_not_matter(monkeypatch, block):
    data, a, b, _ = draw(np.random.default_rng(0), 40)
    whole = evaluation.paired_bootstrap(data, a, b, resamples=30)
    monkeypatch.setattr("fusedet.evaluation.bootstrap.BLOCK", block)
    resampled = evaluation.paired_bootstrap(data, a, b, resamples=30)
    for name in METRICS:
        assert resampled[name] == pytest.approx(whole[name], abs=1e-12, nan_ok=True)


def test_form_and_seed():
    data, a, b, _ = draw(np.random.default_rng(0), 40)
    resampled = evaluation.paired_bootstrap(data, a, b, resamples=50)
    assert list(resampled) == [*METRICS, "classes"]
    for row in (resampled["AP"], resampled["classes"][0]):
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        assert row["low"] < row["difference"] < row["high"]
    assert resampled["AP"]["a"] == pytest.approx(evaluation.evaluate_coco(data, a)["AP"])
    assert resampled["AP"] == evaluation.paired_bootstrap(data, a, b, resamples=50)["AP"]
    assert resampled["AP"] != evaluation.paired_bootstrap(data, a, b, resamples=50, seed=1)["AP"]
    back = evaluation.paired_bootstrap(data, b, a, resamples=50)["AP"]
    assert (back["low"], back["high"]) == pytest.approx((-resampled["AP"]["high"], -resampled["AP"]["low"]))
    same = evaluation.paired_bootstrap(data, a, a, resamples=50)["AP"]
    assert same["low"] == same["high"] == 0, "the same resample for both"


def test_drawn_images():
    weights = draw_image_weights(30, 2000, 3)
    assert (weights[0] == 1).all()
    assert (weights.sum(axis=1) == 30).all()
    # each count is binomial (30, 1/30): its mean 1, its variance 29/30
    assert weights[1:].mean(axis=0) == pytest.approx(1, abs=0.12)
    assert weights[1:].var() == pytest.approx(29 / 30, rel=0.05)
    for wrong in ((0, 10, 0), (10, 0, 0), (10, 10, -1)):
        with pytest.raises(InputError, match="a bootstrap needs"):
            draw_image_weights(*wrong)
    data, a, _, _ = draw(np.random.default_rng(0), 5)
    with pytest.raises(InputError, match=r"weights must be \(resamples, 5\)"):
        resample_metrics(data, a, np.ones((2, 4), np.int16))


def test_mean_over_seeds():
    one, two = (ResampledMetrics(METRICS, np.full((6, 3), v), np.full((2, 3), v), 9) for v in (0.2, 0.4))
    resampled = compute_difference(average_runs([one, two]), two, ["x", "y"])
    assert resampled["AP50"] == pytest.approx({"a": 0.3, "b": 0.4, "difference": 0.1, "low": 0.1, "high": 0.1})
    assert [row["name"] for row in resampled["classes"]] == ["x", "y"]


# -- coverage


HIT_A, HIT_B, SPREAD, FALSE_A, FALSE_B = 0.6, 0.68, 0.2, 1.0, 0.8


def expected(hit, false, objects=2.0):
    """Compute the AP on endless data.

    A share `hit` of the objects is detected exactly, at scores sqrt(U); each image has `false` false positives, at
    1 - sqrt(U). True positives above a score s are hit (1 - s²) of the objects, false ones false (1 - s)² per image.
    """
    recall = np.linspace(0, 1, 101)[1:]  # at recall 0 the precision of the best scores, 1
    right = recall[recall <= hit]
    s = np.sqrt(1 - right / hit)
    precision = objects * right / (objects * right + false * (1 - s) ** 2)
    return (1 + precision.sum()) / 101


def draw(rng, count):
    """DetectionDataset of `count` images of one class, two runs' detections, and the true difference of their AP.

    An image has 1 to 3 objects and is easy or hard for both runs; the better run detects every object that the worse
    one detects.
    """
    each = rng.integers(1, 4, count)
    image_indices = np.repeat(np.arange(count), each)
    first = 50.0 * (np.arange(len(image_indices)) - np.repeat(np.cumsum(each) - each, each))
    boxes = np.stack([first, 0 * first, first + 40, 0 * first + 40], axis=1)
    data = DetectionDataset.from_arrays(
        ["a"],
        [1],
        image_ids=np.arange(1, count + 1),
        sizes=np.full((count, 2), 200),
        paths=["x"] * count,
        image_indices=image_indices,
        boxes=boxes,
        labels=0 * image_indices,
        ignore=image_indices < 0,
        eval_ignore=image_indices < 0,
        area=np.full(len(image_indices), 1600.0),
        segmentations=[b""] * len(image_indices),
        source="drawn",
        dataset_format="coco",
    )
    chance = rng.random(len(image_indices)) + rng.choice([-SPREAD, SPREAD], count)[image_indices]
    runs = []
    for hit, false in ((HIT_A, FALSE_A), (HIT_B, FALSE_B)):
        right, wrong = np.flatnonzero(chance < hit), np.repeat(np.arange(count), rng.poisson(false, count))
        corners = np.concatenate(
            [boxes[right] - [0, 0, 1, 0] * first[right, None], np.tile([0.0, 100, 30, 30], (len(wrong), 1))]
        )
        scores = np.concatenate([np.sqrt(rng.random(len(right))), 1 - np.sqrt(rng.random(len(wrong)))])
        runs.append(
            DetectionTable(np.concatenate([image_indices[right], wrong]), np.zeros(len(scores), int), scores, corners)
        )
    return data, *runs, expected(HIT_B, FALSE_B) - expected(HIT_A, FALSE_A)


def test_expected_precision_is_that_of_much_data():
    data, a, b, _ = draw(np.random.default_rng(1), 6000)
    assert evaluation.evaluate_coco(data, a)["AP"] == pytest.approx(expected(HIT_A, FALSE_A), abs=0.015)
    assert evaluation.evaluate_coco(data, b)["AP"] == pytest.approx(expected(HIT_B, FALSE_B), abs=0.015)


@pytest.mark.slow
def test_interval_covers_as_often_as_it_says():
    """95 % of the intervals, give or take 2, hold the difference that is true of all images."""
    rng, held, sizes = np.random.default_rng(0), 0, 500
    for i in range(sizes):
        data, a, b, true = draw(rng, 80)
        row = evaluation.paired_bootstrap(data, a, b, resamples=99, seed=i)["AP"]
        held += row["low"] <= true <= row["high"]
    assert 0.93 <= held / sizes <= 0.97


# -- over seeds


@pytest.mark.parametrize(
    ("freedom", "p90", "p95", "p975", "p995"),  # the table printed in every textbook
    [
        (1, 3.078, 6.314, 12.706, 63.657),
        (2, 1.886, 2.920, 4.303, 9.925),
        (3, 1.638, 2.353, 3.182, 5.841),
        (4, 1.533, 2.132, 2.776, 4.604),
        (9, 1.383, 1.833, 2.262, 3.250),
        (30, 1.310, 1.697, 2.042, 2.750),
        (120, 1.289, 1.658, 1.980, 2.617),
    ],
)
def test_t_table(freedom, p90, p95, p975, p995):
    assert [t_quantile(p, freedom) for p in (0.9, 0.95, 0.975, 0.995)] == pytest.approx(
        [p90, p95, p975, p995], abs=5.1e-4
    )
    assert t_quantile(0.025, freedom) == -t_quantile(0.975, freedom)


def test_t_in_closed_form():
    for p in (0.6, 0.9, 0.975, 0.9999):
        assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-10)
        assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-10)
        assert t_quantile(p, 1e7) == pytest.approx(NormalDist().inv_cdf(p), rel=1e-5)
    assert t_quantile(0.975, 2) > t_quantile(0.975, 2.5) > t_quantile(0.975, 3), "degrees of freedom need not be whole"
    assert t_quantile(0.5, 7) == pytest.approx(0, abs=1e-6)
    for p, freedom in ((0, 3), (1, 3), (0.5, 0)):
        with pytest.raises(InputError, match="a t quantile needs"):
            t_quantile(p, freedom)


def test_interval_over_seeds_by_hand():
    # mean 3, variance 1, of the mean 1/3; t of 2 degrees 4.3027
    assert evaluation.compute_seed_interval([2, 3, 4]) == pytest.approx(
        (3, 3 - 4.30265 / math.sqrt(3), 3 + 4.30265 / math.sqrt(3)), abs=1e-4
    )
    assert evaluation.compute_seed_interval([0.3]) == pytest.approx((0.3, math.nan, math.nan), nan_ok=True)
    assert evaluation.compute_seed_interval([0.3, 0.3]) == (0.3, 0.3, 0.3)
    with pytest.raises(InputError, match="at least one value"):
        evaluation.compute_seed_interval([])


def test_difference_over_seeds_by_hand():
    a, b = [2.0, 3.0, 4.0], [3.0, 5.0, 7.0]
    # paired: differences 1, 2, 3
    assert evaluation.compute_seed_difference(a, b, paired=True) == evaluation.compute_seed_interval([1, 2, 3])
    # Welch: squared error 1/3 + 4/3, degrees (5/3)² / ((1/3)² / 2 + (4/3)² / 2) = 50/17;
    value, low, high = evaluation.compute_seed_difference(a, b, paired=False)
    assert value == 2
    assert (high - low) / 2 == pytest.approx(t_quantile(0.975, 50 / 17) * math.sqrt(5 / 3))
    assert math.isnan(evaluation.compute_seed_difference([1.0], b, paired=False).low)
    assert evaluation.compute_seed_difference([1.0, 1.0], [2.0, 2.0], paired=False) == (1, 1, 1)
    with pytest.raises(InputError, match="equal number, they are 3 and 2"):
        evaluation.compute_seed_difference(a, b[:2], paired=True)
    with pytest.raises(InputError, match="each side"):
        evaluation.compute_seed_difference([], b, paired=False)


@pytest.mark.parametrize("paired", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_interval_over_seeds_covers_as_often_as_it_says(paired):
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.3, 0.01, (400, 3)), rng.normal(0.32, 0.02, (400, 3))
    held = sum(
        low <= 0.02 <= high
        for _, low, high in (
            evaluation.compute_seed_difference(x, y, paired=paired) for x, y in zip(a.tolist(), b.tolist(), strict=True)
        )
    )
    assert 0.92 <= held / 400 <= 0.99, "Welch's interval of three seeds a side is a little too wide"


def test_percentiles():
    values = np.array([np.arange(39.0)[::-1], np.full(39, np.nan)])
    # of very many items: of 39 values the first and the last, beyond which a further one lies with probability 1 / 40
    # on each side
    low, high = compute_percentile_interval(values, 10**9)
    assert (low[0], high[0]) == pytest.approx((0, 38), abs=1e-6)
    assert np.isnan([low[1], high[1]]).all()
    assert compute_percentile_interval(np.append(np.arange(39.0), np.nan), 10**9) == pytest.approx((0, 38), abs=1e-6)
    # of five: 2.7764 sqrt(5 / 4) = 3.1042 standard deviations, the 0.000954th part a side
    normal = np.array([NormalDist().inv_cdf(p) for p in np.arange(1, 10**5) / 10**5])
    assert compute_percentile_interval(normal, 5) == pytest.approx((-3.1042, 3.1042), abs=1e-3)
    assert np.isnan(compute_percentile_interval(normal, 1)).all(), "one image has no interval"


@pytest.mark.parametrize("count", [5, 20])
def test_interval_of_a_mean_of_few(count):
    """Of normally distributed items the interval is Student's, up to the chance of the resamples."""
    rng = np.random.default_rng(0)
    items = rng.normal(size=count)
    low, high = compute_percentile_interval((draw_image_weights(count, 20000, 0)[1:] * items).mean(axis=1), count)
    value, left, right = evaluation.compute_seed_interval(items.tolist())
    assert (high - low) / (right - left) == pytest.approx(1, abs=0.1)
    assert (high + low) / 2 == pytest.approx(value, abs=0.1)
