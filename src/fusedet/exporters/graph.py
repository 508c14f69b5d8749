"""A detector as an exported program, with fixed or dynamic sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import padding
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from fusedet.garbage_collection import pause_garbage_collection
from fusedet.models.detectors import DetectorModule, OneStage
from fusedet.models.ops.exporting import exporting, is_symbolic
from fusedet.types import MULTIPLE, BatchDetections

INPUTS = ("images", "sizes")
OUTPUTS = BatchDetections._fields
"""Names of the outputs, in order; `masks` exists where the detector has a mask branch."""
RAW_OUTPUTS = ("boxes", "scores", "quality")
"""Names of the outputs without the final selection; `quality` exists where the head predicts it."""


@dataclass(frozen=True)
class Shapes:
    """What sizes an exported file takes.

    Attributes:
        size: Height and width of the images; None for any multiple of 32.
        batch: Number of images; None for any.
    """

    size: tuple[int, int] | None = None
    batch: int | None = None


class _Graph(nn.Module):
    """A detector whose forward is the exported function."""

    def __init__(self, detector: DetectorModule, raw: bool) -> None:
        super().__init__()
        self.detector, self.raw = detector, raw

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor | None, ...]
        if self.raw:
            outputs = decode_candidates(self.detector, images, sizes)
        else:
            outputs = self.detector.detect(images, sizes)
        return tuple(output for output in outputs if output is not None)


def decode_candidates(detector: DetectorModule, images: Tensor, sizes: Tensor) -> tuple[Tensor | None, ...]:
    """Compute boxes, scores and quality before the final selection, as `Candidates` describes them."""
    outputs = detector(images, sizes)
    if isinstance(detector, OneStage):
        return detector.head.decode(outputs)
    return detector.stages[-1].decode(outputs.raw, outputs.rois, outputs.counts)


def example_size(detector: DetectorModule) -> tuple[int, int]:
    """Return height and width to trace a program of dynamic size with: every level has 3 x 4 cells or more.

    A level of one cell would have one in every run of the program.
    """
    coarsest = max(MULTIPLE, detector.neck.levels.strides[-1])
    return 2 * coarsest + MULTIPLE, 3 * coarsest + MULTIPLE


def smallest_side(program: ExportedProgram) -> int:
    """Return the smallest height and width that a program of `trace` takes, by what tracing asked of its input."""
    (images,) = (node for node in program.graph.nodes if node.op == "placeholder" and node.name == INPUTS[0])
    factors = set().union(*(side.node.expr.free_symbols for side in images.meta["val"].shape[2:] if is_symbolic(side)))
    return MULTIPLE * max([1, *(int(program.range_constraints[factor].lower) for factor in factors)])


@contextmanager
def constant_padding() -> Iterator[None]:
    """Let timm pad by constants in models of TensorFlow's "same" padding, such as tf_efficientnet_lite0.

    Every stride divides the sides that it meets, as the input's are multiples of 32: what timm computes from the side
    is a constant. As an expression of a dynamic side it grows with every layer, until tracing does not end.
    """
    compute = padding.get_same_padding

    def compute_constant(x: int, kernel_size: int, stride: int, dilation: int) -> int:
        return max((kernel_size - 1) * dilation + 1 - stride, 0)

    padding.get_same_padding = compute_constant
    try:
        yield
    finally:
        padding.get_same_padding = compute


@pause_garbage_collection()
def trace(detector: DetectorModule, shapes: Shapes, raw: bool = False) -> tuple[ExportedProgram, tuple[str, ...], int]:
    """Trace a detector; images go in as uint8, and normalization and NMS are in the program.

    Args:
        detector: In eval mode, on the CPU.
        shapes: The sizes that the program takes.
        raw: Leave the final selection out.

    Returns:
        The program, the names of its outputs, and the smallest side that it takes where sizes are dynamic.
    """
    height, width = shapes.size or example_size(detector)
    batch = shapes.batch or 2
    images = torch.zeros(batch, 3, height, width, dtype=torch.uint8)
    sizes = torch.tensor([[height, width]]).repeat(batch, 1)
    dynamic: dict[str, Any] = {"images": {}, "sizes": {}}
    if shapes.batch is None:
        count = Dim("batch")
        dynamic = {"images": {0: count}, "sizes": {0: count}}
    if shapes.size is None:
        dynamic["images"] |= {2: MULTIPLE * Dim("rows"), 3: MULTIPLE * Dim("columns")}
    with exporting(), constant_padding(), torch.no_grad():
        program = torch.export.export(_Graph(detector, raw), (images, sizes), dynamic_shapes=dynamic, strict=False)
    count_outputs = len(program.graph_signature.user_outputs)
    return program, (RAW_OUTPUTS if raw else OUTPUTS)[:count_outputs], smallest_side(program)
