"""Attention that more than one paper borrows."""

from __future__ import annotations

from torch import Tensor, nn

from fusedet.models.ops.layers import conv


class ChannelAttention(nn.Module):
    """sigmoid(MLP(average) + MLP(maximum)) of a map, one weight per channel (CBAM, Woo et al., 2018, eq. 2).

    One MLP for both, C -> C / reduction -> C with a ReLU between.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(conv(channels, hidden, 1), nn.ReLU(), conv(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to weights (N, C, 1, 1) in 0..1."""
        average, maximum = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return (self.mlp(average) + self.mlp(maximum)).sigmoid()
