"""The parts of TOOD's task-aligned head.

References:
    "TOOD: Task-aligned One-stage Object Detection", Feng et al., 2021, section 3.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.models.ops.layers import GroupNorm, conv

REDUCTION = 8  # channels of the shared layers over those of the attention's hidden layer, per shared layer


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
    """Take each side of a cell's box from the map at the cell plus the side's own offset, bilinearly (eq. 7).

    A box whose sides would cross stays as it was. Samples outside the map are 0.

    Shape:
        boxes (N, 4, H, W); offsets (N, 8, H, W), in cells, a pair (dy, dx) for each side; result (N, 4, H, W).
    """
    sampled = sample_sides(boxes, offsets)
    crossed = (sampled[:, :2] > sampled[:, 2:]).any(dim=1, keepdim=True)
    return torch.where(crossed, boxes, sampled)


def sample_sides(boxes: Tensor, offsets: Tensor, padding: Literal["zeros", "border"] = "zeros") -> Tensor:
    """Sample every side as `sample_boxes` does; outside the map are zeros, or with "border" the nearest cells."""
    n, sides, height, width = boxes.shape
    dy, dx = offsets.unflatten(1, (sides, 2)).flatten(0, 1).unbind(dim=1)  # (N * 4, H, W)
    y = dy + torch.arange(height, device=boxes.device)[:, None]
    x = dx + torch.arange(width, device=boxes.device)
    # without aligned corners cell i lies at (2 i + 1) / length - 1
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    maps = boxes.flatten(0, 1)[:, None]
    return F.grid_sample(maps, grid, padding_mode=padding, align_corners=False).view(n, sides, height, width)
