"""Helpers of the benchmarks: interleaved timing of two sides, ratios of medians, output as JSON."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

import fusedet
from fusedet import config
from fusedet.api import timing
from fusedet.api.benchmark import measure_engines
from fusedet.api.benchmark_plan import Candidate, draw_scene, plan_engines
from fusedet.api.engine_process import Engine, serve_pipe
from fusedet.api.engines import resize_settings
from fusedet.api.load_model import COCO_CLASSES
from fusedet.api.timing import describe_machine, time_call
from fusedet.data.image_decoding import to_tensor
from fusedet.engine.checkpoint import save_weights
from fusedet.errors import InputError
from fusedet.interop.torchvision import convert_weights

ENGINES = ("channels_last", "bf16", "compile", "onnx", "openvino")
"""The engines beside torchvision's."""
PRECISIONS = ("fp32", "bf16")
"""Precisions of the exported files."""


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


def measure_prediction(
    script: str, config_name: str, overrides: list[str], ours: torch.nn.Module, size: tuple[int, int], repeats: int
) -> dict[str, dict[str, Any]]:
    """Measure the engines of a fusedet detector and torchvision's equal one in turn, each in its own process.

    All predict the same scene; `script --serve IMAGE` serves torchvision's detector (`serve_call`). Exported files are
    measured where their packages are installed, otherwise the row says why.

    Returns:
        By engine and precision: the milliseconds of the network, relative speed, peak memory, size and start time.
    """
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = folder / "model.safetensors"
        names = [f"class {i}" for i in range(COCO_CLASSES)]
        meta = {
            "config": config.load(config_name, overrides).to_yaml(),
            "names": json.dumps(names),
            "category_ids": json.dumps(list(range(len(names)))),
        }
        save_weights(checkpoint, ours.state_dict(), meta)
        image = draw_scene(size, folder / "image.jpg")
        sources, failed = [checkpoint], []
        for precision in PRECISIONS:
            # compared with PyTorch at a quarter of the size, which takes seconds instead of minutes
            settings = resize_settings((size[0] // 4, size[1] // 4))
            out = folder / precision
            try:
                fusedet.export(checkpoint, *settings, formats="onnx,openvino", precision=precision, out=out)
                sources.append(out)
            except InputError as error:
                failed.append(Candidate("fusedet", "onnx, openvino", precision, reason=str(error)))
        candidates = [
            Candidate("torchvision", "torchvision", "fp32", [sys.executable, script, "--serve", str(image)]),
            *stack.enter_context(plan_engines(sources, ENGINES, size))[0],
            *failed,
        ]
        rows = measure_engines(candidates, [1], repeats)
    reference = rows[0]["batches"][0]["network"]["p50_ms"]
    return {f"{row['engine']} {row['precision']}": _summarize_row(row, reference) for row in rows}


def _summarize_row(row: dict[str, Any], reference: float) -> dict[str, Any]:
    if not row["batches"]:
        return {"error": row["error"]}
    (part,) = row["batches"]
    times = {key: round(part["network"][key], 1) for key in ("p50_ms", "p95_ms", "processor_ms")}
    return {
        **times,
        "times_as_fast": round(reference / part["network"]["p50_ms"], 3),
        "peak_MiB": round(part["peak_MiB"]),
        "start_seconds": round(row["start_seconds"], 1),
        "megabytes": row["megabytes"] and round(row["megabytes"], 1),
    }


def serve_call(make: Callable[[torch.Tensor], Callable[[], Any]], image: str) -> None:
    """Serve a call that `make` returns for the image file as an engine of `measure_prediction`."""
    pixels = to_tensor(image)

    def open_engine() -> Engine:
        call = make(pixels)
        return lambda batch: {"network": time_call(call)[1]}

    serve_pipe(open_engine)


def copy_weights(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """Copy the weights of a torchvision detector to a fusedet detector."""
    left = ours.load_state_dict(convert_weights(theirs.state_dict(), "torchvision").weights, strict=False)
    # Frozen batch norms have no batch counters.
    assert not left.unexpected_keys, left
    assert all(key.endswith("num_batches_tracked") for key in left.missing_keys), left


def print_report(**values: Any) -> None:
    """Print the values as JSON, with a description of the machine."""
    print(json.dumps({**values, "machine": describe_machine()}, indent=2))
