"""Image preprocessing on the device: normalization and zero padding."""

import torch
from torch import Tensor


def normalize_images(
    images: Tensor, scale: Tensor, shift: Tensor, sizes: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Normalize uint8 images to images * scale + shift, in channels_last; the padding is 0 afterwards.

    Shape:
        images (N, C, H, W) uint8; scale and shift (C, 1, 1); sizes (N, 2), height and width inside the padding, None
        for no padding; result (N, C, H, W) of `dtype`.
    """
    x = torch.addcmul(shift, images.to(scale.dtype, memory_format=torch.channels_last), scale).to(dtype)
    if sizes is None:
        return x
    rows = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]  # (N, H)
    columns = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]
    return x * (rows[:, None, :, None] & columns[:, None, None, :])
