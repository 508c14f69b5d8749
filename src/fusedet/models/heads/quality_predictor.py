"""GFLv2's predictor of a box's quality.

References:
    "Generalized Focal Loss V2: Learning Reliable Localization Quality Estimation for Dense Object Detection", Li et
    al., 2021, section 3.2.
"""

import torch
from torch import Tensor, nn

from fusedet.models.ops.layers import conv

TOP = 4  # largest probabilities of a side that the predictor sees


class QualityPredictor(nn.Sequential):
    """Two 1x1 convolutions from the `TOP` largest probabilities of each side, and their mean, to a quality in 0..1.

    Args:
        channels: Channels between the two convolutions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(conv(4 * (TOP + 1), channels, 1), nn.ReLU(), conv(channels, 1, 1), nn.Sigmoid())

    def forward(self, sides: Tensor) -> Tensor:
        """Compute the quality (N, 1, H, W), float32, of distributions (N, 4 * bins, H, W), logits."""
        top = sides.unflatten(1, (4, -1)).softmax(dim=2).topk(TOP, dim=2).values  # (N, 4, TOP, H, W)
        statistics = torch.cat([top, top.mean(dim=2, keepdim=True)], dim=2).flatten(1, 2)  # eq. 4
        quality: Tensor = super().forward(statistics.to(next(self.parameters()).dtype))
        return quality.float()
