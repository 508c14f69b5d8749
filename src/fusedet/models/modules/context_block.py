"""GCNet's global context block.

References:
    "GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond", Cao et al., 2019, figure 4 (d), eq. 5.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.layers import conv, init_zero


class ContextBlock(nn.Module):
    """x + W2 ReLU(LN(W1 sum_j softmax_j(Wk x_j) x_j)): one context for all positions.

    W2 starts at 0, so that the block starts as the identity.

    Args:
        channels: C.
        width: Channels between W1 and W2.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.mask = conv(channels, 1, 1)
        self.transform = nn.Sequential(
            conv(channels, width, 1), nn.LayerNorm([width, 1, 1]), nn.ReLU(), init_zero(conv(width, channels, 1))
        )
        nn.init.kaiming_normal_(self.mask.weight, nonlinearity="relu")
        nn.init.zeros_(self.mask.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Add the context to x (N, C, H, W)."""
        weights = self.mask(x).flatten(2).softmax(dim=2)  # (N, 1, H * W)
        context = torch.matmul(x.flatten(2), weights.mT)  # (N, C, 1)
        return x + self.transform(context[..., None])


@dataclass(frozen=True)
class ContextBlockPlugin:
    """Options of context blocks in a backbone.

    Args:
        positions: Positions in every block (`backbones.insert_plugin`); the last of the bottleneck in the paper.
        stages: Stages by ResNet's layer numbers: c3 to c5 in the paper's best models.
        ratio: Channels of the transform relative to C; the paper has 1/4 and 1/16.

    Raises:
        InputError: `ratio` is not in (0, 1].
    """

    positions: tuple[str, ...] | None = ("after_conv3",)
    stages: tuple[int, ...] = (2, 3, 4)
    ratio: float = 1 / 16

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise InputError(f"ratio={self.ratio} must be above 0 and at most 1")

    def make(self, channels: int, stage: int, position: str) -> ContextBlock:
        """Make the module for a block of that many channels."""
        return ContextBlock(channels, max(1, int(channels * self.ratio)))
