"""Helpers of the benchmarks: interleaved timing of two sides, ratios of medians, output as JSON."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fusedet.api import timing
from fusedet.api.timing import describe_machine, time_call
from fusedet.interop.torchvision import convert_torchvision_weights


def interleave(sides: dict[str, Callable[[], Any]], repeats: int, warmup: int = 1) -> dict[str, list[float]]:
    """Measure the seconds of each call, the sides in turn, so that a slow moment of the machine affects all of them."""
    timed = {name: partial(time_call, call) for name, call in sides.items()}
    return {
        name: [span.wall for _, span in results] for name, results in timing.interleave(timed, repeats, warmup).items()
    }


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


def copy_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copy the weights of a torchvision detector to a fusedet detector."""
    left = ours.load_state_dict(convert_torchvision_weights(theirs.state_dict(), "torchvision").weights, strict=False)
    # Frozen batch norms have no batch counters.
    assert not left.unexpected_keys, left
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys), left


def print_report(**values: Any) -> None:
    """Print the values as JSON, with a description of the machine."""
    print(json.dumps({**values, "machine": describe_machine()}, indent=2))
