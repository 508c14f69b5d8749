"""Scaling of time and memory with images, instances and processes, on synthetic data, in one run.

Prints a line of JSON per measurement, then the table of docs/scale.md. The memory of a dataset is the growth of the
process by reading it; that of a prediction is the process's peak. Each value of a row is from a separate process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import print_report
from PIL import Image

from fusedet import config
from fusedet.api.timing import read_peak_memory
from fusedet.data.readers.auto import read_dataset
from fusedet.engine import checkpoint
from fusedet.models.detectors import build_detector

RECORDS = [(5_000, 50_000), (40_000, 50_000), (40_000, 400_000)]  # images, objects
IMAGES = [50, 200]
PROCESSES = [1, 2]
OPTIONS = [
    "model.backbone.name=regnetx_002",
    "model.pyramid.channels=16",
    "model.head.convs=1",
    "model.head.norm=false",
    "data.size=[64,96]",
]


def rss() -> float:
    """Return this process's current memory in MiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) / 1024


def write_records(folder: Path, images: int, objects: int) -> None:
    """Write a COCO file without its images: a dataset is read without them."""
    draw = np.random.default_rng(0)
    corners, sides = draw.uniform(0, 400, (objects, 2)).round(2), draw.uniform(4, 80, (objects, 2)).round(2)
    boxes = np.concatenate([corners, sides], axis=1).tolist()
    image_ids, labels = draw.integers(0, images, objects).tolist(), draw.integers(1, 81, objects).tolist()
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": 480, "width": 640} for i in range(images)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, 81)],
        "annotations": [
            {"id": i, "image_id": image_id, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
            for i, (image_id, label, box) in enumerate(zip(image_ids, labels, boxes))
        ],
    }
    (folder / "annotations").mkdir(parents=True)
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(content))
    (folder / "train").mkdir()


def measure_records(folder: Path) -> dict[str, float]:
    """Measure the seconds to read a dataset, its memory, and the peak memory while reading."""
    before, began = rss(), time.perf_counter()
    dataset = read_dataset(str(folder), "train", need_images=False)
    seconds = time.perf_counter() - began
    held = rss() - before
    assert len(dataset)
    return {"seconds": round(seconds, 2), "held_MiB": round(held, 1), "peak_MiB": round(read_peak_memory() - before, 1)}


def alone(*arguments: object) -> dict[str, Any]:
    """Run this script in a separate process and return its last line, which is JSON."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def make_model(file: Path) -> None:
    """Write a small detector with random weights that has 20 detections in every image."""
    torch.manual_seed(0)
    options = config.load("retinanet_tiny", [*OPTIONS, "test.score=0.001", "test.max_det=20"])
    meta = {"config": options.to_yaml(), "names": json.dumps(["a", "b"]), "category_ids": "[1, 2]"}
    checkpoint.save_weights(file, build_detector(options, 2).state_dict(), meta)


def measure_prediction(top: Path, images: int, processes: int) -> dict[str, float]:
    """Measure the wall seconds of `fusedet predict` of a list, and the peak memory of the first process."""
    listed = top / f"{images}.txt"
    listed.write_text("\n".join(str(top / "one.png") for _ in range(images)))
    arguments = [
        "predict",
        str(top / "model.safetensors"),
        f"@{listed}",
        f"out={top / f'out-{images}-{processes}'}",
        "--no-draw",
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    began, running = time.perf_counter(), []
    for rank in range(processes):
        own = {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        command = [sys.executable, __file__, "--predict", *arguments, "device=cpu"]
        running.append(subprocess.Popen(command, env=env | own, stdout=subprocess.PIPE, text=True))
    outputs = [json.loads(one.communicate()[0].strip().splitlines()[-1]) for one in running]
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "work_seconds": max(output["seconds"] for output in outputs),
        "peak_MiB": outputs[0]["peak_MiB"],
    }


def predict(arguments: list[str]) -> None:
    """Run `fusedet predict` in this process; print its seconds without imports and the peak memory."""
    from fusedet import cli

    began = time.perf_counter()
    assert cli.run(arguments) == 0
    print(json.dumps({"seconds": round(time.perf_counter() - began, 2), "peak_MiB": round(read_peak_memory(), 1)}))


def slopes(rows: list[dict[str, Any]], keys: tuple[str, ...], value: str) -> list[float]:
    """Fit a value by least squares as a constant plus a slope per key; return the slopes."""
    known = np.array([[1, *(row[key] for key in keys)] for row in rows], dtype=float)
    coefficients, *_ = np.linalg.lstsq(known, np.array([row[value] for row in rows]), rcond=None)
    return coefficients[1:].tolist()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        rows: list[dict[str, Any]] = []
        for images, objects in RECORDS:
            write_records(top / f"{images}-{objects}", images, objects)
            row = {"images": images, "objects": objects, **alone("--records", top / f"{images}-{objects}")}
            print(json.dumps({"dataset": row}), flush=True)
            rows.append(row)
        make_model(top / "model.safetensors")
        Image.new("RGB", (96, 64), (90, 120, 200)).save(top / "one.png")
        shared = []
        for images in IMAGES:
            for processes in PROCESSES:
                row = {"images": images, "processes": processes, **measure_prediction(top, images, processes)}
                print(json.dumps({"prediction": row}), flush=True)
                shared.append(row)
    per = {
        "bytes_per_image_and_object": [round(2**20 * one) for one in slopes(rows, ("images", "objects"), "held_MiB")],
        "peak_bytes_per_image_and_object": [
            round(2**20 * one) for one in slopes(rows, ("images", "objects"), "peak_MiB")
        ],
        "microseconds_per_image_and_object": [
            round(1e6 * one, 2) for one in slopes(rows, ("images", "objects"), "seconds")
        ],
    }
    for processes in PROCESSES:
        few, many = (next(r for r in shared if (r["images"], r["processes"]) == (n, processes)) for n in IMAGES)
        rate = (many["images"] - few["images"]) / max(many["work_seconds"] - few["work_seconds"], 1e-9)
        per[f"images_per_second_{processes}"] = round(rate, 1)
        per[f"prediction_MiB_per_image_{processes}"] = round(
            (many["peak_MiB"] - few["peak_MiB"]) / (many["images"] - few["images"]), 4
        )
    table(rows, shared)
    print_report(slopes=per, load_average=os.getloadavg())


def table(rows: list[dict[str, Any]], shared: list[dict[str, Any]]) -> None:
    print("\n| annotations read | seconds | MiB held | MiB at the peak |\n|---|---|---|---|")
    for row in rows:
        size = f"{row['images']:,} images, {row['objects']:,} instances"
        print(f"| {size} | {row['seconds']} | {row['held_MiB']} | {row['peak_MiB']} |")
    print("\n| prediction | processes | seconds | MiB at the peak, each |\n|---|---|---|---|")
    for row in shared:
        print(f"| {row['images']:,} images | {row['processes']} | {row['work_seconds']} | {row['peak_MiB']} |")
    print()


if __name__ == "__main__":
    if "--records" in sys.argv:
        print(json.dumps(measure_records(Path(sys.argv[2]))))
    elif "--predict" in sys.argv:
        predict(sys.argv[2:])
    else:
        main()
