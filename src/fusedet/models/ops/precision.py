"""Steps that keep their own precision inside autocast."""

from __future__ import annotations

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which nothing is cast on x's device (the meta device has no autocast: the CPU's stands in)."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)
