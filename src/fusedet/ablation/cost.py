"""The cost of the rows: counted on their configs, measured on their trained weights in one process."""

import csv
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from fusedet.ablation.plan import Run
from fusedet.api.detection import detect_batch
from fusedet.api.load_model import build_with_weights, weights_file
from fusedet.api.predictor import Predictor, prepare_detector
from fusedet.api.timing import compute_percentiles, describe_device, time_call
from fusedet.config import Config
from fusedet.data.collate import collate_tta_samples, make_samples
from fusedet.data.dataset import DetectionDataset
from fusedet.data.dataset_images import read_dataset_image
from fusedet.models import profiling
from fusedet.models.detectors import build_meta_detector
from fusedet.types import Batch

IMAGES = 20
SECONDS = 60.0


def count_costs(configs: Mapping[str, Config], classes: int) -> dict[str, dict[str, Any]]:
    """Count parameters and multiply-adds of every row with `profiling.count_cost`, equal models once.

    Returns:
        By label: parameters, trainable, multiply_adds and image, the size that they are counted for.
    """
    known: dict[str, dict[str, Any]] = {}
    costs = {}
    for label, options in configs.items():
        key = repr((options.model, options.data.size, options.data.channels, options.test.max_det))
        if key not in known:
            counts = profiling.count_cost(
                build_meta_detector(options, classes),
                *profiling.network_size(options.data.size),
                options.data.channels,
            )
            known[key] = {name: value for name, value in counts.items() if name != "parts"}
        costs[label] = known[key]
    return costs


def measure_prediction(
    runs: Mapping[str, Run], dataset: DetectionDataset, device: torch.device, seconds: float = SECONDS
) -> dict[str, dict[str, Any]]:
    """Measure latency and peak memory of prediction with each run's weights and test section.

    Latency is the time from a preprocessed image to its detections, with all copies of test-time augmentation. `IMAGES`
    images of the dataset are predicted one by one, the rows in turn, so that a slow moment of the machine affects all
    of them. Peak memory counts the tensors alive at once, weights included, the maximum over two images.

    Args:
        runs: Run of each row, by label.
        dataset: Images to predict.
        device: Device of the models.
        seconds: No further image is started after this time, but at least two are timed.

    Returns:
        By label: p50_ms, p95_ms, images, peak_MiB (None on devices that do not count it) and device.
    """
    models = {label: _load_predictor(run, dataset, device) for label, run in runs.items()}
    indices = np.unique(np.linspace(0, len(dataset) - 1, IMAGES).round().astype(int)).tolist()
    times: dict[str, list[float]] = {label: [] for label in runs}
    peaks: dict[str, float | None] = {}
    for label, model in models.items():
        memory = [_measure_peak_memory(model, _make_batch(model, dataset, i)) for i in indices[:2]]  # warms up too
        peaks[label] = None if None in memory else max(memory)  # type: ignore[type-var]
    start_all = time.perf_counter()
    for done, i in enumerate(indices):
        if done >= 2 and time.perf_counter() - start_all > seconds:
            break
        for label, model in models.items():
            batch = _make_batch(model, dataset, i)
            # its result is on the CPU, so that no GPU work is pending
            times[label].append(1000 * time_call(partial(detect_batch, model.detector, batch, device))[1].wall)
    name = describe_device(device)
    return {
        label: {**compute_percentiles(values), "images": len(values), "peak_MiB": peaks[label], "device": name}
        for label, values in times.items()
    }


def read_training_speed(run: Path) -> float | None:
    """Return a run's training images per second, data loading included: the median of its speed.csv; None without."""
    try:
        with (run / "speed.csv").open(newline="", encoding="utf-8") as lines:
            speeds = [float(row["images_per_second"]) for row in csv.DictReader(lines)]
    except OSError:
        return None
    return median(speeds) if speeds else None


def _load_predictor(run: Run, dataset: DetectionDataset, device: torch.device) -> Predictor:
    """Load a run's weights, or those that it scores, into the model of its row."""
    file = weights_file(run.weights_from or run.folder)
    detector = build_with_weights(run.config, len(dataset.names), file).to(device)
    return Predictor(
        prepare_detector(detector, run.config, names=dataset.names),
        run.config,
        dataset.names,
        dataset.category_ids,
        file,
    )


def _make_batch(model: Predictor, dataset: DetectionDataset, i: int) -> Batch:
    """Preprocess image i as the network's input."""
    record = dataset[i]
    image = read_dataset_image(dataset, record)
    return collate_tta_samples([make_samples(image, record, model.transforms)], model.transforms[1:])


@torch.no_grad()
def _measure_peak_memory(model: Predictor, batch: Batch) -> float | None:
    """Return the MiB of tensors alive at once in one prediction, weights included."""
    device = model.device
    tensors = (*model.detector.parameters(), *model.detector.buffers())
    weights = sum(t.numel() * t.element_size() for t in tensors)

    def predict() -> None:
        detect_batch(model.detector, batch, device)

    if device.type == "cuda":
        predict()  # libraries allocate workspaces once, which do not count
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        predict()
        return float(weights + torch.cuda.max_memory_allocated(device) - before) / 2**20
    return (weights + measure_cpu_allocation(predict)) / 2**20 if device.type == "cpu" else None


def measure_cpu_allocation(call: Callable[[], None]) -> int:
    """Return the most bytes that a call has allocated on the CPU at once, by the profiler's record of allocations."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints a line to the terminal otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        record.export_chrome_trace(str(file))
        events = [e for e in json.loads(file.read_text(encoding="utf-8"))["traceEvents"] if e.get("name") == "[memory]"]
    sizes = [e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]) if e["args"]["Device Type"] == 0]
    return int(np.cumsum([0, *sizes]).max())
