"""PAFPN: "Path Aggregation Network for Instance Segmentation", Liu et al., 2018, section 3.1: a bottom-up path on top of FPN."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import one_of
from fusedet.models.necks.fpn import FPN, Top, TopLevels, pyramid_levels
from fusedet.models.ops.layers import conv, init_xavier
from fusedet.types import Features, Levels

Form = Literal["mmdet", "smsl"]


class PAFPN(nn.Module):
    """FPN's pyramid P`finest` to P`coarsest`, whose levels of the body are joined once more from fine to coarse.

    levels, channels, finest, coarsest, top: as in FPN; "max_pool" and "on_output" go on from the last level of the bottom-up path.
    form: with P_i the levels of FPN that the body has, "mmdet" (MMDetection's) is S_3 = P_3, S_{i+1} = P_{i+1} + conv3x3s2(S_i),
    N_3 = S_3, N_i = conv3x3(S_i): two convolutions for each level but the finest. "smsl" (PANet* of SMSL, Chen et al., 2021, table 2)
    is N_3 = conv3x3(P_3), N_{i+1} = conv3x3(P_{i+1} + maxpool2(N_i)): one for each level. Its parameters are the printed ones [N~],
    where the three convolutions stand is a choice [X]. The paper's own path is N_3 = P_3, N_{i+1} = relu(conv3x3(P_{i+1} +
    relu(conv3x3s2(N_i)))); neither form has its ReLUs [H].
    Raises InputError where the body has no level `finest` or `coarsest` is below its last.
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
        one_of("form", form, Form)
        start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        count = len(levels) - start  # levels that the body has
        self.fpn = FPN(levels, channels, finest, finest + count - 1, top)
        self.form = form
        self.down = nn.ModuleList(
            conv(channels, channels, 3, stride=2) for _ in range(count - 1 if form == "mmdet" else 0)
        )
        self.output = nn.ModuleList(conv(channels, channels, 3) for _ in range(count - 1 if form == "mmdet" else count))
        self.top = TopLevels(levels.channels[-1], channels, len(self.levels) - count, top)
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """C maps, finest first, to N maps of the promised levels."""
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
    """Halving rounds up; bodies that round down have one row or column less."""
    return x[..., : like.shape[-2], : like.shape[-1]]
