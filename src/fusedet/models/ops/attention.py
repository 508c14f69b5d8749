"""Channel attention, shared by several modules."""

from torch import Tensor, nn

from fusedet.models.ops.layers import conv


class ChannelAttention(nn.Module):
    """Channel attention: sigmoid(MLP(average) + MLP(maximum)) of a map, one weight per channel.

    One MLP serves both: C -> C / reduction -> C with a ReLU between.

    References:
        "CBAM: Convolutional Block Attention Module", Woo et al., 2018, eq. 2.
    """

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.mlp = nn.Sequential(conv(channels, hidden, 1), nn.ReLU(), conv(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the weights (N, C, 1, 1), in 0..1, of x (N, C, H, W)."""
        average, maximum = x.mean(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
        return (self.mlp(average) + self.mlp(maximum)).sigmoid()
