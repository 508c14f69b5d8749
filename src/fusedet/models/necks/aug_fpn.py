"""AugFPN: context for the coarsest level, and auxiliary losses.

References:
    "AugFPN: Improving Multi-scale Feature Learning for Object Detection", Guo et al., 2020.
"""

from fractions import Fraction

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError
from fusedet.models.necks.fpn import Top, TopLevels, pyramid_levels, top_down
from fusedet.models.ops.exporting import average_pool_and_resize, is_exporting, is_symbolic
from fusedet.models.ops.layers import conv, init_xavier
from fusedet.types import Features, Levels


class AugFPN(nn.Module):
    """FPN with multi-scale context on its coarsest lateral, and with auxiliary supervision of its laterals.

    Consistent supervision depends on the detector:

    - Two stages, as in the authors' code: an auxiliary head of its own pools every RoI from every lateral M_i, and each
      lateral has its losses (`detectors.TwoStage`). The paper's third part, soft RoI selection, is `roi.SoftPooling`.
    - One stage, a deviation [X]: the losses are those of the detector's own dense head, shared with the fused pyramid,
      on all levels. The authors' code decodes the dense head's boxes, samples RoIs among them, and trains an auxiliary
      RoI head on M3 to M5.

    The authors' one-stage code adds the mean of the context to P6 too; here it does not [X].

    Args:
        levels: The backbone's levels, as in FPN.
        channels: As in FPN.
        finest: As in FPN.
        coarsest: As in FPN.
        top: As in FPN.
        ratios: Sizes of the pooled context relative to the last map's, in (0, 1]; the authors' code has 0.1, 0.2, 0.3
            [H].
        augment: Residual feature augmentation; without it the neck is FPN, weight for weight.
        auxiliary_weight: Weight of the losses on the pyramid before its fusion (consistent supervision, lambda of eq.
            1), 0 for none; 0.25 for each lateral's in the authors' code [H].

    Raises:
        InputError: As in FPN; a ratio or the weight is out of range.
    """

    def __init__(
        self,
        levels: Levels,
        channels: int = 256,
        finest: int = 3,
        coarsest: int = 7,
        top: Top = "on_input",
        ratios: tuple[float, ...] = (0.1, 0.2, 0.3),
        augment: bool = True,
        auxiliary_weight: float = 0.25,
    ) -> None:
        super().__init__()
        if not ratios or not all(0 < r <= 1 for r in ratios):
            raise InputError(f"ratios={list(ratios)} must be one number or more, each above 0 and at most 1")
        if not auxiliary_weight >= 0:
            raise InputError(f"auxiliary_weight={auxiliary_weight} must be at least 0")
        self.start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        self.auxiliary_weight = auxiliary_weight
        inputs = levels.channels[self.start :]
        self.lateral_levels = Levels((channels,) * len(inputs), self.levels.strides[: len(inputs)])
        self.lateral = nn.ModuleList(conv(c, channels, 1) for c in inputs)  # C_i -> channels
        self.output = nn.ModuleList(conv(channels, channels, 3) for _ in inputs)
        self.top = TopLevels(inputs[-1], channels, len(self.levels) - len(inputs), top)
        self.context = Context(inputs[-1], channels, ratios) if augment else None
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute the P levels of the backbone's C maps, finest first."""
        return self._fuse(features[-1], self._laterals(features))

    def with_auxiliary(self, features: Features) -> tuple[Features, Features]:
        """Compute the P levels and the pyramid before its fusion, both of `levels`.

        The second has the laterals M_i themselves and, above, what `top` computes from them.
        """
        laterals = self._laterals(features)
        fused = self._fuse(features[-1], laterals)
        above = fused[len(laterals) :] if self.top.kind.startswith("on_input") else self.top(features[-1], laterals[-1])
        return fused, laterals + above

    def _laterals(self, features: Features) -> Features:
        return [lateral(c) for lateral, c in zip(self.lateral, features[self.start :])]  # M_i

    def _fuse(self, last: Tensor, laterals: Features) -> Features:
        if self.context:
            laterals = [*laterals[:-1], laterals[-1] + self.context(last)]  # M_5 + M_6
        outputs = [output(m) for output, m in zip(self.output, top_down(laterals))]
        return outputs + self.top(last, outputs[-1])


class Context(nn.Module):
    """Residual feature augmentation: C5 pooled to several sizes, resized back and summed with weights per cell: M6.

    A pooled size is the map's times a ratio, so that context keeps the image's aspect. The 1x1 convolution precedes the
    bilinear resizing (corners aligned). The weights are sigmoids of two convolutions over all contexts (adaptive
    spatial fusion) [H].
    """

    def __init__(self, inputs: int, channels: int, ratios: tuple[float, ...]) -> None:
        super().__init__()
        self.ratios, count = ratios, len(ratios)
        self.reduce = nn.ModuleList(conv(inputs, channels, 1) for _ in ratios)
        self.weigh = nn.Sequential(conv(count * channels, channels, 1), nn.ReLU(), conv(channels, count, 3))

    def forward(self, c5: Tensor) -> Tensor:
        """Compute M6 (N, channels, H, W) of C5 (N, inputs, H, W)."""
        size = (c5.shape[-2], c5.shape[-1])
        sizes = [pooled_size(size, ratio) for ratio in self.ratios]
        if is_exporting():  # a 1x1 convolution of means is the mean of the convolutions
            contexts = [average_pool_and_resize(reduce(c5), s) for reduce, s in zip(self.reduce, sizes)]
        else:
            pooled = [reduce(F.adaptive_avg_pool2d(c5, s)) for reduce, s in zip(self.reduce, sizes)]
            contexts = [F.interpolate(p, size=size, mode="bilinear", align_corners=True) for p in pooled]
        # each (N, channels, H, W)
        weights = self.weigh(torch.cat(contexts, dim=1)).sigmoid()  # (N, ratios, H, W)
        return (weights[:, :, None] * torch.stack(contexts, dim=1)).sum(dim=1)


def pooled_size(size: tuple[int, int], ratio: float) -> tuple[int, int]:
    """Compute height and width times ratio, rounded down, at least 1.

    >>> pooled_size((25, 42), 0.1), pooled_size((25, 42), 0.3), pooled_size((2, 3), 0.1)
    ((2, 4), (7, 12), (1, 1))
    """
    if is_symbolic(*size):  # a product with a float would be a constant in the exported file
        part = Fraction(ratio).limit_denominator(1000)
        height, width = (torch.sym_max(1, side * part.numerator // part.denominator) for side in size)
        return height, width  # type: ignore[return-value]
    return max(1, int(size[0] * ratio)), max(1, int(size[1] * ratio))
