"""Time and peak memory of evaluation: fusedet and the packages for COCO metrics on synthetic COCO-like detections.

Each measurement is a separate process, from the results in memory to all metrics with every class; the evaluators
take turns. hotcoco and vernier[tables] take part where they are installed. Processor seconds are those of all threads.
Prints one JSON object.

Usage: python benchmarks/evaluate.py [--images 5000] [--detections 500000] [--repeats 2]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import print_report

from fusedet import evaluation
from fusedet.api.timing import read_peak_memory, time_call
from fusedet.data.dataset import DetectionDataset, ImageAnnotations

CLASSES, HEIGHT, WIDTH = 80, 480, 640
OPTIONAL = ("hotcoco", "vernier")
SIDES = [
    "fusedet",
    "faster-coco-eval",
    "pycocotools",
    *(name for name in OPTIONAL if importlib.util.find_spec(name)),
]
"""All but fusedet are used as their documentation shows."""


def dataset(images: int, objects: int, seed: int) -> DetectionDataset:
    """Make images with instances of 80 frequent and rare classes, of log-uniform size, 1 % of them crowds."""
    rng = np.random.default_rng(seed)
    image_indices = np.sort(rng.integers(0, images, objects))
    share = 1 / np.arange(1, CLASSES + 1)
    labels = rng.choice(CLASSES, objects, p=share / share.sum())
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (objects, 2)))
    first = rng.uniform(size=(objects, 2)) * np.maximum([WIDTH, HEIGHT] - sides, 1)
    boxes = np.concatenate([first, first + sides], axis=1).round(2)
    crowd = rng.uniform(size=objects) < 0.01
    edges = np.searchsorted(image_indices, np.arange(images + 1))

    def one(i: int) -> ImageAnnotations:
        own = slice(edges[i], edges[i + 1])
        area = (boxes[own, 2:] - boxes[own, :2]).prod(axis=1) * 0.6
        nothing = [None] * (edges[i + 1] - edges[i])
        return ImageAnnotations(
            3 * i + 1, Path(f"{i}.jpg"), HEIGHT, WIDTH, boxes[own], labels[own], crowd[own], area, nothing, crowd[own]
        )

    names = [f"class {k}" for k in range(CLASSES)]
    return DetectionDataset.build(
        names,
        (k + k // 10 + 1 for k in range(CLASSES)),
        map(one, range(images)),
        source="generated",
        dataset_format="coco",
    )


def detections(data: DetectionDataset, count: int, seed: int) -> list[dict]:
    """Make results: half around instances, the rest anywhere and mostly of low score; the same number per image."""
    rng = np.random.default_rng(seed + 1)
    each = count // len(data)
    results = []
    for record in data:
        near = np.arange(each) < (each // 2 if len(record.boxes) else 0)
        boxes = np.concatenate([rng.uniform(0, 400, (each, 2)), np.exp(rng.uniform(2, 6, (each, 2)))], axis=1)
        labels = rng.integers(0, CLASSES, each)
        scores = rng.beta(1, 12, each)
        if near.any():
            of = rng.integers(0, len(record.boxes), near.sum())
            corners, spread = record.boxes[of], rng.uniform(0.02, 0.25, (len(of), 1))
            sides = corners[:, 2:] - corners[:, :2]
            boxes[near] = (
                np.concatenate([corners[:, :2], sides], axis=1)
                + rng.normal(size=(len(of), 4)) * spread * sides[:, [0, 1, 0, 1]]
            )
            boxes[:, 2:] = np.abs(boxes[:, 2:])
            labels[near] = np.where(rng.uniform(size=len(of)) < 0.8, record.labels[of], labels[near])
            scores[near] = rng.beta(2, 2, len(of)) * (1 - spread[:, 0])
        rows = zip(boxes.round(2).tolist(), labels.tolist(), scores.round(4).tolist(), strict=True)
        results += [
            {"image_id": record.image_id, "category_id": data.category_ids[k], "bbox": box, "score": score}
            for box, k, score in rows
        ]
    return results


def measure(evaluator: str, images: int, count: int, objects: int, seed: int) -> None:
    """Evaluate once in this process and print seconds, the growth of the peak memory in MiB, and the metrics."""
    data = dataset(images, objects, seed)
    results = detections(data, count, seed)
    evaluate = EVALUATE.get(evaluator, partial(evaluate_with_cocoeval, evaluator))
    few = dataset(2, 20, seed)
    evaluate(build_truth(evaluator, few), detections(few, 20, seed))  # so that imports are not measured
    truth = build_truth(evaluator, data)
    before = read_peak_memory()
    metrics, span = time_call(partial(evaluate, truth, results))
    memory = {"peak_mib": read_peak_memory(), "grown_mib": read_peak_memory() - before}
    print(json.dumps({"seconds": span.wall, "processor_seconds": span.processor, **memory, "metrics": metrics}))


def build_truth(evaluator: str, data: DetectionDataset) -> Any:
    """Return the ground truth as the evaluator takes it."""
    if evaluator == "fusedet":
        return data
    truth = evaluation.build_coco_ground_truth(data, masks=False)
    return json.dumps(truth).encode() if evaluator == "vernier" else truth


def evaluate_with_fusedet(data: DetectionDataset, results: list[dict]) -> list[float]:
    """Compute the twelve metrics and the classes' AP."""
    metrics = evaluation.evaluate_coco(data, results)
    return [metrics[name] for name in list(metrics)[:12]] + [row["AP"] for row in metrics["classes"]]


