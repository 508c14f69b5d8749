"""The choice of floating-point precision for a device."""

from typing import Literal

import torch

from fusedet.errors import InputError

FabricPrecision = Literal["bf16-mixed", "16-mixed", "32-true"]
PRECISIONS: dict[str, FabricPrecision] = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}


def fabric_precision(name: str, device: torch.device | str) -> FabricPrecision:
    """Translate `train.precision` into Fabric's name for it.

    Args:
        name: bf16, fp16, fp32, or auto: bf16 where the GPU computes in it, else fp32.
        device: The device to train on.

    Raises:
        InputError: The device does not have the precision.
    """
    kind = torch.device(device).type
    gpu_bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return PRECISIONS["bf16" if gpu_bf16 else "fp32"]
    if name == "fp16" and kind == "cpu":
        raise InputError("precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
    if name == "bf16" and kind == "cuda" and not gpu_bf16:
        raise InputError("this GPU does not compute in bf16: use fp16 or fp32")
    return PRECISIONS[name]
