"""Computation in its own precision inside autocast."""

import torch
from torch import Tensor


def without_autocast(x: Tensor) -> torch.autocast:
    """Disable autocast on x's device; the meta device has no autocast and uses the CPU's."""
    return torch.autocast("cpu" if x.device.type == "meta" else x.device.type, enabled=False)
