"""PAFPN: a bottom-up path on top of FPN.

References:
    "Path Aggregation Network for Instance Segmentation", Liu et al., 2018, section 3.1.
"""

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import require_choice
from fusedet.models.necks.fpn import FPN, Top, TopLevels, pyramid_levels
from fusedet.models.ops.layers import conv, init_xavier
from fusedet.types import Features, Levels

Form = Literal["mmdet", "smsl"]


class PAFPN(nn.Module):
    """FPN's pyramid P`finest` to P`coarsest` with a bottom-up path through the backbone's levels.

    Values of `form`, with P_i FPN's levels of the backbone and N_i the results:

    - "mmdet" (MMDetection's): S_3 = P_3, S_{i+1} = P_{i+1} + conv3x3s2(S_i); N_3 = S_3, N_i = conv3x3(S_i). Two
      convolutions for each level but the finest.
    - "smsl" (PANet* of SMSL, Chen et al., 2021, Table 2): N_3 = conv3x3(P_3), N_{i+1} = conv3x3(P_{i+1} +
      maxpool2(N_i)). One convolution per level. Its parameter count is the printed one [N~]; where the three
      convolutions stand is a choice [X].

    The paper's own path is N_3 = P_3, N_{i+1} = relu(conv3x3(P_{i+1} + relu(conv3x3s2(N_i)))); neither form has its
    ReLUs [H].

    Args:
        levels: The backbone's levels, as in FPN.
        channels: As in FPN.
        finest: As in FPN.
        coarsest: As in FPN.
        top: As in FPN; "max_pool" and "on_output" continue from the last level of the bottom-up path.
        form: The form of the bottom-up path.

    Raises:
        InputError: As in FPN.
    """

    def __init__(
        self,
        levels: Levels,
        channels: int = 256,
        finest: int = 3,
        coarsest: int = 7,
        top: Top = "on_input",
        form: Form = "mmdet",
    ) -> None:
        super().__init__()
        require_choice("form", form, Form)
        start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        count = len(levels) - start  # the backbone's levels
        self.fpn = FPN(levels, channels, finest, finest + count - 1, top)
        self.form = form
        self.down = nn.ModuleList(
            conv(channels, channels, 3, stride=2) for _ in range(count - 1 if form == "mmdet" else 0)
        )
        self.output = nn.ModuleList(conv(channels, channels, 3) for _ in range(count - 1 if form == "mmdet" else count))
        self.top = TopLevels(levels.channels[-1], channels, len(self.levels) - count, top)
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute the N levels of the backbone's C maps, finest first."""
        p = self.fpn(features)
        n = self._mmdet(p) if self.form == "mmdet" else self._smsl(p)
        return n + self.top(features[-1], n[-1])

    def _mmdet(self, p: Features) -> Features:
        sums = p[:1]
        for level, down in zip(p[1:], self.down):
            sums.append(level + _fit(down(sums[-1]), level))
        return sums[:1] + [output(s) for output, s in zip(self.output, sums[1:])]

    def _smsl(self, p: Features) -> Features:
        n = [self.output[0](p[0])]
        for level, output in zip(p[1:], self.output[1:]):
            n.append(output(level + _fit(F.max_pool2d(n[-1], 2, ceil_mode=True), level)))
        return n


def _fit(x: Tensor, like: Tensor) -> Tensor:
    """Crop x to the size of `like`: halving rounds up here, some backbones round down."""
    return x[..., : like.shape[-2], : like.shape[-1]]
