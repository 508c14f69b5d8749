"""Copies of a detector that are optimized for inference."""

import copy
import warnings
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fusedet.models.ops.layers import fold_batch_norm

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def prepare_for_inference(detector: ModuleT, precision: Literal["fp32", "bf16"] = "fp32") -> ModuleT:
    """Copy a detector in eval mode, with every BatchNorm folded into its convolution.

    Args:
        detector: A detector of `models.detectors`; it stays as it is.
        precision: Type of the copy's weights. With "bf16", images are still normalized, and boxes and scores decoded,
            in float32.
    """
    detector = copy.deepcopy(detector).eval()
    backbone: Any = detector.backbone
    try:
        detector.backbone = fold_batch_norm(
            backbone, torch.rand(1, len(backbone.scale), 64, 96, device=backbone.scale.device)
        )
    except RuntimeError as error:
        warnings.warn(f"{error}; predictions are the same without it, only slower", stacklevel=2)
    if precision == "bf16":
        for parameter in detector.parameters():  # buffers (normalization, anchors) keep float32
            parameter.data = parameter.data.to(torch.bfloat16)
    return detector
