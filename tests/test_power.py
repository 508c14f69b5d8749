"""Power of an ablation: against simulated tables that are judged by the real intervals, and from finished runs."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import fusedet
from fusedet import cli, evaluation
from fusedet.ablation import power, summary, summary_text
from fusedet.ablation.power import Noise
from fusedet.errors import InputError
from fusedet.evaluation.bootstrap import METRICS, ResampledMetrics, average_runs, compute_difference, draw_image_weights
from test_ablate_rows import finish_runs, make_plan, make_results

SEED_NOISE, IMAGE_NOISE, SHARED_NOISE = 0.6, 9.0, 30.0  # percent: of a run; of a run and an image; of an image


def simulate_runs(rng, mean, seeds, images, shared, weights):
    """Runs whose metric is a mean over images: of the run, of the image and of both (in percent)."""
    values = mean + rng.normal(0, SEED_NOISE, (seeds, 1)) + shared + rng.normal(0, IMAGE_NOISE, (seeds, images))
    means = values @ weights.T / images / 100  # (seeds, resamples)
    return [ResampledMetrics(METRICS, np.tile(row, (6, 1)), row[None], images) for row in means]


def simulate_power(seeds, images, effect, tables):
    """The share of tables that conclude "higher": by Welch's interval and by the paired bootstrap."""
    rng, weights, concluded = np.random.default_rng(3), draw_image_weights(images, 120, 0), 0
    for _ in range(tables):
        shared = rng.normal(0, SHARED_NOISE, images)
        a, b = (simulate_runs(rng, mean, seeds, images, shared, weights) for mean in (30, 30 + effect))
        over_images = compute_difference(average_runs(a), average_runs(b), ["x"])["AP"]
        values = [[run.metrics[0, 0] for run in side] for side in (a, b)]
        concluded += over_images["low"] > 0 and evaluation.compute_seed_difference(*values, paired=False).low > 0
    return concluded / tables


def measure(runs, images):
    rng = np.random.default_rng(5)
    shared, weights = rng.normal(0, SHARED_NOISE, images), draw_image_weights(images, 200, 0)
    noise = power.measure_noise(simulate_runs(rng, 30, runs, images, shared, weights), "AP")
    assert noise is not None
    return noise


def test_noise_is_measured():
    noise = measure(60, 400)
    assert noise.over_images == pytest.approx(math.hypot(IMAGE_NOISE, SHARED_NOISE) / 20, rel=0.1)
    assert noise.of_pairs == pytest.approx(math.sqrt(2) * IMAGE_NOISE / 20, rel=0.1)
    assert noise.between_seeds == pytest.approx(math.hypot(SEED_NOISE, IMAGE_NOISE / 20), rel=0.2)
    assert math.sqrt(noise.lasting) == pytest.approx(SEED_NOISE, rel=0.25)
    one = measure(1, 400)
    assert (one.between_seeds, one.of_pairs) == (None, None)
    assert one.passing(400) == pytest.approx(one.over_images**2)
    assert one.passing(1600) == pytest.approx(one.over_images**2 / 4)


def true_noise(images):
    """The noise of `simulate_runs`."""
    own = IMAGE_NOISE / math.sqrt(images)
    return Noise(2, images, math.hypot(SEED_NOISE, own), math.hypot(own, SHARED_NOISE), math.sqrt(2) * own)


@pytest.mark.slow
@pytest.mark.parametrize(("images", "tables"), [(150, 500), (600, 500)])
def test_simulated_tables_have_the_predicted_power(images, tables):
    """The predicted number of seeds holds within 20 %: 0.8 times as many see +1 less often, 1.2 times more often."""
    noise = true_noise(images)
    needed = power.count_needed_seeds(noise, images)
    assert 5 <= needed <= 20
    error = 3 * math.sqrt(0.8 * 0.2 / tables)
    predicted = power.compute_power(noise, needed, images)
    assert simulate_power(needed, images, 1.0, tables) == pytest.approx(predicted, abs=error)
    assert simulate_power(math.floor(0.8 * needed), images, 1.0, tables) < power.TARGET
    assert simulate_power(math.ceil(1.2 * needed), images, 1.0, tables) > power.TARGET


