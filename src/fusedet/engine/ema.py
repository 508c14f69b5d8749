"""Averaged weights: a copy of the detector that follows it slowly."""

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fusedet.models.detectors import DetectorModule


class EMA:
    """An exponential moving average of a detector's parameters and buffers, as a detector: `module`.

    The decay starts low, (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten. torch's
    AveragedModel copies its counter to the GPU at every step, and so synchronizes with it; this class does not.
    """

    def __init__(self, detector: DetectorModule, decay: float) -> None:
        self.module = copy.deepcopy(detector).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, detector: DetectorModule) -> None:
        """Move the average towards the detector's present weights; integers (counters) are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(_tensors(self.module), _tensors(detector), strict=True))
        floats = [(average, current) for average, current in pairs if average.is_floating_point()]
        get_ema_multi_avg_fn(decay)([average for average, _ in floats], [current for _, current in floats], None)
        for average, current in pairs:
            if not average.is_floating_point():
                average.copy_(current)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
