"""Quantization to int8: of convolutions for ONNX Runtime, by NNCF for OpenVINO.

Box decoding and selection stay in floating point.
"""

import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fusedet.exporters.formats import convert_to_openvino
from fusedet.exporters.telemetry import without_telemetry
from fusedet.quiet import quiet

Inputs = Mapping[str, np.ndarray]
"""Arrays by the names of the file's inputs."""


class InputSource(Protocol):
    """Inputs that can be read several times."""

    def __len__(self) -> int:
        """Return their number."""

    def __iter__(self) -> Iterator[Inputs]:
        """Yield them."""


FLOATING_POINT = (
    "Multiply",
    "Add",
    "Subtract",
    "Divide",
    "Exp",
    "Sigmoid",
    "Maximum",
    "Minimum",
    "Concat",
    "MVN",
    "TopK",
    "GroupNormalization",
)
"""OpenVINO's operations that stay in floating point, except those of `find_map_operations`.

NNCF's defaults quantize coordinates of boxes to 256 values.
"""
INT8_MAP_OPERATIONS = ("Add", "AvgPool", "Interpolate")
"""OpenVINO's operations on feature maps, beside convolutions, that NNCF puts into int8."""
MAP_OPERATIONS = ("Add", "Relu", "MaxPool", "AvgPool", "Interpolate")
"""OpenVINO's operations between the sum of two feature maps and the convolution that reads it."""
REGRESSION = ("reg", "refine", "pts_init", "pts_refine")
"""Layers of dense heads whose outputs are decoded to boxes."""
PACKAGES = {"onnx": (), "openvino": ("nncf", "onnxruntime")}
"""The packages that int8 needs in addition; the price is relative to the file in fp32 in ONNX Runtime."""


def group_convolutions(model: Any) -> dict[str, list[str]]:
    """Return the names of an ONNX model's convolutions by the name of their weight, in the order of the graph.

    The heads of a pyramid use one weight on every level.
    """
    groups: dict[str, list[str]] = {}
    for node in model.graph.node:
        if node.op_type == "Conv":
            groups.setdefault(node.input[1], []).append(node.name)
    return groups


def find_regression(model: Any) -> list[str]:
    """Return the names of an ONNX model's convolutions whose outputs are deltas, distances or points of boxes.

    `quantize_onnx` keeps them in floating point, because QDQ pairs would round these outputs to 256 steps.
    """
    weights = {f"detector.head.{layer}.weight" for layer in REGRESSION}
    return [name for weight, names in group_convolutions(model).items() if weight in weights for name in names]


def quantize_onnx(source: Path, target: Path, inputs: Iterable[Inputs], excluded: Sequence[str]) -> None:
    """Quantize the convolutions of an ONNX file: weights per channel, activations per tensor, as QDQ pairs.

    Args:
        source: The file in fp32.
        target: The file to write.
        inputs: What the ranges of the activations are taken from.
        excluded: Names of convolutions that stay in floating point, besides those of `find_regression`.
    """
    import onnx
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.iterator = iter(inputs)

        def get_next(self) -> Any:
            return next(self.iterator, None)

    with _silence():
        quantization.quantize_static(
            source,
            target,
            Reader(),
            # ONNX Runtime fuses fewer convolutions with int8 activations, and converts more often around a Relu in fp32
            op_types_to_quantize=["Conv", "Relu"],
            activation_type=quantization.QuantType.QUInt8,
            per_channel=True,
            nodes_to_exclude=[*excluded, *find_regression(onnx.load(source))],
        )


@without_telemetry()
def quantize_openvino(source: Path, inputs: InputSource, excluded: Sequence[str]) -> Any:
    """Quantize the model of an ONNX file by NNCF: convolutions, matrix products and what lies between them.

    Args:
        source: The file in fp32.
        inputs: What the ranges of the activations are taken from.
        excluded: Names of convolutions that stay in floating point.

    Returns:
        OpenVINO's model.
    """
    with _silence():
        import nncf

    model = convert_to_openvino(source)
    names, layers = [node.get_friendly_name() for node in model.get_ops()], set(excluded)
    # a convolution with a bias becomes two operations, of which the first has a suffix
    kept = {name for name in names if name.partition("/")[0] in layers}
    between = {node.get_friendly_name() for node in model.get_ops() if node.get_type_name() in INT8_MAP_OPERATIONS}
    kept |= between - set(find_map_operations(model, kept))
    types = [name for name in FLOATING_POINT if name != "Add"]
    ignored = nncf.IgnoredScope(types=types, names=sorted(kept), validate=False)
    with _silence():
        return nncf.quantize(
            model, nncf.Dataset(inputs), subset_size=len(inputs), ignored_scope=ignored, model_type=None
        )


