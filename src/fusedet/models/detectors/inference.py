"""The copy of a detector that predicts."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from fusedet.models.ops.layers import fold_batch_norm

Detector = TypeVar("Detector", bound=nn.Module)


def prepare_for_inference(detector: Detector, precision: Literal["fp32", "bf16"] = "fp32") -> Detector:
    """A copy for prediction: in eval mode, batch norms folded into their convolutions, weights in bfloat16 where asked.

    With bf16, images are still normalised, and boxes and scores decoded, in float32.
    """
    detector = copy.deepcopy(detector).eval()
    backbone: Any = detector.backbone
    try:
        detector.backbone = fold_batch_norm(backbone, torch.rand(1, 3, 64, 96, device=backbone.scale.device))
    except RuntimeError as error:
        warnings.warn(f"{error}; prediction is the same without, only slower", stacklevel=2)
    if precision == "bf16":
        for parameter in detector.parameters():  # buffers (normalisation, anchors) keep float32
            parameter.data = parameter.data.to(torch.bfloat16)
    return detector
