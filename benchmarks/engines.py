"""Prediction by every engine of fusedet beside torchvision's equal detector, for predict.py and two_stage.py."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

import fusedet
from fusedet import config
from fusedet.api.benchmark import measure_engines
from fusedet.api.benchmark_plan import Candidate, draw_scene, plan_engines
from fusedet.api.engine_process import Engine, serve_pipe
from fusedet.api.engines import resize_settings
from fusedet.api.export_options import FORMATS_OF, Precision
from fusedet.api.load_model import COCO_CLASSES
from fusedet.api.timing import time_call
from fusedet.data.image_decoding import to_tensor
from fusedet.data.synthetic import generate_dataset
from fusedet.engine.checkpoint import save_weights
from fusedet.errors import InputError

ENGINES = ("channels_last", "bf16", "compile", "onnx", "openvino")
"""The engines beside torchvision's."""
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
"""Precisions of the exported files, by default all of them."""
NAMES = [f"class {i}" for i in range(COCO_CLASSES)]


def parse_options(about: str | None, *, only: Sequence[str] = ()) -> argparse.Namespace:
    """Read the options of a script that measures engines."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--engines", default=",".join(ENGINES), help="those that are measured, with commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="those of the exported files, with commas")
    parser.add_argument("--exports", type=Path, metavar="DIR", help="keep the exported files there, for further runs")
    parser.add_argument("--serve", metavar="IMAGE", help="torchvision's detector, as an engine")
    if only:
        parser.add_argument("--only", choices=only)
    return parser.parse_args()


def measure_prediction(
    script: str,
    config_name: str,
    overrides: list[str],
    ours: torch.nn.Module,
    size: tuple[int, int],
    options: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Measure the engines of a fusedet detector and torchvision's equal one in turn, each in its own process.

    All predict the same scene; `script --serve IMAGE` serves torchvision's detector (`serve_call`). Exported files are
    measured where their packages are installed, otherwise the row says why.

    Returns:
        By engine and precision: the milliseconds of the network, relative speed, peak memory, size and start time.
    """
    engines = options.engines.split(",")
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        checkpoint = folder / "model.safetensors"
        meta = {
            "config": config.load(config_name, overrides).to_yaml(),
            "names": json.dumps(NAMES),
            "category_ids": json.dumps(list(range(len(NAMES)))),
        }
        save_weights(checkpoint, ours.state_dict(), meta)
        image = draw_scene(size, folder / "image.jpg")
        sources, failed = [checkpoint], []
        for precision in [name for name in PRECISIONS if name in options.precisions.split(",")]:
            formats = [format_ for format_ in FORMATS_OF[precision] if format_ in engines]
            out = (options.exports or folder) / f"{config_name}-{precision}"
            try:
                if formats and not out.is_dir():
                    _export(checkpoint, size, precision, formats, out)
                sources += [out] if formats else []
            except InputError as error:
                failed.append(Candidate("fusedet", ", ".join(formats), precision, reason=str(error)))
        candidates = [
            Candidate("torchvision", "torchvision", "fp32", [sys.executable, script, "--serve", str(image)]),
            *stack.enter_context(plan_engines(sources, engines, size))[0],
            *failed,
        ]
        rows = measure_engines(candidates, [1], options.repeats)
    reference = rows[0]["batches"][0]["network"]["p50_ms"]
    return {f"{row['engine']} {row['precision']}": _summarize_row(row, reference) for row in rows}


def _export(checkpoint: Path, size: tuple[int, int], precision: Precision, formats: list[str], out: Path) -> None:
    """Export with dynamic sizes, compared with PyTorch at a quarter of the size: seconds instead of minutes.

    int8 is calibrated on four images. Its loss of AP says nothing here, as the weights are random.
    """
    settings = resize_settings((size[0] // 4, size[1] // 4))
    options: dict[str, Any] = {"formats": formats, "precision": precision, "out": out}
    with tempfile.TemporaryDirectory() as folder:
        if precision == "int8":
            data = generate_dataset(Path(folder) / "data", images=8, splits={"train": 0.5, "val": 0.5})
            for file in data.glob("annotations/*.json"):
                content = json.loads(file.read_text())
                ids = [category["id"] for category in content["categories"]]
                ids += range(max(ids) + 1, max(ids) + 1 + len(NAMES) - len(ids))
                content["categories"] = [{"id": i, "name": name} for i, name in zip(ids, NAMES, strict=True)]
                file.write_text(json.dumps(content))
            options |= {"calibrate": True, "max_drop": 1.0, "data": str(data)}
        fusedet.export(checkpoint, *settings, **options)


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
