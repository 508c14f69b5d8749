"""Cost of a detector: parameters and multiply-adds, per part."""

import copy
import math
from typing import Any, cast

import torch
import torchvision  # noqa: F401  (registers the operator)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fusedet.function_skipping import shapes_only
from fusedet.models.protocols import InferenceDetector
from fusedet.types import MULTIPLE


def count_deform_conv_flops(
    input_shape: list[int], weight_shape: list[int], *_: Any, out_shape: list[int], **__: Any
) -> int:
    """Count the floating-point operations of a deformable convolution: the plain one's, without the sampling."""
    return 2 * math.prod(weight_shape[1:]) * math.prod(out_shape)


FLOP_FORMULAS = {torch.ops.torchvision.deform_conv2d: count_deform_conv_flops}


def network_size(size: tuple[int, int]) -> tuple[int, int]:
    """Compute height and width of the largest network input: data.size padded to multiples of the stride."""
    short, long = (-(-side // MULTIPLE) * MULTIPLE for side in size)
    return short, long


def count_cost(detector: nn.Module, height: int, width: int, channels: int = 3) -> dict[str, Any]:
    """Count the parameters, trainable parameters and multiply-adds of a detector and of each part.

    Multiply-adds are those of convolutions and matrix products of one image through `detect`, counted without computing
    anything, on the meta device. RoI stages run on as many proposals and RoI branches, such as masks, on as many
    detections as there can be. Not counted: non-maximum suppression and element-wise operations.

    Args:
        detector: The detector; it is not changed.
        height: Height of the image, in pixels.
        width: Width of the image.
        channels: Channels of the image.

    Returns:
        `parameters`, `trainable`, `multiply_adds`, `image` [height, width], and `parts`: the first three per part's
        name.
    """
    shadow = copy.deepcopy(detector).to("meta").eval()
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter, torch.no_grad(), shapes_only():
        images = torch.zeros(1, channels, height, width, dtype=torch.uint8, device="meta")
        cast("InferenceDetector", shadow).detect(images, torch.tensor([[height, width]], device="meta"))
    flops = counter.get_flop_counts()
    root = type(shadow).__name__

    def count_products(name: str, module: nn.Module) -> int:
        # a ModuleList is never called itself
        inside = (count_products(f"{name}.{key}", part) for key, part in module.named_children())
        return sum(flops[name].values()) // 2 if name in flops else sum(inside)

    def count(name: str, module: nn.Module) -> dict[str, int]:
        parameters = list(module.parameters())
        return {
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
            "multiply_adds": count_products(name, module),
        }

    children = [(name, part) for name, part in detector.named_children() if any(True for _ in part.parameters())]
    parts = {name: count(f"{root}.{name}", part) for name, part in children}
    return count("Global", detector) | {"image": [height, width], "parts": parts}