def evaluate_with_vernier(truth: bytes, results: list[dict]) -> list[float]:
    """Compute the same with pycocotools' rules; the ground truth is JSON text, which vernier reads."""
    from vernier.instance import Bbox, CocoDataset, Evaluator

    gold = CocoDataset.from_json(truth)
    done = Evaluator(iou=Bbox(), parity_mode="strict").evaluate(gold, results, tables=("per_class",))
    rows = done.per_class
    rows = rows if "ap" in rows.columns else rows.unnest(rows.columns)  # polars may read the table as one column
    return [*done.summary.stats, *(float("nan") if ap is None else ap for ap in rows["ap"])]


def evaluate_with_cocoeval(package: str, truth: dict, results: list[dict]) -> list[float]:
    """Compute the same with a package that has pycocotools' interface."""
    if package == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    elif package == "hotcoco":
        from hotcoco import COCO, COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    with contextlib.redirect_stdout(io.StringIO()):
        gold = COCO()
        gold.dataset = truth
        gold.createIndex()
        run = COCOeval(gold, gold.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    precision = run.eval["precision"][..., 0, -1]
    own = (precision[:, :, k] for k in range(precision.shape[2]))
    return [
        *(float(v) for v in run.stats[:12]),
        *(float(p[p > -1].mean()) if (p > -1).any() else float("nan") for p in own),
    ]


EVALUATE = {"fusedet": evaluate_with_fusedet, "vernier": evaluate_with_vernier}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--detections", type=int, default=500_000)
    parser.add_argument("--objects", type=int, default=36_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--evaluators", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--one", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.images, options.detections, options.objects, options.seed)
    if options.one:
        return measure(options.one, *sizes)

    runs: dict[str, list[dict]] = {name: [] for name in options.evaluators}
    command = [sys.executable, __file__, "--images", "--detections", "--objects", "--seed"]
    command = command[:2] + [word for pair in zip(command[2:], map(str, sizes), strict=True) for word in pair]
    for _ in range(options.repeats):
        for name, done in runs.items():
            done.append(
                json.loads(subprocess.run([*command, "--one", name], check=True, capture_output=True, text=True).stdout)
            )
    metrics = {
        "images": options.images,
        "detections": options.detections // options.images * options.images,
        "objects": options.objects,
        "repeats": options.repeats,
        "evaluators": {
            name: {
                "seconds": [round(run["seconds"], 3) for run in done],
                **{
                    f"median_{key}": round(statistics.median(run[key] for run in done), 3)
                    for key in ("seconds", "processor_seconds")
                },
                "peak_mib": round(max(run["peak_mib"] for run in done)),
                "grown_mib": round(max(run["grown_mib"] for run in done)),
                "AP": done[0]["metrics"][0],
            }
            for name, done in runs.items()
        },
    }
    if "fusedet" in runs:
        own = metrics["evaluators"]["fusedet"]
        for name in [name for name in runs if name != "fusedet"]:
            other = metrics["evaluators"][name]
            metrics[f"fusedet_over_{name}"] = {
                "times_as_fast": round(other["median_seconds"] / own["median_seconds"], 2),
                "processor": round(other["median_processor_seconds"] / own["median_processor_seconds"], 2),
                "memory": round(own["peak_mib"] / other["peak_mib"], 3),
                "largest_difference": _difference(runs["fusedet"][0]["metrics"], runs[name][0]["metrics"]),
            }
    print_report(benchmark="evaluate", **metrics)


def _difference(a: list[float], b: list[float]) -> float:
    """Return the largest difference of two sets of metrics, classes included."""
    return float(np.nanmax(np.abs(np.array(a) - np.array(b))))


if __name__ == "__main__":
    main()
