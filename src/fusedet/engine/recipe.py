"""How a training goes: its options, checked when made, and the choice of precision."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fusedet.config import Interval
from fusedet.engine.optim import Optim
from fusedet.errors import InputError, unknown

PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}


@dataclass(frozen=True)
class Recipe:
    """How long and how a detector is trained.

    clip_norm: the largest gradient norm, or None. accumulate: batches per step; each keeps its own loss normaliser.
    ema_decay: averaged weights are kept, validated and saved as the best ones, or None.
    validate_every: in epochs; the last epoch is always validated. checkpoint_every: how often last.ckpt is written within an epoch,
    besides at its end; it changes no result. monitor: the metric whose highest value is the best.
    patience: validations without improvement after which the training ends, or None.
    compile: torch.compile the detector's `forward` (not its loss), worth its minutes of compilation on long GPU runs.
    log_every: in steps; an epoch's last step is always logged.
    """

    epochs: int = 12
    optim: Optim = field(default_factory=Optim)
    clip_norm: float | None = None
    accumulate: int = 1
    ema_decay: float | None = None
    validate_every: int = 1
    checkpoint_every: Interval | None = None
    monitor: str = "AP"
    patience: int | None = None
    compile: bool = False
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulate", "validate_every", "log_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be 1 or more, got {value}")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"clip_norm must be above 0, got {self.clip_norm}: leave it out to clip nothing")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, such as 0.999, got {self.ema_decay}")


def precision(name: str, device: torch.device | str) -> str:
    """Fabric's word for auto, bf16, fp16 or fp32 on a device; auto is bf16 where the GPU computes in it, else fp32.

    Raises InputError for an unknown name and for a precision that the device does not have.
    """
    kind = torch.device(device).type
    gpu_bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        return PRECISIONS["bf16" if gpu_bf16 else "fp32"]
    if name not in PRECISIONS:
        raise unknown("precision", name, ("auto", *PRECISIONS))
    if name == "fp16" and kind == "cpu":
        raise InputError("precision fp16 needs a GPU: use bf16 or fp32 on the CPU")
    if name == "bf16" and kind == "cuda" and not gpu_bf16:
        raise InputError("this GPU does not compute in bf16: use fp16 or fp32")
    return PRECISIONS[name]
