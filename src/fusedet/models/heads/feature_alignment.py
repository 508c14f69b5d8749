"""FoveaBox's feature alignment.

References:
    "FoveaBox: Beyond Anchor-Based Object Detection", Kong et al., 2020, section 3.5.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.ops.deformable import DeformConv
from fusedet.models.ops.layers import GroupNorm, conv

OFFSET_SETS = 4  # groups of channels with offsets of their own
WIDER = 4  # channels of the classification branch behind the alignment, in those of the towers


class Alignment(nn.Module):
    """The classification branch behind the predicted box: deformable convolution, then 3x3 and 1x1 convolutions.

    Args:
        inputs: Channels of the level.
        channels: Channels of the deformable convolution; the tower has `WIDER` times as many.
        norm: GroupNorm(32) after both convolutions of the tower.
        bias: Biases of the tower's convolutions.

    Raises:
        InputError: `OFFSET_SETS` does not divide the level's channels.
    """

    def __init__(self, inputs: int, channels: int, norm: bool, bias: bool) -> None:
        super().__init__()
        if inputs % OFFSET_SETS:
            raise InputError(
                f"align=true needs levels with channels in multiples of {OFFSET_SETS}, got {inputs}: set align=false "
                "or another model.pyramid.channels"
            )
        self.offset = nn.Conv2d(4, OFFSET_SETS * 18, 1, bias=False)
        self.conv = DeformConv(inputs, channels)
        layers: list[nn.Module] = []
        for width, kernel in ((channels, 3), (channels * WIDER, 1)):
            layers.append(conv(width, channels * WIDER, kernel, bias=bias))
            layers += [GroupNorm(32, channels * WIDER)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        self.tower = nn.Sequential(*layers)

    def init_weights(self) -> None:
        """Initialize the offsets and the deformable convolution as MMDetection does."""
        nn.init.normal_(self.offset.weight, std=0.1)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, feature: Tensor, box: Tensor) -> Tensor:
        """Compute features (N, 4 * channels, H, W) from a level (N, C, H, W) and its boxes (N, 4, H, W)."""
        offset = self.offset(box.exp().to(feature.dtype))
        return self.tower(F.relu(self.conv(feature, offset)))
