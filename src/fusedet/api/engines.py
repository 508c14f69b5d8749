"""The inference engines of `fusedet benchmark`; as a program, one of them, which measures when it is asked."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fusedet import exporters
from fusedet.api.engine_process import Engine, serve_pipe
from fusedet.api.exported import load_exported
from fusedet.api.predictor import Predictor, load
from fusedet.api.settings import resolve_config
from fusedet.api.timing import Span, time_call
from fusedet.errors import InputError

PYTORCH = {"eager": "fp32", "channels_last": "fp32", "bf16": "bf16", "compile": "fp32"}
"""PyTorch's engines and their precision.

- eager: torch's default memory format (NCHW).
- channels_last: as `fusedet.load` prepares a model; the next two are the same in
- bf16, and with
- compile: the forward pass by `torch.compile`.
"""
ENGINES = (*PYTORCH, *exporters.FORMATS)
"""All engines; those of exported files have the names of `exporters.FORMATS`."""


@dataclass(frozen=True)
class Task:
    """What a process of an engine needs.

    Attributes:
        engine: A name of `ENGINES`.
        path: The checkpoint, or the exported file.
        image: The image file to predict.
        size: Its height and width.
        settings: "key=value" texts for a checkpoint.
        threads: Threads of the runtime.
        trust: As `fusedet.load` takes it.
    """

    engine: str
    path: str
    image: str
    size: tuple[int, int]
    settings: tuple[str, ...]
    threads: int
    trust: bool = False

    @property
    def command(self) -> list[str]:
        """The command line of the process."""
        return [sys.executable, "-m", "fusedet.api.engines", json.dumps(asdict(self))]


def resize_settings(size: tuple[int, int]) -> list[str]:
    """Return the settings with which an image of that height and width is neither resized, augmented nor tiled."""
    without_tiles = ["test.tiles.size=null", "test.tiles.whole=true", "test.tiles.ios=null"]
    return [f"data.size=[{min(size)},{max(size)}]", "test.scales=null", "test.flip=false", *without_tiles]


def open_engine(task: Task) -> Engine:
    """Open an engine that predicts the task's image as often as it is asked, all copies at once.

    It returns the seconds of two parts:

    - network: from the uint8 batch to the selected detections, which is what an exported file computes.
    - file: from the image file to boxes in its pixels.

    Raises:
        InputError: The model cannot be loaded, or the image does not fit an exported file of fixed size.
    """
    torch.set_num_threads(task.threads)
    predictor = _open_exported(task) if task.engine in exporters.FORMATS else _open_pytorch(task)
    detector = predictor.detector
    spans: list[Span] = []
    detector.detect = _timed(detector.detect, spans)  # type: ignore[method-assign]

    def run(batch: int) -> dict[str, Span]:
        spans.clear()
        _, whole = time_call(partial(predictor.predict, [task.image] * batch, batch))
        return {"network": spans[0], "file": whole}

    return run


def _timed(call: Callable[..., Any], spans: list[Span]) -> Callable[..., Any]:
    """Return a function that also appends the seconds of each call."""

    def run(*arguments: Any, **options: Any) -> Any:
        result, span = time_call(partial(call, *arguments, **options))
        spans.append(span)
        return result

    return run


def _open_pytorch(task: Task) -> Predictor:
    precision: Any = PYTORCH[task.engine]
    settings = [*task.settings, *resize_settings(task.size)]
    predictor = load(task.path, *settings, device="cpu", precision=precision, trust=task.trust)
    detector = predictor.detector
    assert not isinstance(detector, exporters.ExportedDetector)
    if task.engine == "eager":
        detector.to(memory_format=torch.contiguous_format)
        normalize = detector.normalize
        detector.normalize = lambda *arguments: normalize(*arguments).contiguous()  # type: ignore[method-assign]
    if task.engine == "compile":
        detector.forward = torch.compile(detector.forward)  # type: ignore[assignment, method-assign]
    return predictor


def _open_exported(task: Task) -> Predictor:
    exported = load_exported(Path(task.path), task.trust)
    if exported is None:
        raise InputError(f"{task.path} is no exported model")
    canvas = exported.detector.canvas
    if canvas and (task.size[0] > canvas[0] or task.size[1] > canvas[1]):
        raise InputError(f"it takes images up to {canvas[0]}x{canvas[1]}, not {task.size[0]}x{task.size[1]}")
    config = resolve_config(exported.config, resize_settings(task.size))
    return Predictor(exported.detector, config, exported.names, exported.category_ids, exported.file)


def parse_task(text: str) -> Task:
    """Return the task in an argument of `Task.command`."""
    content = json.loads(text)
    return Task(**content | {"size": tuple(content["size"]), "settings": tuple(content["settings"])})


if __name__ == "__main__":
    serve_pipe(partial(open_engine, parse_task(sys.argv[1])))
