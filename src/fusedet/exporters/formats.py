"""The formats: how each is written, with the metadata inside."""

import importlib.util
import io
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from fusedet.atomic_io import write_atomically
from fusedet.errors import InputError, StorageError
from fusedet.exporters.graph import INPUTS
from fusedet.exporters.metadata import Metadata
from fusedet.exporters.telemetry import without_telemetry
from fusedet.garbage_collection import pause_garbage_collection
from fusedet.models.ops.exporting import nms_over_images
from fusedet.quiet import quiet

FORMATS: dict[str, tuple[str, ...]] = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""The formats, and the packages that each needs."""
AOT = "aot"
"""The format `torch` compiled by AOTInductor, which is written beside it."""
LEAST_COMPRESSED = 256
"""Weights of fewer numbers stay in fp32 when a file is compressed to fp16: they are scales and constants."""

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


def package_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of packages, and of torch and torchvision."""
    return {package: version(package) for package in dict.fromkeys(["torch", "torchvision", *packages])}


@pause_garbage_collection()  # millions of small objects are made, and few are freed
def write_format(
    name: str, program: ExportedProgram, outputs: Sequence[str], folder: Path, metadata: Metadata
) -> list[Path]:
    """Write an exported program in one format.

    Args:
        name: A name of `FORMATS`, or `AOT`.
        program: The program of `trace`.
        outputs: Names of its outputs.
        folder: Where the files go: model.pt2, model.aot.pt2, model.onnx, or model.xml and model.bin.
        metadata: The text inside the file.

    Returns:
        The files, the model first.

    Raises:
        InputError: A package is missing.
        StorageError: A file cannot be written.
    """
    check_packages(name, FORMATS.get(name, ()))
    if name == "torch":
        return [_write_torch(program, folder / "model.pt2", metadata)]
    if name == AOT:
        return [_write_aot(program, folder / "model.aot.pt2", metadata)]
    if name == "onnx":
        return [_write_onnx(program, outputs, folder / "model.onnx", metadata)]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        existing = folder / "model.onnx"
        source = existing if existing.is_file() else Path(scratch) / "model.onnx"
        if source is not existing:
            _write_onnx(program, outputs, source, metadata)
        return save_openvino(convert_to_openvino(source), folder / "model.xml", metadata)


def _write_torch(program: ExportedProgram, path: Path, metadata: Metadata) -> Path:
    """Write a .pt2 file that needs torch and torchvision only."""
    buffer = io.BytesIO()
    with quiet(*_LOGGERS):
        torch.export.save(_without_own_operators(program), buffer, extra_files={KEY: metadata.to_json()})
    write_atomically(path, buffer.getbuffer())
    return path


def _write_aot(program: ExportedProgram, path: Path, metadata: Metadata) -> Path:
    """Compile a program for this CPU with AOTInductor."""
    from torch._inductor import aoti_compile_and_package

    check_compiler()
    options = {"aot_inductor.metadata": {KEY: metadata.to_json()}}
    with quiet(*_LOGGERS), torch.no_grad():
        aoti_compile_and_package(_without_own_operators(program), package_path=str(path), inductor_configs=options)
    return path


def check_compiler() -> None:
    """Raise InputError without a C++ compiler, which AOTInductor calls."""
    names = [name for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name]
    if not any(map(shutil.which, names)):
        raise InputError(
            f"--aot needs a C++ compiler, but {', '.join(names)} are not on PATH: install g++ or clang++, or set CXX"
        )


def _without_own_operators(program: ExportedProgram) -> ExportedProgram:
    """Replace fusedet's operators by torchvision's."""
    return program.run_decompositions({torch.ops.fusedet.nms_keep_mask.default: nms_over_images})


def _write_onnx(program: ExportedProgram, outputs: Sequence[str], path: Path, metadata: Metadata) -> Path:
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
    if metadata.precision == "fp16":
        _compress_weights(model)
    save_onnx(model, path, metadata)
    return path


def save_onnx(model: Any, path: Path, metadata: Metadata) -> None:
    """Write an ONNX model with the metadata inside, and check it."""
    import onnx

    entry = next((entry for entry in model.metadata_props if entry.key == KEY), None) or model.metadata_props.add()
    entry.key, entry.value = KEY, metadata.to_json()
    write_atomically(path, model.SerializeToString())
    onnx.checker.check_model(str(path), full_check=True)


def _compress_weights(model: Any) -> None:
    """Store the weights of an ONNX model in fp16, each followed by a cast: all computation stays in fp32."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or math.prod(tensor.dims) < LEAST_COMPRESSED:
            continue
        values, name = numpy_helper.to_array(tensor), tensor.name
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.fp16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = [*casts, *(node.__class__.FromString(node.SerializeToString()) for node in model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


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


def convert_to_openvino(source: Path) -> Any:
    """Convert an ONNX file to OpenVINO's model."""
    import openvino

    with without_telemetry():
        model = openvino.convert_model(source)
    keep_boxes_at_threshold(model)
    return model


def keep_boxes_at_threshold(model: Any) -> None:
    """Let OpenVINO's NMS keep boxes whose IoU is exactly the threshold, as PyTorch and ONNX Runtime do.

    OpenVINO suppresses them. Clipped boxes have such an IoU: of two that fill an image and half of it, it is 1 / 2.
    """
    from openvino import opset13

    for node in model.get_ops():
        if node.get_type_name() == "NonMaxSuppression":
            threshold = node.input_value(3).get_node().get_data()
            next_value = opset13.constant(np.nextafter(threshold, np.float32(1)))
            node.input(3).replace_source_output(next_value.output(0))


def save_openvino(model: Any, path: Path, metadata: Metadata) -> list[Path]:
    """Write OpenVINO's model with the metadata inside; the weights go to a .bin file beside the .xml file."""
    import openvino

    model.set_rt_info(metadata.to_json(), KEY)
    try:
        openvino.save_model(model, path, compress_to_fp16=metadata.precision == "fp16")
    except RuntimeError as error:
        raise StorageError(f"{path} cannot be written: {' '.join(str(error).split())[:200]}") from error
    return [path, path.with_suffix(".bin")]
