"""PyTorch's outputs, with which those of an exported file are compared."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedet.exporters.graph import decode_candidates
from fusedet.exporters.metadata import Metadata
from fusedet.exporters.verification import Case
from fusedet.models.detectors import DetectorModule, TwoStage
from fusedet.models.heads import FCOSHead
from fusedet.types import Outputs

NUDGES = 16
"""Changes of PyTorch's outputs that are tried before a detection counts as different."""


@torch.no_grad()
def compute_outputs(detector: DetectorModule, case: Case, metadata: Metadata) -> dict[str, Any]:
    """Compute PyTorch's outputs by name, as `fusedet predict` computes them."""
    images, sizes = torch.from_numpy(case.images), torch.from_numpy(case.sizes)
    outputs = decode_candidates(detector, images, sizes) if metadata.raw else detector.detect(images, sizes)
    tensors = (output for output in outputs if output is not None)
    return {name: tensor.numpy() for name, tensor in zip(metadata.outputs, tensors, strict=True)}


def compute_nudged_outputs(
    detector: DetectorModule, case: Case, metadata: Metadata, noise: float
) -> Iterator[dict[str, Any]]:
    """Compute PyTorch's outputs with noise on the outputs of head and stages.

    Args:
        detector: In eval mode.
        case: The input.
        metadata: Of the export.
        noise: Size of the relative noise.

    Yields:
        The detector's outputs, `NUDGES` times, each with noise of its own.
    """
    for seed in range(NUDGES):
        generator = torch.Generator().manual_seed(seed)

        def nudge(*arguments: Any, generator: torch.Generator = generator) -> Any:
            return _add_noise(arguments[-1], generator, noise)

        parts: list[Any] = [detector.head, *(detector.stages if isinstance(detector, TwoStage) else ())]
        hooks = [part.register_forward_hook(nudge) for part in parts]
        outputs = compute_outputs(detector, case, metadata)
        for hook in hooks:
            hook.remove()
        yield outputs


def _add_noise(value: Any, generator: torch.Generator, noise: float) -> Any:
    """Return maps, logits and deltas with relative noise; priors stay."""
    if isinstance(value, Tensor):
        return value + noise * torch.randn(value.shape, generator=generator) * value.abs().clamp(min=0.1)
    if isinstance(value, Outputs):
        return value._replace(maps=_add_noise(value.maps, generator, noise))
    if isinstance(value, dict):
        return {key: _add_noise(item, generator, noise) for key, item in value.items()}
    return (
        type(value)(_add_noise(item, generator, noise) for item in value) if isinstance(value, (list, tuple)) else value
    )


def spread_scores(detector: DetectorModule) -> None:
    """Widen the random weights of the heads and shift all layers, so that scores differ by more than rounding.

    Where a ReLU computes the distances of the boxes, their last bias is raised.
    """
    for key, parameter in detector.named_parameters():
        if parameter.ndim < 2:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
        elif key.startswith(("head.", "stages.", "branches.")):
            fan_in = parameter[0].numel()
            parameter.data.mul_(0.3 / (parameter.data.std().clamp(min=1e-6) * fan_in**0.5))
    if isinstance(detector.head, FCOSHead) and detector.head.normalize_boxes:
        # a stride and more to each side: a ReLU that is closed leaves no box with an area
        detector.head.reg.bias.data.clamp_(min=1)  # type: ignore[union-attr]
