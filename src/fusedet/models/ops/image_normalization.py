"""Images on their way into the body."""

from __future__ import annotations

import torch
from torch import Tensor


def normalise_images(
    images: Tensor, scale: Tensor, shift: Tensor, sizes: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """uint8 images (N, 3, H, W) times scale plus shift (3, 1, 1), in channels_last; the padding outside sizes (N, 2) is 0 after it."""
    x = torch.addcmul(shift, images.to(scale.dtype, memory_format=torch.channels_last), scale).to(dtype)
    if sizes is None:
        return x
    rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]  # (N, H)
    columns = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
    return x * (rows[:, None, :, None] & columns[:, None, None, :])
