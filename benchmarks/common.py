"""Helpers of the benchmarks: interleaved timing of two sides, ratios of medians, output as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision

from fusedet.interop.torchvision import convert_weights


def interleave(sides: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Measure the seconds of each call, the sides in turn, so that a slow moment of the machine affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warmup + repeats):
        for name, call in sides.items():
            start = time.perf_counter()
            call()
            if i >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


def summarize_times(times: dict[str, list[float]], reference: str) -> dict[str, Any]:
    """Compute the median milliseconds of each side and its speed relative to the reference."""
    medians = {name: statistics.median(t) for name, t in times.items()}
    return {
        name: {
            "median_ms": round(1000 * m, 2),
            "times_as_fast": round(medians[reference] / m, 3),
            "runs": len(times[name]),
        }
        for name, m in medians.items()
    }


def measure_peak_memory(script: str, side: str, *arguments: str) -> float:
    """Measure the peak memory of one side in MiB in a separate process (`script --only SIDE` prints it last)."""
    done = subprocess.run(
        [sys.executable, script, "--only", side, *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def read_peak_memory() -> float:
    """Return this process's peak resident memory in MiB; getrusage would include what the parent had."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def copy_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copy the weights of a torchvision detector to a fusedet detector."""
    left = ours.load_state_dict(convert_weights(theirs.state_dict(), "torchvision").weights, strict=False)
    # Frozen batch norms have no batch counters.
    assert not left.unexpected_keys, left
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys), left


def print_report(**values: Any) -> None:
    """Print the values as JSON, with a description of the machine."""
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else [platform.processor()]
    machine = {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }
    print(json.dumps({**values, "machine": machine}, indent=2))
