"""Copies of a detector that are optimized for inference."""

import copy
import warnings
from typing import Literal, TypeVar

import torch
from torch import nn

from fusedet.models.detectors.factory import DetectorModule
from fusedet.models.ops.layers import fold_batch_norm

DetectorT = TypeVar("DetectorT", bound=DetectorModule)


def prepare_for_inference(detector: DetectorT, precision: Literal["fp32", "bf16"] = "fp32") -> DetectorT:
    """Copy a detector in eval mode, with every BatchNorm of the backbone folded into its convolution.

    Args:
        detector: A detector of `models.detectors`; it stays as it is.
        precision: Type of the copy's weights. With "bf16", images are still normalized, and boxes and scores decoded,
            in float32. Every BatchNorm that is not folded keeps float32.
    """
    detector = copy.deepcopy(detector)
    detector.eval()
    scale = detector.backbone.scale
    example = torch.rand(1, len(scale), 64, 96, device=scale.device)
    try:
        detector.set_submodule("backbone", fold_batch_norm(detector.get_submodule("backbone"), example))
    except RuntimeError as error:
        warnings.warn(f"{error}; predictions are the same without it, only slower", stacklevel=2)
    if precision == "bf16":
        for module in detector.modules():  # buffers (normalization, anchors) keep float32
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                continue  # torch takes parameters only in the type of the running statistics, which are buffers
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(torch.bfloat16)
    return detector
