"""Dynamic head: attention over levels, positions and channels of a pyramid.

References:
    "Dynamic Head: Unifying Object Detection Heads with Attentions", Dai et al., 2021.
    "Dynamic ReLU", Chen et al., 2020: the attention over channels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.ops.deformable import DeformConv
from fusedet.models.ops.layers import GroupNorm, conv, init_normal
from fusedet.types import Features, Levels

GROUPS = 16  # of the GroupNorm behind a deformable convolution
REDUCTION = 4  # of the channels inside the dynamic ReLU
POINTS = 9  # of a 3x3 convolution


class DyHead(nn.Module):
    """Refine a pyramid by blocks of attention; it follows a neck: neck=[fpn, dyhead].

    Args:
        levels: The levels of the neck before, of equal channels; the output has the same.
        blocks: Number of blocks (table 4: 6).

    Raises:
        InputError: The levels have unequal channels or no multiple of 16, or `blocks` is below 1.
    """

    def __init__(self, levels: Levels, blocks: int = 6) -> None:
        super().__init__()
        channels = levels.channels[0]
        if set(levels.channels) != {channels} or channels % GROUPS:
            raise InputError(
                f"dyhead needs levels of equal channels, a multiple of {GROUPS}, got {levels.channels}: put it after "
                "another neck, as in neck=[fpn, dyhead]"
            )
        if blocks < 1:
            raise InputError(f"blocks={blocks} must be at least 1")
        self.levels = levels
        self.blocks = nn.Sequential(*(DyHeadBlock(channels) for _ in range(blocks)))

    def forward(self, features: Features) -> Features:
        """Refine levels (N, C, H_l, W_l), finest first, to levels of the same shapes."""
        refined: Features = self.blocks(features)
        return refined


class DyHeadBlock(nn.Module):
    """One block (section 3.2): modulated deformable convolutions of each level and its neighbors, then attention.

    Offsets and masks of a level serve its neighbors too. The coarser neighbor's map has fewer cells than offsets; as
    in the authors' code, which upsamples behind the convolution, it takes as many of them as it needs in memory order.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.finer, self.own, self.coarser = (DeformedNorm(channels, stride) for stride in (2, 1, 1))
        self.offset = conv(channels, 3 * POINTS, 3)
        self.scale = nn.Conv2d(channels, 1, 1)
        self.relu = DynamicReLU(channels)
        for layer in (self.offset, self.scale):
            init_normal(layer)
        nn.init.zeros_(self.offset.weight)

    def forward(self, features: Features) -> Features:
        """Refine levels (N, C, H_l, W_l), finest first, to levels of the same shapes."""
        refined = []
        for i, feature in enumerate(features):
            offset, logits = self.offset(feature).split([2 * POINTS, POINTS], dim=1)
            mask = logits.sigmoid()
            parts = [self.own(feature, offset, mask)]
            if i > 0:
                parts.append(self.finer(features[i - 1], offset, mask))
            if i + 1 < len(features):
                above = features[i + 1]
                raw = self.coarser(above, _take_first(offset, above), _take_first(mask, above))
                parts.append(F.interpolate(raw, size=feature.shape[2:], mode="bilinear", align_corners=True))
            refined.append(self.relu(sum(part * self._attend(part) for part in parts) / len(parts)))
        return refined

    def _attend(self, x: Tensor) -> Tensor:
        """Compute the attention (N, 1, 1, 1) to a level (eq. 3)."""
        return F.hardsigmoid(F.relu(self.scale(x.mean(dim=(2, 3), keepdim=True))))


class DeformedNorm(nn.Module):
    """A modulated deformable 3x3 convolution and GroupNorm(16)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = DeformConv(channels, channels, stride=stride)
        self.norm = GroupNorm(GROUPS, channels)
        nn.init.normal_(self.conv.weight, std=0.01)

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """Convolve x (N, C, H, W) at offset (N, 18, H', W') with mask (N, 9, H', W') to (N, C, H', W')."""
        y: Tensor = self.norm(self.conv(x, offset, mask))
        return y


class DynamicReLU(nn.Module):
    """The larger of two linear functions per channel, whose coefficients depend on the map's mean (eq. 5)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // REDUCTION, 1)
        self.expand = nn.Conv2d(channels // REDUCTION, 4 * channels, 1)
        init_normal(self)

    def forward(self, x: Tensor) -> Tensor:
        """Activate x (N, C, H, W)."""
        mean = x.mean(dim=(2, 3), keepdim=True)
        coefficients = F.hardsigmoid(self.expand(F.relu(self.squeeze(mean)))) - 0.5
        slope, shift, other_slope, other_shift = coefficients.chunk(4, dim=1)
        return torch.maximum(x * (2 * slope + 1) + shift, x * (2 * other_slope) + other_shift)


def _take_first(values: Tensor, feature: Tensor) -> Tensor:
    """Take the first numbers of each image of values (N, K, H', W') as a map (N, K, H, W) of a feature's size."""
    size = feature.shape[2:]
    count = values.shape[1] * size[0] * size[1]
    return values.flatten(1)[:, :count].unflatten(1, (values.shape[1], *size))