@pytest.mark.slow
def test_simulated_tables_need_the_predicted_images():
    """The predicted number of images holds within 20 % too, for many seeds, where it is the images that count."""
    needed = power.count_needed_images(true_noise(100), seeds=30)
    assert 30 <= needed <= 90
    assert simulate_power(30, math.floor(0.8 * needed), 1.0, 500) < power.TARGET
    assert simulate_power(30, math.ceil(1.2 * needed), 1.0, 500) > power.TARGET


def test_images_and_differences_answer_the_same_question():
    noise = Noise(2, 100, 0.9, 3.0, 1.2)
    images = power.count_needed_images(noise, 5)
    assert power.compute_power(noise, 5, images) == pytest.approx(power.TARGET, abs=0.01)
    visible = power.compute_visible_difference(noise, 5)
    assert power.compute_power(noise, 5, 100, visible) == pytest.approx(power.TARGET, abs=0.02)
    assert power.count_needed_images(Noise(2, 100, 3.0, 3.0, 0.1), 3) is None, "more images do not help"
    assert power.count_needed_seeds(Noise(2, 100, 9.0, 3.0, 0.1), 100) is None
    assert power.compute_visible_difference(Noise(2, 100, 40.0, 3.0, 0.1), 2) is None
    equal = Noise(2, 100, 0.0, 3.0, 0.0)  # two runs of equal detections
    assert (power.count_needed_seeds(equal, 100), power.count_needed_images(equal, 2)) == (2, 2)
    assert power.compute_visible_difference(equal, 2) <= 0.001


def test_no_power_is_stated_of_a_row_with_one_seed():
    rng, shared, weights = np.random.default_rng(3), np.zeros(50), draw_image_weights(50, 40, 0)
    samples = {label: simulate_runs(rng, 30, seeds, 50, shared, weights) for label, seeds in (("a", 3), ("b", 1))}
    table = SimpleNamespace(metric="AP")
    plan = SimpleNamespace(table=table, runs_of={"a": "a", "b": "b"}, reference={"b": "a"}.get)
    noise = summary._describe_noise(plan, "a", samples)
    assert (noise["runs"], noise["seeds"], noise["power"], noise["visible_difference"]) == (3, 1, None, None)
    facts = {"data": {"val": {"images": 50, "source": "x"}}, "level": 0.95, "resampled": True, "resamples": 40}
    facts |= {"metric": "AP", "baseline": "a", "best_weights": False, "rows": [{"label": "a", "noise": noise}]}
    assert not [line for line in summary_text.describe_coverage(facts) if "Power" in line]


TABLE = """
base: retinanet_tiny
overrides:
  ["data.size=[64,96]", "test.size_bins=[4,16,64]", model.pyramid.channels=16, model.head.norm=false,
   model.backbone.name=test_resnet]
rows:
  - {label: plain}
  - {label: more, overrides: [train.lr=0.5]}
"""


def test_power_of_finished_runs(scenes, tmp_path, capsys):
    plan = make_plan(tmp_path, TABLE, scenes, seeds=2)
    arguments = [str(tmp_path / "mine.yaml"), f"data={scenes}", "device=cpu", f"out={plan.out}"]
    quiet = {"say": lambda text: None, "seeds": 2, "resamples": 40}
    with pytest.raises(InputError, match=r"no finished run of the baseline 'plain'.*--rows 'plain' --seeds 2"):
        fusedet.estimate_power(*arguments, **quiet)
    finish_runs(plan, lambda run: make_results(plan.val, 0.2 + 0.2 * run.seed, 0.2))
    estimate = fusedet.estimate_power(*arguments, **quiet)
    assert (estimate.baseline, estimate.noise.runs, estimate.noise.images) == ("plain", 2, len(plan.val))
    assert estimate.to_dict()["probability"] == power.TARGET
    assert "to conclude +1 with a probability of 80 %" in str(estimate)
    one = fusedet.estimate_power(*arguments, **quiet | {"seeds": 1})
    assert one.noise == replace(one.noise, runs=1, between_seeds=None)
    assert "0.4 assumed" in str(one)
    capsys.readouterr()
    assert cli.run(["ablate", *arguments, "--power", "--seeds", "2", "--resamples", "40", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(estimate.to_json())
    assert cli.run(["ablate", *arguments, "--power", "--rows", "more"]) == 2
    assert "--power does not use --rows" in capsys.readouterr().err
