"""Exported files in their own runtimes, with the interface of a detector."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.exporters.formats import AOT, KEY, check_packages
from fusedet.exporters.graph import INPUTS
from fusedet.exporters.metadata import Metadata
from fusedet.types import MULTIPLE, BatchDetections

Array = np.ndarray
Session = Callable[[Array, Array], dict[str, Array]]
"""Function of images (N, 3, H, W) uint8 and sizes (N, 2) int64 to the outputs by name."""
RUNTIMES = {"torch": ("torch",), AOT: ("torch",), "onnx": ("onnxruntime",), "openvino": ("openvino",)}
"""The packages that run each format."""


def open_session(name: str, path: Path, metadata: Metadata) -> Session:
    """Open an exported file in the runtime of its format, on the CPU.

    Args:
        name: A name of `RUNTIMES`.
        path: The file: .pt2, .onnx or .xml. A .pt2 file is unpickled by torch: only open trusted ones.
        metadata: What model.json says; the text inside the file must be the same.

    Raises:
        InputError: The runtime is not installed, the file cannot be read, or its metadata differ from model.json.
    """
    check_packages(name, RUNTIMES[name])
    try:
        session, text = OPENERS[name](path, metadata)
    except InputError:
        raise
    except (RuntimeError, ValueError, OSError, LookupError) as error:
        raise InputError(f"{path} cannot be read: it is damaged ({' '.join(str(error).split())[:200]})") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "onnxruntime":
            raise
        raise InputError(f"{path} cannot be read: it is damaged ({' '.join(str(error).split())[:200]})") from error
    try:
        inside = json.loads(text or "null")
    except ValueError:
        inside = None
    if inside != json.loads(metadata.to_json()):
        raise InputError(f"{path} and its model.json describe different models: export the model again")
    return session


def _open_torch(path: Path, metadata: Metadata) -> tuple[Session, str | None]:
    import torchvision  # noqa: F401  (registers the operators)

    texts = {KEY: ""}
    module = torch.export.load(path, extra_files=texts).module()
    return _make_torch_session(module, metadata), texts[KEY]


def _open_aot(path: Path, metadata: Metadata) -> tuple[Session, str | None]:
    import torchvision  # noqa: F401  (registers the operators)
    from torch._inductor import aoti_load_package

    model = aoti_load_package(str(path))
    return _make_torch_session(model, metadata), model.loader.get_metadata().get(KEY)


def _make_torch_session(module: Callable[[Tensor, Tensor], Sequence[Tensor]], metadata: Metadata) -> Session:
    def run(images: Array, sizes: Array) -> dict[str, Array]:
        with torch.no_grad():
            outputs = module(torch.from_numpy(images), torch.from_numpy(sizes))
        return {name: output.numpy() for name, output in zip(metadata.outputs, outputs)}

    return run


def _open_onnx(path: Path, metadata: Metadata) -> tuple[Session, str | None]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; warnings are about single operators
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Array, sizes: Array) -> dict[str, Array]:
        outputs = session.run(metadata.outputs, dict(zip(INPUTS, (images, sizes))))
        return dict(zip(metadata.outputs, outputs))

    return run, session.get_modelmeta().custom_metadata_map.get(KEY)


def _open_openvino(path: Path, metadata: Metadata) -> tuple[Session, str | None]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    text = model.get_rt_info(KEY).astype(str) if model.has_rt_info(KEY) else None
    if metadata.precision == "bf16":
        check_bf16()
    # OpenVINO computes in bfloat16 by itself on CPUs that have it
    precision = "bf16" if metadata.precision == "bf16" else "f32"
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(model, "CPU", threads)

    def run(images: Array, sizes: Array) -> dict[str, Array]:
        outputs = compiled(dict(zip(INPUTS, (images, sizes))))
        return {name: np.array(outputs[name]) for name in metadata.outputs}

    return run, text


OPENERS = {"torch": _open_torch, AOT: _open_aot, "onnx": _open_onnx, "openvino": _open_openvino}


def check_bf16() -> None:
    """Raise InputError on a CPU that does not compute in bf16, as OpenVINO tells it."""
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise InputError("precision=bf16: this CPU does not compute in bf16, use a model of precision fp32 or int8")


class ExportedDetector(nn.Module):
    """An exported file that detects as a detector does; it has no weights that torch knows.

    Batches are cut or filled to the file's number of images, and padded to its size.

    Args:
        session: What `open_session` returns.
        metadata: The description of the file.
    """

    device: torch.device

    def __init__(self, session: Session, metadata: Metadata) -> None:
        super().__init__()
        self.session, self.metadata = session, metadata
        self.device = torch.device("cpu")
        # what merges the detections of test-time augmentation
        self.selection = {"iou": metadata.thresholds.nms, "max_det": metadata.thresholds.max_det}

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.metadata.names)

    @property
    def has_masks(self) -> bool:
        """Whether the file predicts masks."""
        return self.metadata.mask_size is not None

    @property
    def canvas(self) -> tuple[int, int] | None:
        """Height and width that an image must fit; None for any."""
        return None if self.metadata.size is None else (self.metadata.size[0], self.metadata.size[1])

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        """Detect instances, as `OneStage.detect` and `TwoStage.detect` do.

        Raises:
            InputError: The images are larger than the file takes, or of a size that is no multiple of 32.
        """
        parts = [self.session(*arrays) for arrays in self.split_batch(images, sizes)]
        joined = [torch.from_numpy(np.concatenate([part[name] for part in parts]))[: len(images)] for name in parts[0]]
        detections = BatchDetections(*joined)
        return detections if padded else detections.trimmed()

    def split_batch(self, images: Tensor, sizes: Tensor) -> list[tuple[Array, Array]]:
        """Cut a batch into inputs of the file: of its number of images, the last one filled, and padded to its size.

        Raises:
            InputError: As `detect`.
        """
        count, _, height, width = images.shape
        target = self.canvas or (height, width)
        if height % MULTIPLE or width % MULTIPLE or height > target[0] or width > target[1]:
            raise InputError(
                f"images of {height}x{width} do not fit {self.metadata.name}: it takes "
                + (f"up to {target[0]}x{target[1]} pixels" if self.canvas else f"multiples of {MULTIPLE}")
            )
        images = F.pad(images, (0, target[1] - width, 0, target[0] - height))
        step = self.metadata.batch or count
        missing = -count % step
        images, sizes = F.pad(images, (0, 0) * 3 + (0, missing)), F.pad(sizes, (0, 0, 0, missing), value=1)
        return [
            (np.ascontiguousarray(i.numpy()), np.ascontiguousarray(s.numpy()))
            for i, s in zip(images.split(step), sizes.split(step))
        ]


def choose_file(files: Mapping[str, Sequence[Path]], asked: Path) -> tuple[str, Path]:
    """Return format and file to run: the given file, or of a directory the first whose runtime is installed.

    Raises:
        InputError: The file is not of this export, or no runtime is installed.
    """
    models = {name: paths[0] for name, paths in files.items() if name in RUNTIMES}
    if not asked.is_dir():
        for name, path in models.items():
            if os.path.samefile(path, asked):
                return name, path
        raise InputError(f"{asked} is none of the exported models: {', '.join(p.name for p in models.values())}")
    for name in ("openvino", "onnx", AOT, "torch"):
        if name in models:
            try:
                check_packages(name, RUNTIMES[name])
            except InputError:
                continue
            return name, models[name]
    raise InputError(f"{asked}: no runtime of its formats {', '.join(models)} is here: pip install 'fusedet[export]'")
