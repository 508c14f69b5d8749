"""Train every detector from scratch on the demo's images, with the same backbone, size, recipe and number of epochs.

Prints a JSON line per detector, then a table; exits with 1 if a detector stays below its required AP50. Finished runs
are kept, interrupted ones are resumed. Seconds are those of the training steps.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedet import config
from fusedet.api.train import train
from fusedet.config import Config
from fusedet.data.synthetic import generate_dataset
from fusedet.errors import InputError

IMAGES, SEED = 800, 0  # as `fusedet demo`
COMMON = [
    "model.backbone.name=regnetx_002",
    "data.size=[256,256]",
    "data.workers=0",
    "train.epochs=5",
    "train.validate_every=5",
    f"train.seed={SEED}",
]

LEAST = {
    "retinanet": {"AP50": 0.73},
    "fcos": {"AP50": 0.58},
    "vfnet": {"AP50": 0.69},
    "reppoints": {"AP50": 0.75},
    "atss": {"AP50": 0.71},
    "gfl": {"AP50": 0.69},
    "gflv2": {"AP50": 0.72},
    "paa": {"AP50": 0.68},
    "tood": {"AP50": 0.71},
    "ddod": {"AP50": 0.68},
    "freeanchor": {"AP50": 0.78},
    "foveabox": {"AP50": 0.68},
    "fsaf": {"AP50": 0.71},
    "autoassign": {"AP50": 0.75},
    "yolof": {"AP50": 0.32},
    "ota": {"AP50": 0.56},
    "dw": {"AP50": 0.66},
    "borderdet": {"AP50": 0.63},
    "faster_rcnn": {"AP50": 0.83},
    "mask_rcnn": {"AP50": 0.83, "mask_AP50": 0.83},
    "cascade_rcnn": {"AP50": 0.84},
    "dynamic_rcnn": {"AP50": 0.82},
    "grid_rcnn": {"AP50": 0.83},
    "libra_rcnn": {"AP50": 0.83},
    "double_head_rcnn": {"AP50": 0.83},
    "tridentnet": {"AP50": 0.52},
}
"""Required AP50 on the validation images: COCO's of boxes and, for detectors with masks, of masks."""


def recipe(name: str, data: Path, out: Path) -> Config:
    """Return the config of a detector's run."""
    return config.load(f"{name}_tiny", [*COMMON, f"data={data}", f"out={out / name}"])


def finished(name: str, data: Path, out: Path) -> bool:
    """Return whether a detector's run is complete. Raises InputError for a run of another recipe."""
    wanted, run = recipe(name, data, out), out / name
    if (run / "config.yaml").is_file():
        had = config.load(run / "config.yaml")
        if (had.model, had.train, had.test, had.data.size) != (
            wanted.model,
            wanted.train,
            wanted.test,
            wanted.data.size,
        ):
            raise InputError(f"{run} was trained with another recipe: remove it, or name another --out")
    return (run / "metrics.json").is_file()


def learn(name: str, data: Path, out: Path) -> str:
    """Train a detector, or resume its run; return its name."""
    train(recipe(name, data, out), resume=(out / name / "config.yaml").is_file(), say=lambda text: None, quiet=True)
    return name


def summarize_run(name: str, run: Path) -> dict[str, Any]:
    """Return a finished run's metrics, the seconds of its steps, and whether it passes."""
    batch = config.load(run / "config.yaml").train.batch
    scores = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    images, seconds, before = 0, 0.0, 0
    for row in csv.DictReader((run / "speed.csv").read_text().splitlines()):
        seen = batch * (int(row["step"]) - before)
        images, seconds, before = images + seen, seconds + seen / float(row["images_per_second"]), int(row["step"])
    results = {key: round(scores[key], 3) for key in ("AP", "AP50", "mask_AP", "mask_AP50") if key in scores}
    least = {f"least_{key}": value for key, value in LEAST[name].items()}
    reached = all(scores[key] >= value for key, value in LEAST[name].items())
    pace = {"seconds": round(seconds), "images_per_second": round(images / seconds, 1)}
    return {"detector": name, **results, **least, "reached": reached, **pace}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the metrics as Markdown."""
    keys = ("AP", "AP50", "least_AP50", "mask_AP50", "least_mask_AP50")
    lines = [
        "| detector | AP | AP50 | at least | mask AP50 | at least | minutes | images/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [f"{row[key]:.3f}" if key in row else "" for key in keys]
        cells += [f"{row['seconds'] / 60:.1f}", str(row["images_per_second"])]
        lines.append(f"| `{row['detector']}_tiny` | {' | '.join(cells)} |")
    return "\n".join(lines)


def runs(names: Sequence[str], data: Path, out: Path, beside: int) -> Iterator[str]:
    """Yield each detector's name when its run is finished; `beside` processes train at a time and divide the cores."""
    waiting = [name for name in names if not finished(name, data, out)]
    yield from (name for name in names if name not in waiting)
    threads = max(1, (os.cpu_count() or 1) // beside)
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(beside, len(waiting)) or 1, torch.set_num_threads, (threads,), maxtasksperchild=1) as pool:
        yield from pool.imap_unordered(partial(learn, data=data, out=out), waiting)


def main() -> None:
    """Train, print and check the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(LEAST), choices=list(LEAST), help="some of the detectors")
    parser.add_argument("--data", type=Path, help="the folder of the generated images, by default data in --out")
    parser.add_argument("--out", type=Path, default=Path("learning"), help="the folder of the runs")
    parser.add_argument("--beside", type=int, default=1, help="detectors that train at a time")
    options = parser.parse_args()
    names = [name for name in LEAST if name in options.only]
    results: dict[str, dict[str, Any]] = {}
    try:
        data = generate_dataset(options.data or options.out / "data", images=IMAGES, seed=SEED)
        for name in runs(names, data, options.out, options.beside):
            results[name] = summarize_run(name, options.out / name)
            print(json.dumps(results[name]), flush=True)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table([results[name] for name in names]))
    sys.exit(0 if all(row["reached"] for row in results.values()) else 1)


if __name__ == "__main__":
    main()
