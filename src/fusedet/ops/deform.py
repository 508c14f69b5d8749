"""Deformable convolutions: "Deformable Convolutional Networks", Dai et al., 2017 (v1), and Zhu et al., 2019 (v2, modulated)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformConv(nn.Module):
    """A convolution that samples at given offsets; keeps the size at stride 1.

    weight (outputs, inputs / groups, kernel, kernel); bias (outputs,) where asked. The sampling has kernels for float32 alone, so that
    is what it computes in; the result has the type of the input.
    """

    bias: nn.Parameter | None

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, dilation: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        self.out_channels, self.kernel, self.stride, self.dilation = outputs, kernel, stride, dilation
        self.padding = dilation * (kernel // 2)
        self.weight = nn.Parameter(torch.empty(outputs, inputs // groups, kernel, kernel))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs)) if bias else None)
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.weight[0].numel()), 1 / math.sqrt(self.weight[0].numel()))

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), offset (N, 2 * kernel^2, H', W') in cells as (dy, dx) pairs row by row, mask (N, kernel^2, H', W') or None."""
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(x.device.type, enabled=False):
            y = deform_conv2d(
                x.float(),
                offset.float(),
                self.weight.float(),
                bias,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                mask=None if mask is None else mask.float(),
            )
        return y.to(x.dtype)


class DeformPack(DeformConv):
    """A deformable convolution that predicts its own offsets, and its mask where `modulated`; starts as the plain convolution
    (times one half where modulated, as a sigmoid starts)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 3,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        bias: bool = False,
        modulated: bool = False,
    ) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups, dilation, bias)
        self.modulated, self.points = modulated, kernel**2
        self.offset = nn.Conv2d(inputs, (3 if modulated else 2) * self.points, kernel, stride, self.padding, dilation)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """(N, C, H, W) to (N, outputs, H', W')."""
        offset = self.offset(x)
        if self.modulated:
            offset, logits = offset.split([2 * self.points, self.points], dim=1)
            mask = logits.sigmoid()
        return super().forward(x, offset, mask)
