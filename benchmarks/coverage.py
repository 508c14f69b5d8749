"""Coverage of the bootstrap's intervals of a difference of AP, by the number of images.

Two runs of known difference are simulated on new images each time, as in tests/test_bootstrap.py. fusedet's interval is
compared with others from the same resamples, and with that of hotcoco on the same datasets where it is installed (pip
install hotcoco). Prints one JSON object.
Usage: python benchmarks/coverage.py [--images 20 50 100 200] [--datasets 2000] [--resamples 199]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from common import print_report

from fusedet import evaluation
from fusedet.data.dataset import DetectionDataset
from fusedet.evaluation.bootstrap import _average_precision, draw_image_weights
from fusedet.evaluation.confidence_intervals import compute_percentile_interval
from fusedet.evaluation.results import DetectionTable

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_bootstrap import draw

MANY = 10**9  # images, for which the interval is that of plain percentiles


def resampled_ap(run: DetectionTable, image_indices: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Compute AP of a run on each resample without matching: a detection in the upper row is a true positive."""
    order = np.argsort(-run.scores, kind="stable")
    hit = (run.boxes[order, 1] == 0)[None]
    return _average_precision(
        weights, run.images[order], np.ones(len(order), bool), hit, np.zeros_like(hit), image_indices
    )[0]


def compute_hotcoco_interval(
    data: DetectionDataset, runs: Sequence[DetectionTable], resamples: int, seed: int
) -> tuple[float, float]:
    """Compute the 95 % interval of the difference of AP with `hotcoco.compare`."""
    hotcoco = import_module("hotcoco")
    ground_truth = hotcoco.COCO(evaluation.build_coco_ground_truth(data, masks=False))
    evaluators = []
    for run in runs:
        rows = zip(run.images.tolist(), run.boxes.tolist(), run.scores.tolist())
        results = [{"image_id": i + 1, "category_id": 1, "bbox": box, "score": score} for i, box, score in rows]
        evaluators.append(hotcoco.COCOeval(ground_truth, ground_truth.load_res(results), "bbox"))
        evaluators[-1].evaluate()
    ends = hotcoco.compare(*evaluators, n_bootstrap=resamples, seed=seed)["ci"]["AP"]
    return ends["lower"], ends["upper"]


def measure_coverage(images: int, sets: int, resamples: int) -> dict[str, float]:
    """Compute the fraction of `sets` datasets whose interval contains the true value, for each kind of interval."""
    rng = np.random.default_rng(7)
    others = ("hotcoco",) if find_spec("hotcoco") else ()
    covered = dict.fromkeys(("fusedet", "percentile", "basic", "normal", *others), 0)
    for i in range(sets):
        data, a, b, true = draw(rng, images)
        image_indices = np.repeat(np.arange(images), np.diff(data.offsets.numpy()))
        weights = draw_image_weights(images, resamples, i)
        change = resampled_ap(b, image_indices, weights) - resampled_ap(a, image_indices, weights)
        here, spread = change[0], 1.96 * change[1:].std(ddof=1)
        low, high = compute_percentile_interval(change[1:], MANY)
        ends = {
            "fusedet": compute_percentile_interval(change[1:], images),
            "percentile": (low, high),
            "basic": (2 * here - high, 2 * here - low),
            "normal": (here - spread, here + spread),
        }
        ends |= {name: compute_hotcoco_interval(data, (a, b), resamples, i) for name in others}
        for name, (left, right) in ends.items():
            covered[name] += int(left <= true <= right)
    return {name: round(count / sets, 4) for name, count in covered.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[20, 50, 100, 200])
    parser.add_argument("--datasets", type=int, default=2000)
    parser.add_argument("--resamples", type=int, default=199)
    options = parser.parse_args()
    coverage = {n: measure_coverage(n, options.datasets, options.resamples) for n in options.images}
    print_report(
        benchmark="coverage",
        datasets=options.datasets,
        resamples=options.resamples,
        level=0.95,
        coverage=coverage,
        hotcoco=version("hotcoco") if find_spec("hotcoco") else None,
    )


if __name__ == "__main__":
    main()
