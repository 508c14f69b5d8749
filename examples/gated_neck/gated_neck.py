"""A neck from outside of fusedet: a gate per channel on every level of a pyramid.

    fusedet train retinanet_r50 data=PATH "model.neck=[fpn,{type: 'gated_neck:GatedNeck', reduction: 8}]"

References:
    "Squeeze-and-Excitation Networks", Hu et al., 2018, equations 2 to 4.
"""

from timm.layers import SqueezeExcite
from torch import nn

from fusedet.errors import InputError
from fusedet.models.ops.layers import init_zero
from fusedet.types import Features, Levels


class GatedNeck(nn.Module):
    """Scale the channels of every level by a gate in 0..2, which is 1 before the training.

    Args:
        levels: Channels and strides of the incoming pyramid; fusedet passes them.
        reduction: The gate's hidden layer has 1 / `reduction` of the channels; an option in YAML.

    Raises:
        InputError: `reduction` is not in 1..channels.
    """

    def __init__(self, levels: Levels, reduction: int = 16) -> None:
        super().__init__()
        if not 1 <= reduction <= min(levels.channels):
            raise InputError(f"reduction={reduction} must be in 1..{min(levels.channels)}, the channels of the pyramid")
        self.levels = levels  # the contract of a neck: what it returns, known before any image is seen
        self.gates = nn.ModuleList(SqueezeExcite(c, rd_channels=c // reduction) for c in levels.channels)
        for gate in self.gates:
            init_zero(gate.fc2)  # its sigmoid is 1/2

    def forward(self, features: Features) -> Features:
        """Compute the levels, each (N, C, H, W) as it came."""
        return [2 * gate(x) for gate, x in zip(self.gates, features, strict=True)]
