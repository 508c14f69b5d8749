"""What the rows cost: counted on their configs, measured on their trained weights in one run, the rows in turn."""

from __future__ import annotations

import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fusedet.ablation.plan import Run
from fusedet.api.load_model import weights_file, with_weights
from fusedet.api.predict import Predictor, find, tuned
from fusedet.config import Config
from fusedet.data.collate import collate_views, make_samples
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_decoding import read_image
from fusedet.models import profiling
from fusedet.models.detectors import build_meta_detector
from fusedet.types import Batch

IMAGES = 20
SECONDS = 60.0


def count_costs(configs: Mapping[str, Config], classes: int) -> dict[str, dict[str, Any]]:
    """Trainable parameters and multiply-adds of every row, {parameters, trainable, multiply_adds, image}, as `measure.cost` counts."""
    done: dict[str, dict[str, Any]] = {}
    found = {}
    for label, one in configs.items():
        key = repr((one.model, one.data.size))
        if key not in done:
            figures = profiling.count_cost(build_meta_detector(one, classes), *profiling.network_size(one.data.size))
            done[key] = {name: value for name, value in figures.items() if name != "parts"}
        found[label] = done[key]
    return found


def measure_prediction(
    runs: Mapping[str, Run], dataset: DetectionDataset, device: torch.device, seconds: float = SECONDS
) -> dict[str, dict[str, Any]]:
    """Latency and memory of prediction with each run's weights, tested as the run is: {row: {p50_ms, p95_ms, images, peak_MiB, device}}.

    Latency is from an image as the network sees it to its detections, in all views that the config's test section asks for; `IMAGES`
    images of the dataset one by one, the rows in turn, so that a slow moment of the machine meets all of them; after `seconds` no
    further image is begun, but two are always timed. Peak memory is of the tensors alive at once, weights included, the most
    of two images; None on devices that do not count it.
    """
    models = {label: _predictor(cell, dataset, device) for label, cell in runs.items()}
    places = np.unique(np.linspace(0, len(dataset) - 1, IMAGES).round().astype(int)).tolist()
    times: dict[str, list[float]] = {label: [] for label in runs}
    peaks: dict[str, float | None] = {}
    for label, model in models.items():
        found = [_peak(model, _batch(model, dataset, i)) for i in places[:2]]  # these warm up too
        peaks[label] = None if None in found else max(found)  # type: ignore[type-var]
    began = time.perf_counter()
    for done, i in enumerate(places):
        if done >= 2 and time.perf_counter() - began > seconds:
            break
        for label, model in models.items():
            batch = _batch(model, dataset, i)
            start = time.perf_counter()
            find(model.detector, batch, device)  # it ends on the CPU, so nothing is left in a queue
            times[label].append(1000 * (time.perf_counter() - start))
    return {
        label: {
            "p50_ms": float(np.percentile(values, 50)),
            "p95_ms": float(np.percentile(values, 95)),
            "images": len(values),
            "peak_MiB": peaks[label],
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"{device}, {torch.get_num_threads()} threads",
        }
        for label, values in times.items()
    }


def training_speed(run: Path) -> float | None:
    """Training images per second of a run, the wait for data included: the median of what its speed.csv has logged; None without."""
    try:
        with (run / "speed.csv").open(newline="", encoding="utf-8") as lines:
            speeds = [float(row["images_per_second"]) for row in csv.DictReader(lines)]
    except OSError:
        return None
    return median(speeds) if speeds else None


def _predictor(cell: Run, dataset: DetectionDataset, device: torch.device) -> Predictor:
    """A run's weights, or those that it scores, in the model that the table asks for."""
    file = weights_file(cell.trained or cell.folder)
    detector = with_weights(cell.config, len(dataset.names), file).to(device)
    return Predictor(tuned(detector, cell.config), cell.config, dataset.names, dataset.category_ids, file)


def _batch(model: Predictor, dataset: DetectionDataset, i: int) -> Batch:
    """Image i as the network sees it."""
    record = dataset[i]
    return collate_views([make_samples(read_image(record.path), record, model.views)], model.views[1:])


@torch.no_grad()
def _peak(model: Predictor, batch: Batch) -> float | None:
    """MiB of tensors alive at once in one prediction, weights included."""
    device = model.device
    tensors = (*model.detector.parameters(), *model.detector.buffers())
    weights = sum(t.numel() * t.element_size() for t in tensors)

    def call() -> None:
        find(model.detector, batch, device)

    if device.type == "cuda":
        call()  # what libraries allocate once is no part of it
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return float(weights + torch.cuda.max_memory_allocated(device) - before) / 2**20
    return (weights + _allocated(call)) / 2**20 if device.type == "cpu" else None


def _allocated(call: Callable[[], None]) -> int:
    """The most bytes that a call has allocated on the CPU at once, by the profiler's record of every allocation."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells the terminal that it starts
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        record.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text(encoding="utf-8"))["traceEvents"] if e.get("name") == "[memory]"]
    own = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]) if e["args"]["Device Type"] == 0]
    return int(np.cumsum([0, *own]).max())
