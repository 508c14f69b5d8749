"""Swin Transformers of timm on images of any size.

References:
    "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", Liu et al., 2021.
"""

from typing import Any

from timm.models.swin_transformer import SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F


class _PaddedBlock(SwinTransformerBlock):
    """A block that pads to whole windows before it shifts them, as the authors' detection code does.

    timm shifts first, so that the padding lies inside the shifted map.
    """

    def _attn(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        down, right = (-side % window for side, window in zip((height, width), self.window_size))
        padded = F.pad(x, (0, 0, 0, right, 0, down))
        return super()._attn(padded)[:, :height, :width]


def size_options(name: str) -> dict[str, Any]:
    """Return the arguments with which a timm model takes images of any size; none for models that do anyway."""
    return {"strict_img_size": False, "always_partition": True} if name.startswith("swin_") else {}


def pad_before_shift(model: nn.Module) -> None:
    """Let every Swin block pad its map before the cyclic shift."""
    for module in model.modules():
        if type(module) is SwinTransformerBlock:
            module.__class__ = _PaddedBlock
