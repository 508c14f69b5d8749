"""Measuring calls: wall and processor seconds, in turn, and the peak memory of this process."""

import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torchvision

T = TypeVar("T")


class Span(NamedTuple):
    """Seconds of a call: on the clock, and of the processor, which count all threads of this process."""

    wall: float
    processor: float


def time_call(call: Callable[[], T]) -> tuple[T, Span]:
    """Return the result of a call and its seconds."""
    began = time.perf_counter(), time.process_time()
    result = call()
    return result, Span(time.perf_counter() - began[0], time.process_time() - began[1])


def interleave(sides: Mapping[str, Callable[[], T]], repeats: int, warmup: int = 1) -> dict[str, list[T]]:
    """Call the sides in turn, so that a slow moment of the machine affects all of them.

    Args:
        sides: What is measured, by name; a call returns its own measurement.
        repeats: Measurements of each side.
        warmup: Earlier turns, whose measurements are dropped.

    Returns:
        The measurements of each side, in their order.
    """
    results: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(warmup + repeats):
        for name, call in sides.items():
            result = call()
            if turn >= warmup:
                results[name].append(result)
    return results


def compute_percentiles(milliseconds: Sequence[float]) -> dict[str, float]:
    """Compute the median and the 95th percentile, interpolated between measurements."""
    return {f"p{q}_ms": float(np.percentile(milliseconds, q)) for q in (50, 95)}


def summarize_spans(spans: Sequence[Span], images: int) -> dict[str, float]:
    """Compute the latency of calls on `images` images: p50_ms, p95_ms, processor_ms (median), images_per_second."""
    latency = compute_percentiles([1000 * span.wall for span in spans])
    processor = float(np.median([1000 * span.processor for span in spans]))
    return latency | {"processor_ms": processor, "images_per_second": 1000 * images / latency["p50_ms"]}


def read_peak_memory() -> float | None:
    """Return this process's peak resident memory in MiB; None where the system does not count it by process.

    getrusage would include what the parent had when it started this process.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s*(\d+)", status)
    return int(peak[1]) / 1024 if peak else None


def describe_device(device: str | torch.device) -> str:
    """Return the name of a GPU that this machine has; of another device its type, and the cores and threads."""
    if str(device).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    return f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, threads and load of this machine, and versions."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
