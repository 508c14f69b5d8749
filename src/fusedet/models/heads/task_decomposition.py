"""The parts of TOOD's task-aligned head.

References:
    "TOOD: Task-aligned One-stage Object Detection", Feng et al., 2021, section 3.1.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.models.heads.towers import make_tower
from fusedet.models.ops.cells import sample_sides
from fusedet.models.ops.layers import GroupNorm, conv

OFFSET_GROUPS = 4  # of a deformable shared convolution
REDUCTION = 8  # channels of the shared layers over those of the attention's hidden layer, per shared layer


class SharedTower(nn.ModuleList):
    """The stack of convolutions that both tasks share.

    Args:
        inputs: Input channels.
        channels: Output channels of each convolution.
        convs: Number of convolutions.
        norm: Use GroupNorm(32) after the convolutions, which have a bias without it.
        deformable: Number of convolutions, the first ones, that are deformable and modulated.
    """

    def __init__(self, inputs: int, channels: int, convs: int, norm: bool, deformable: int) -> None:
        super().__init__()
        for i in range(convs):
            width = inputs if i == 0 else channels
            self.append(make_tower(width, channels, 1, norm, not norm, i < deformable, offset_groups=OFFSET_GROUPS))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the joint outputs (N, convs * channels, H, W) of all convolutions from a level (N, C, H, W)."""
        layers = []
        for layer in self:
            x = layer(x)
            layers.append(x)
        return torch.cat(layers, dim=1)


class TaskDecomposition(nn.Module):
    """Features of one task: an attention over the shared layers, and a 1x1 convolution of the weighted layers.

    Args:
        channels: Channels of each shared layer and of the output.
        layers: Number of shared layers.
        norm: Use GroupNorm(32) after the convolution, which has a bias without it.
    """

    def __init__(self, channels: int, layers: int, norm: bool) -> None:
        super().__init__()
        joint, self.layers = channels * layers, layers
        hidden = max(joint // (REDUCTION * layers), 1)
        self.attention = nn.Sequential(conv(joint, hidden, 1), nn.ReLU(inplace=True), conv(hidden, layers, 1))
        self.reduce = conv(joint, channels, 1, bias=not norm)
        self.norm = GroupNorm(32, channels) if norm else nn.Identity()

    def forward(self, joint: Tensor, average: Tensor) -> Tensor:
        """Compute the task's features (N, C, H, W) from the shared layers (N, layers * C, H, W) and their average."""
        weights = self.attention(average).sigmoid()  # (N, layers, 1, 1)
        # the weights multiply the kernel, which is smaller than the maps
        kernel = (self.reduce.weight.unflatten(1, (self.layers, -1))[..., 0, 0] * weights[:, None, :, :, 0]).flatten(2)
        features = (kernel @ joint.flatten(2)).unflatten(2, joint.shape[2:])  # (N, C, H, W)
        if self.reduce.bias is not None:
            features = features + self.reduce.bias[:, None, None]
        out: Tensor = F.relu(self.norm(features))
        return out


def make_alignment(channels: int, layers: int, outputs: int) -> nn.Sequential:
    """Make the predictor of an alignment map from all shared layers (eq. 8)."""
    hidden = max(channels // 4, 1)
    return nn.Sequential(conv(channels * layers, hidden, 1), nn.ReLU(inplace=True), conv(hidden, outputs, 3))


def sample_boxes(boxes: Tensor, offsets: Tensor) -> Tensor:
    """Sample the sides of the cells' boxes as `sample_sides` does (eq. 7); zeros lie outside the map.

    A box whose sides would cross stays as it was.
    """
    sampled = sample_sides(boxes, offsets)
    crossed = (sampled[:, :2] > sampled[:, 2:]).any(dim=1, keepdim=True)
    return torch.where(crossed, boxes, sampled)
