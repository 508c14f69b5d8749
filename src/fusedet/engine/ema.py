"""Averaged weights: a copy of the detector that follows it slowly."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class Average:
    """An exponential moving average of a detector's parameters and buffers, as a detector of its own: `.module`.

    The decay starts low, (1 + n) / (10 + n) after n updates, so that the random start is soon forgotten. torch's AveragedModel
    is not used because it copies its counter to the GPU, and so waits for it, at every step.
    """

    def __init__(self, detector: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(detector).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, detector: nn.Module) -> None:
        """Move the average towards the detector's present weights; whole numbers (counters) are copied."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(_tensors(self.module), _tensors(detector), strict=True))
        floats = [(mine, theirs) for mine, theirs in pairs if mine.is_floating_point()]
        get_ema_multi_avg_fn(decay)([mine for mine, _ in floats], [theirs for _, theirs in floats], None)
        for mine, theirs in pairs:
            if not mine.is_floating_point():
                mine.copy_(theirs)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
