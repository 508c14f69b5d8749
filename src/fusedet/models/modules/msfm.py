"""MSFM.

Tags: [T] the paper's text, [N] fixed by its printed parameter counts, [N~] consistent with them, [X] a choice that
nothing in the paper decides.

References:
    "MSFM: Multi-Scale Fusion Module for Object Detection", 2021 (under review for ICLR 2021). Sections and tables are
    numbered as there.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, make_unknown_error, require_choice
from fusedet.models.ops.autocast import without_autocast
from fusedet.models.ops.layers import GroupNorm, conv, init_zero

Fusion = Literal["add", "cat"]
Size = tuple[int, int]

GROUPS = {"after_conv1": 8, "after_conv2": 4, "after_conv3": 32, "after_branch": 4}
"""Groups of the norms per position: section 4.2.6 [T]; `after_branch`, which the paper does not have, is a choice."""


class MSFM(nn.Module):
    """Multi-scale fusion: M(x) = x + U(C[F_1(S(x)), ..., F_n(S(x))]), section 3.1.

    - S squeezes C channels to m = C / ratio [T]: 1x1 convolution, GroupNorm, ReLU.
    - Branch F_i resizes by scales[i] (bilinear [T], to max(1, floor(size * scale))), applies `conv_num` times 3x3
      convolution, GroupNorm, ReLU [T], and resizes back.
    - C adds or concatenates the branches [T].
    - U restores C channels: 1x1 convolution, GroupNorm [N~].

    All convolutions have biases [N~]. Where groups = m, every channel is normalized by itself, and the biases before
    the norms of S and F have no effect and no gradient. The defaults are the paper's final ones (4.2.6) after_conv2.

    Args:
        channels: C.
        scales: One branch each; 1 is not resized (Table 2, Scales).
        ratio: Divides C (Table 2, Ratios).
        groups: Of every norm; must divide m and C (Table 2, Norm_group). One value for S, F and U [X].
        conv_num: Convolutions of a branch (Table 2, Conv_num).
        conv_num_large_only: The table's 2*: `conv_num` for scales above 1, one convolution for the others [N].
        fusion: "add" or "cat" (Table 2, Fusion_type).
        zero_init: Scale and shift of U's norm start at 0, so that M(x) = x at first and the first step changes that
            norm only [X].
        squeeze_relu: The ReLU in S [X].
        restore_relu: A ReLU after U's norm, before the sum [X]; not with `zero_init`, since a ReLU at 0 passes no
            gradient.
        align_corners: Of the resizing, both ways [X].
        width: m itself instead of C / ratio.

    Raises:
        InputError: The values do not fit together.
    """

    def __init__(
        self,
        channels: int,
        scales: tuple[float, ...] = (0.5, 0.7, 1, 1.4, 2),
        ratio: int = 16,
        groups: int = GROUPS["after_conv2"],
        conv_num: int = 2,
        conv_num_large_only: bool = False,
        fusion: Fusion = "add",
        zero_init: bool = True,
        squeeze_relu: bool = True,
        restore_relu: bool = False,
        align_corners: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        require_choice("fusion", fusion, Fusion)
        m = _divide_channels(channels, ratio, groups) if width is None else width
        _check_values(channels, scales, groups, conv_num, m)
        if restore_relu and zero_init:
            raise InputError(
                "restore_relu=true needs zero_init=false: a ReLU at zero passes no gradient, nothing would ever be "
                "trained"
            )
        self.fusion, self.align_corners = fusion, align_corners
        # fractions, so that floor(size * scale) is exact: 90 * 0.7 is 62.99... in floating point
        self.scales = [Fraction(s).limit_denominator(1000) for s in scales]
        counts = [conv_num if s > 1 or not conv_num_large_only else 1 for s in scales]
        self.squeeze = cgn(channels, m, 1, groups, squeeze_relu)
        self.branches = nn.ModuleList(nn.Sequential(*(cgn(m, m, 3, groups) for _ in range(k))) for k in counts)
        self.unsqueeze = Unsqueeze(m if fusion == "add" else m * len(scales), channels, groups, zero_init, restore_relu)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """Compute M(x) of x (N, C, H, W), in channels_last."""
        a = self.squeeze(x)  # (N, m, H, W)
        size = (a.shape[-2], a.shape[-1])
        maps = [
            branch(a) if s == 1 else self._at(scale_size(size, s), branch, a)
            for branch, s in zip(self.branches, self.scales)
        ]
        return self.unsqueeze(reduce(torch.add, maps) if self.fusion == "add" else torch.cat(maps, dim=1), x)

    def _at(self, size: Size, branch: nn.Module, a: Tensor) -> Tensor:
        y = branch(resize(a, size, self.align_corners))
        return resize(y, (a.shape[-2], a.shape[-1]), self.align_corners)


class Unsqueeze(nn.Module):
    """x + U(y): U is a 1x1 convolution with bias and a GroupNorm, computed as one matrix product.

    U's output is linear in y. So the norm's statistics follow from the mean and the covariance of y's few channels, and
    the norm becomes one scale and one shift per image and channel, which go into the product. No map of C channels is
    normalized or saved. With `relu` it is x + relu(U(y)), computed directly.

    Args:
        inputs: k, channels of y.
        channels: C, channels of x.
        groups: Of the norm; divides C.
        zero_init: Scale and shift of the norm start at 0.
        relu: A ReLU after the norm.
    """

    def __init__(self, inputs: int, channels: int, groups: int, zero_init: bool, relu: bool = False) -> None:
        super().__init__()
        self.relu = relu
        self.conv = conv(inputs, channels, 1)
        self.norm = GroupNorm(groups, channels)
        if zero_init:
            init_zero(self.norm)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Compute (N, C, H, W) of y (N, k, H, W) and x (N, C, H, W)."""
        if self.relu:
            return x + self.norm(self.conv(y)).relu().to(x.dtype)
        rows, cells = (t.flatten(2).transpose(1, 2) for t in (x, y))  # (N, H * W, C), (N, H * W, k)
        with without_autocast(x):
            weight, shift = self.normalized(cells.to(torch.promote_types(y.dtype, torch.float32)))
            # a column of ones carries the shift
            cells = F.pad(cells.to(x.dtype), (0, 1), value=1.0)  # (N, H * W, k + 1)
            weight = torch.cat([weight, shift[:, :, None]], dim=2).to(x.dtype)  # (N, C, k + 1)
            out = torch.baddbmm(rows, cells, weight.transpose(1, 2))
        return out.transpose(1, 2).unflatten(2, x.shape[2:])

    def normalized(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Compute weight (N, C, k) and shift (N, C) that give the normalized output on cells (N, H * W, k)."""
        g = self.norm.num_groups
        weight, bias, gamma, beta = (p.to(cells.dtype) for p in (*self.conv.parameters(), *self.norm.parameters()))
        weight = weight.flatten(1)  # (C, k)
        mean = cells.mean(dim=1, keepdim=True)  # (N, 1, k)
        centered = cells - mean
        covariance = centered.transpose(1, 2) @ centered / cells.shape[1]  # (N, k, k)
        # of each channel of U's output, (N, g, C / g)
        means = ((mean @ weight.T).squeeze(1) + bias).unflatten(1, (g, -1))
        variances = (weight @ covariance * weight).sum(dim=2).unflatten(1, (g, -1))
        center = means.mean(dim=2, keepdim=True)  # (N, g, 1), of each group
        variance = (variances + (means - center).square()).mean(dim=2, keepdim=True)
        gain = gamma.unflatten(0, (g, -1)) * (variance + self.norm.eps).rsqrt()  # (N, g, C / g)
        shift = beta + (gain * (bias.unflatten(0, (g, -1)) - center)).flatten(1)
        return gain.flatten(1)[:, :, None] * weight, shift


def cgn(inputs: int, outputs: int, kernel: int, groups: int, relu: bool = True) -> nn.Sequential:
    """Make the paper's CGN: Conv2D, GroupNormalization, NonLinearity (or none)."""
    return nn.Sequential(
        conv(inputs, outputs, kernel), GroupNorm(groups, outputs), nn.ReLU(inplace=True) if relu else nn.Identity()
    )


def scale_size(size: Size, scale: Fraction) -> Size:
    """Compute the size of a branch: max(1, floor(size * scale))."""
    height, width = (max(1, side * scale.numerator // scale.denominator) for side in size)
    return height, width


def resize(x: Tensor, size: Size, align_corners: bool) -> Tensor:
    """Resize x to a size by bilinear interpolation: the paper's R."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=align_corners)


@dataclass(frozen=True)
class MSFMPlugin:
    """MSFM as a block plug-in of a backbone: one module per position in every block of `stages`.

    Positions:

    - "after_conv1", "after_conv2" (after norm and ReLU) and "after_conv3" (after the norm, before the residual sum) of
      a ResNet's blocks.
    - "after_branch" (before the residual sum) of ConvNeXt's and MobileNet's blocks, which goes beyond the paper.

    m = C / ratio must be an integer and divisible by `groups`. In after_branch, where channels are not powers of two, m
    is the nearest multiple of `groups` instead, at least `groups`.

    Args:
        positions: None for after_conv2 and after_conv3, Table 3's best [T]; after_conv2 of a basic block; after_branch.
        stages: ResNet's layer numbers [N]; other backbones' stages by the same strides (stage 2 ends at stride 8).
        ratios: One per stage [T].
        groups: Of the norms, one number or per position; positions not named keep 8, 4, 32 and 4.
        scales: See `MSFM`.
        conv_num: See `MSFM`.
        conv_num_large_only: See `MSFM`.
        fusion: See `MSFM`.
        zero_init: See `MSFM`.
        squeeze_relu: See `MSFM`.
        restore_relu: See `MSFM`.
        align_corners: See `MSFM`.

    Raises:
        InputError: An unknown position, or numbers that do not fit together.
    """

    positions: tuple[str, ...] | None = None
    stages: tuple[int, ...] = (2, 3, 4)
    ratios: tuple[int, ...] = (16, 32, 64)
    groups: int | Mapping[str, int] = field(default_factory=GROUPS.copy)
    scales: tuple[float, ...] = (0.5, 0.7, 1, 1.4, 2)
    conv_num: int = 2
    conv_num_large_only: bool = False
    fusion: Fusion = "add"
    zero_init: bool = True
    squeeze_relu: bool = True
    restore_relu: bool = False
    align_corners: bool = False

    def __post_init__(self) -> None:
        named = self.groups if isinstance(self.groups, Mapping) else {}
        for option, position in [*(("positions", p) for p in self.positions or ()), *(("groups", p) for p in named)]:
            if position not in GROUPS:
                raise make_unknown_error("position", position, GROUPS, of=option)
        if len(self.ratios) != len(self.stages):
            raise InputError(f"ratios={list(self.ratios)} must hold one ratio for each of stages={list(self.stages)}")

    def make(self, channels: int, stage: int, position: str) -> MSFM:
        """Make the module for a block of that many channels in that stage.

        Args:
            channels: Channels of the block at that position.
            stage: Number of the backbone's stage, one of `stages`.
            position: Where in the block, such as "after_conv2".

        Raises:
            InputError: The scales, ratio or groups do not fit the channels.
        """
        groups = self.groups if isinstance(self.groups, int) else (GROUPS | dict(self.groups))[position]
        ratio = self.ratios[self.stages.index(stage)]
        width = max(1, round(channels / (ratio * groups))) * groups if position == "after_branch" else None
        options = (self.conv_num, self.conv_num_large_only, self.fusion, self.zero_init)
        choices = (self.squeeze_relu, self.restore_relu, self.align_corners)
        try:
            return MSFM(channels, self.scales, ratio, groups, *options, *choices, width)
        except InputError as error:
            raise InputError(f"{error} (stage {stage}, {position})") from error


def _divide_channels(channels: int, ratio: int, groups: int) -> int:
    """Compute C / ratio, which must be an integer divisible by `groups`."""
    if ratio < 1 or channels % ratio or (channels // ratio) % max(groups, 1):
        right = [r for r in range(1, channels + 1) if channels % (r * max(groups, 1)) == 0]
        rule = f"must make {channels} channels a whole number, divisible by groups={groups}"
        near = min(right, key=lambda r: abs(r - ratio), default=None)
        raise InputError(
            f"ratio={ratio} {rule}"
            + (f": {near} would" if near else f": no ratio does, {groups} does not divide {channels}")
        )
    return channels // ratio


def _check_values(channels: int, scales: tuple[float, ...], groups: int, conv_num: int, m: int) -> None:
    if groups < 1 or m < 1 or m % groups or channels % groups:
        raise InputError(f"groups={groups} must divide the {m} squeezed and the {channels} restored channels")
    if not scales or not all(0 < s < math.inf for s in scales):
        raise InputError(f"scales={list(scales)} must be one or more numbers above 0, such as 0.5, 1, 2")
    if conv_num < 1:
        raise InputError(f"conv_num={conv_num} must be at least 1")
