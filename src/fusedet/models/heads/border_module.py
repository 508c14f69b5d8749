"""BorderDet's border alignment module.

References:
    "BorderDet: Border Feature for Dense Object Detection", Qiu et al., 2020, section 3.3.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.ops.border_align import BORDERS, MOST_POINTS, border_align
from fusedet.models.ops.layers import conv


class BorderModule(nn.Module):
    """Enhance a tower's features with the features along the borders of the box predicted at each cell.

    A 1x1 convolution with instance normalization and ReLU makes features of the point and of the four borders,
    BorderAlign pools the latter, and a 1x1 convolution with ReLU joins all five. A cell of a map of one cell is
    normalized to 0.

    Args:
        channels: C of the tower and of the result.
        width: Channels of the point's features and of each border's.
        points: As in `border_align`.
        both_ends: As in `border_align`.

    Raises:
        InputError: `points` is out of its range.
    """

    def __init__(self, channels: int, width: int, points: int, both_ends: bool) -> None:
        super().__init__()
        if not 1 <= points <= MOST_POINTS:
            raise InputError(f"points={points} must be 1 to {MOST_POINTS}")
        self.width, self.points, self.both_ends = width, points, both_ends
        self.expand = conv(channels, (1 + BORDERS) * width, 1)
        self.join = conv((1 + BORDERS) * width, channels, 1)

    def forward(self, feature: Tensor, boxes: Tensor) -> Tensor:
        """Compute features (N, C, H, W) from those of a tower and the cells' boxes (N, 4, H, W), in cells."""
        expanded = self.expand(feature)
        # instance normalization: a group per channel
        expanded = torch.group_norm(expanded, expanded.shape[1]).relu()
        borders = border_align(expanded[:, self.width :], boxes.flatten(2).mT, self.points, self.both_ends)
        joined = torch.cat([expanded[:, : self.width], borders.unflatten(2, feature.shape[2:])], dim=1)
        return F.relu(self.join(joined))
