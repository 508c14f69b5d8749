"""Time and peak memory of the paired bootstrap of two runs on synthetic COCO-like detections.

From the two runs' results in memory to every metric's interval, classes included. Prints one JSON object.
Usage: python benchmarks/bootstrap.py [--images 5000] [--detections 500000] [--resamples 1000] [--repeats 1]
"""

from __future__ import annotations

import argparse
import time

from common import print_report
from evaluate import dataset, detections

from fusedet.api.timing import read_peak_memory
from fusedet.evaluation import evaluate_coco, paired_bootstrap


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=500_000, help="Of each run.")
    parser.add_argument("--objects", type=int, default=36_000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    data = dataset(options.images, options.objects, 0)
    a, b = (detections(data, options.detections, seed) for seed in (0, 1))
    before, wall, cpu = read_peak_memory(), [], []
    for _ in range(options.repeats):
        began = time.perf_counter(), time.process_time()
        metrics = paired_bootstrap(data, a, b, resamples=options.resamples)
        wall.append(round(time.perf_counter() - began[0], 1))
        cpu.append(round(time.process_time() - began[1], 1))
    own = [evaluate_coco(data, run, per_class=False)["AP"] for run in (a, b)]
    print_report(
        benchmark="bootstrap",
        images=options.images,
        detections=[len(a), len(b)],
        objects=options.objects,
        classes=len(data.names),
        resamples=options.resamples,
        seconds=wall,
        processor_seconds=cpu,
        grown_mib=round(read_peak_memory() - before),
        AP=metrics["AP"],
        differs_from_coco=max(abs(metrics["AP"][side] - value) for side, value in zip("ab", own, strict=True)),
    )


if __name__ == "__main__":
    main()
