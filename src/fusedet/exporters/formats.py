"""The formats: how each is written, with the metadata inside."""

from __future__ import annotations

import importlib.util
import io
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from fusedet.atomic_io import write_atomically
from fusedet.errors import InputError, StorageError
from fusedet.exporters.graph import INPUTS
from fusedet.exporters.metadata import Metadata
from fusedet.models.ops.exporting import nms_over_images
from fusedet.quiet import quiet

FORMATS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""The formats, and the packages that each needs."""

_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir")  # their remarks are on their own defaults
KEY = "fusedet"
"""Name of the metadata inside a file."""


def check_packages(name: str, packages: Sequence[str]) -> None:
    """Check that packages are installed.

    Raises:
        InputError: One is not; the message has the command that installs it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"format {name} needs {' and '.join(missing)}: pip install 'fusedet[export]'")


def package_versions(names: Sequence[str]) -> dict[str, str]:
    """Return the versions of the packages that write the formats."""
    packages = dict.fromkeys(["torch", "torchvision", *(package for name in names for package in FORMATS[name])])
    return {package: version(package) for package in packages}


def write_format(
    name: str, program: ExportedProgram, outputs: Sequence[str], folder: Path, metadata: Metadata
) -> list[Path]:
    """Write an exported program in one format.

    Args:
        name: A name of `FORMATS`.
        program: The program of `trace`.
        outputs: Names of its outputs.
        folder: Where the files go: model.pt2, model.onnx, or model.xml and model.bin.
        metadata: The text inside the file.

    Returns:
        The files, the model first.

    Raises:
        InputError: A package is missing.
        StorageError: A file cannot be written.
    """
    check_packages(name, FORMATS[name])
    if name == "torch":
        return [_write_torch(program, folder / "model.pt2", metadata)]
    if name == "onnx":
        return [_write_onnx(program, outputs, folder / "model.onnx", metadata)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        existing = folder / "model.onnx"
        source = existing if existing.is_file() else Path(scratch) / "model.onnx"
        if source is not existing:
            _write_onnx(program, outputs, source, metadata)
        return _write_openvino(source, folder / "model.xml", metadata)


def _write_torch(program: ExportedProgram, path: Path, metadata: Metadata) -> Path:
    """Write a .pt2 file that needs torch and torchvision only."""
    operator = torch.ops.fusedet.nms_keep_mask.default
    buffer = io.BytesIO()
    with quiet(*_LOGGERS):
        plain = program.run_decompositions({operator: nms_over_images})
        torch.export.save(plain, buffer, extra_files={KEY: metadata.to_json()})
    write_atomically(path, buffer.getbuffer())
    return path


def _write_onnx(program: ExportedProgram, outputs: Sequence[str], path: Path, metadata: Metadata) -> Path:
    import onnx

    with quiet(*_LOGGERS):
        converted = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=metadata.opset,
            input_names=INPUTS,
            output_names=outputs,
            custom_translation_table={torch.ops.fusedet.nms_keep_mask.default: _onnx_nms},
            verbose=False,
        )
    assert converted is not None
    model = converted.model_proto
    entry = model.metadata_props.add()
    entry.key, entry.value = KEY, metadata.to_json()
    write_atomically(path, model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)
    return path


def _onnx_nms(boxes: Any, scores: Any, iou: float) -> Any:
    """Translate `fusedet::nms_keep_mask` to one NonMaxSuppression, whose rows (image, class, box) become a mask."""
    import onnxscript

    op: Any = onnxscript.opset18

    limit = op.Shape(scores, start=1, end=2)
    by_class = op.Unsqueeze(scores, op.Constant(value_ints=[1]))  # (N, 1, M): one class
    # below all scores from 0 on, and above the -1 of boxes that are no candidates
    least = op.Constant(value_floats=[-0.5])
    picked = op.NonMaxSuppression(boxes, by_class, limit, op.Constant(value_floats=[iou]), least)
    rows = op.Gather(picked, op.Constant(value_ints=[0, 2]), axis=1)
    zeros = op.Expand(op.Constant(value_floats=[0.0]), op.Shape(scores))
    ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(rows, start=0, end=1))
    return op.Greater(op.ScatterND(zeros, rows, ones), op.Constant(value_float=0.5))


def _write_openvino(source: Path, path: Path, metadata: Metadata) -> list[Path]:
    """Convert an ONNX file; the weights go to a .bin file beside the .xml file."""
    import openvino

    model = openvino.convert_model(source)
    model.set_rt_info(metadata.to_json(), KEY)
    try:
        openvino.save_model(model, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise StorageError(f"{path} cannot be written: {' '.join(str(error).split())[:200]}") from error
    return [path, path.with_suffix(".bin")]