def find_map_operations(model: Any, excluded: Collection[str] = ()) -> list[str]:
    """Return the names of an OpenVINO model's `INT8_MAP_OPERATIONS` whose maps an int8 convolution reads.

    The sums are the residual connections of a backbone and the top-down sums of a pyramid. In floating point, each
    would turn the int8 output of a convolution into fp32 and back. Additions of box decoding do not count: no
    convolution reads them.

    Args:
        model: OpenVINO's model.
        excluded: Names of the convolutions that stay in floating point.
    """
    return [
        node.get_friendly_name()
        for node in model.get_ops()
        if node.get_type_name() in INT8_MAP_OPERATIONS
        and (node.get_type_name() != "Add" or not _has_constant(node))
        and _is_read_by_convolution(node, excluded)
    ]


def _has_constant(node: Any) -> bool:
    return any(value.get_node().get_type_name() == "Constant" for value in node.input_values())


def _is_read_by_convolution(node: Any, excluded: Collection[str]) -> bool:
    """Return whether a convolution that is not excluded reads a map, directly or after `MAP_OPERATIONS`."""
    waiting, known = [node], {node.get_friendly_name()}
    while waiting:
        for use in chain.from_iterable(output.get_target_inputs() for output in waiting.pop().outputs()):
            user = use.get_node()
            kind, name = user.get_type_name(), user.get_friendly_name()
            if kind in ("Convolution", "GroupConvolution") and use.get_index() == 0 and name not in excluded:
                return True
            if kind in MAP_OPERATIONS and (kind == "Add" or use.get_index() == 0) and name not in known:
                known.add(name)
                waiting.append(user)
    return False


def rank_convolutions(
    source: Path,
    quantized: Path,
    inputs: Sequence[Inputs],
    compute_similarity: Callable[[Mapping[str, np.ndarray], Mapping[str, np.ndarray]], float],
) -> list[list[str]]:
    """Rank the convolutions of an ONNX file by what quantizing only them changes in the detections.

    Args:
        source: The file in fp32.
        quantized: The same file from `quantize_onnx`, without exclusions.
        inputs: A few inputs.
        compute_similarity: Function of outputs in fp32 and others, 1 for equal ones.

    Returns:
        Names of the convolutions of each weight, the most sensitive weight first.
    """
    import onnx

    model, donor = onnx.load(source), onnx.load(quantized)
    reference = _run(model, inputs)
    losses = []
    for names in group_convolutions(model).values():
        outputs = _run(_quantize_only(model, donor, names), inputs)
        losses.append((-np.mean([compute_similarity(a, b) for a, b in zip(reference, outputs)]), names))
    return [names for _, names in sorted(losses, key=lambda row: row[0], reverse=True)]


def _quantize_only(model: Any, donor: Any, names: Sequence[str]) -> Any:
    """Return an ONNX model with the QDQ pairs that a quantized copy has before some of its convolutions."""
    import onnx

    result = onnx.ModelProto()
    result.CopyFrom(model)
    made_by = {output: node for node in donor.graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in donor.graph.initializer}
    existing = {tensor.name for tensor in model.graph.initializer}
    added: dict[str, Any] = {}
    nodes = []
    for node in result.graph.node:
        if node.name in names:
            (twin,) = (other for other in donor.graph.node if other.name == node.name)
            for i, tensor in enumerate(twin.input[:2]):  # a bias in int32 loses nothing
                pair = [made_by[tensor]] if tensor in made_by else []
                if pair and pair[0].op_type == "DequantizeLinear" and pair[0].input[0] in made_by:
                    pair.insert(0, made_by[pair[0].input[0]])
                if not pair or pair[-1].op_type != "DequantizeLinear":
                    continue
                nodes += [x for x in pair if x.output[0] not in added]
                added |= {x.output[0]: None for x in pair}
                used = [name for x in pair for name in x.input if name in constants and name not in existing]
                added |= {name: constants[name] for name in used}
                node.input[i] = tensor
        nodes.append(node)
    result.graph.initializer.extend(tensor for tensor in added.values() if tensor is not None)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del result.graph.node[:]
    result.graph.node.extend(copies)
    return result


def _run(model: Any, inputs: Sequence[Inputs]) -> list[dict[str, np.ndarray]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return [dict(zip(names, session.run(names, dict(arrays)))) for arrays in inputs]


@contextmanager
def _silence() -> Iterator[None]:
    """Hide progress bars and remarks of the quantizers."""
    with quiet("", "nncf", "torch.utils.cpp_extension"), redirect_stdout(io.StringIO()):
        yield


def choose_exclusions(ranking: Sequence[Sequence[str]], share: float) -> list[str]:
    """Return the names of the most sensitive share of the weights' convolutions."""
    return list(chain.from_iterable(ranking[: max(1, round(share * len(ranking)))]))
