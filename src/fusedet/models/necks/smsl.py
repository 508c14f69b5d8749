"""SMSL.

References:
    "Selective Multi-Scale Learning for Object Detection", Chen et al., 2021. Equations and tables are numbered as
    there.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.necks.fpn import Top, TopLevels, pyramid_levels
from fusedet.models.ops.exporting import is_exporting
from fusedet.models.ops.layers import conv, init_xavier
from fusedet.models.ops.pyramid_resize import NonLocal, Resizing, gather_levels, scatter_level
from fusedet.types import Features, Levels

Mode = Literal["on_neck", "standalone"]


class SMSL(nn.Module):
    """Add to every level its own mixture of all levels, with channel-wise weights computed from the image.

    Values of `mode`:

    - "on_neck": the levels of a neck, all of one width, to the same levels (Table 2).
    - "standalone": a backbone's maps to the levels P`finest` to P`coarsest`, by 1x1 convolutions to `channels` without
      a top-down path, and the levels above as in FPN (section 3.1; that the published ablation has this form is a
      reading, a choice).

    All levels meet in the size of level number (L - 1) // 2, the middle one (paper). Biases of the fully connected
    layers, the affine LayerNorm and those of the non-local block are choices that the printed parameter counts allow.
    The counts fix the output convolution and the unreduced width.

    Args:
        levels: The incoming levels, L of them.
        mode: Kind of input.
        channels: Of "standalone", as in FPN; not read otherwise.
        finest: Of "standalone", as in FPN; not read otherwise.
        coarsest: Of "standalone", as in FPN; not read otherwise.
        top: Of "standalone", as in FPN; not read otherwise.
        channel_rescaling: CR of Table 1, eq. 2 to 6.
        global_feature: GF of Table 1: one more mixture, refined by a non-local block and added to all others.
        reduction: r of eq. 3 and 9, 8 in the paper.
        resizing: How the levels are resized to the middle one's size and back: "pool" by max pooling and nearest
            neighbors, Libra R-CNN's way; "nearest" or "bilinear" (the paper says "resizing", a choice).
        non_local_scale: The non-local block divides its products by sqrt(C), as MMDetection's does by default (a
            choice).
        zero_init: The non-local block starts as the identity (a choice).

    Raises:
        InputError: Fewer than two levels; levels of unequal width on a neck; C // reduction below 2, as the LayerNorm
            of a single value is a constant.
    """

    def __init__(
        self,
        levels: Levels,
        mode: Mode = "on_neck",
        channels: int = 256,
        finest: int = 3,
        coarsest: int = 7,
        top: Top = "on_input",
        channel_rescaling: bool = True,
        global_feature: bool = True,
        reduction: int = 8,
        resizing: Resizing = "pool",
        non_local_scale: bool = True,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        require_choice("mode", mode, Mode)
        require_choice("resizing", resizing, Resizing)
        self.sources = LateralLevels(levels, channels, finest, coarsest, top) if mode == "standalone" else None
        self.levels = self.sources.levels if self.sources else levels
        L, C = len(self.levels), self.levels.channels[0]
        if set(self.levels.channels) != {C}:
            raise InputError(
                f"levels {self.levels.channels} must be of one width: put it after a neck, or set mode=standalone"
            )
        if L < 2:
            raise InputError(f"it selects among levels and needs at least two, got {L} (strides {self.levels.strides})")
        if reduction < 1 or C // reduction < 2:
            raise InputError(f"reduction={reduction} must be between 1 and half of the {C} channels")
        self.gather_level, self.resizing = (L - 1) // 2, resizing
        self.rescale = ChannelRescaling(L * C, reduction) if channel_rescaling else None
        self.select = SelectiveUnits(L + global_feature, L, C, reduction)
        self.non_local = NonLocal(C, non_local_scale, zero_init) if global_feature else None

    def forward(self, features: Features) -> Features:
        """Compute L levels (N, C, H_l, W_l) of L levels of the same sizes, or of a backbone's maps, finest first."""
        P = self.sources(features) if self.sources else features
        D = gather_levels(P, self.gather_level, self.resizing)  # L times (N, C, H, W)
        s, A = self.attend(D)
        F_t = combine(D, A * s)  # (N, T, C, H, W)
        if self.non_local:
            G = self.non_local(F_t[:, -1])  # (N, C, H, W)
            F_t = F_t[:, :-1] + G[:, None]  # (14)
        return [add_resized(p, F_t[:, i], i, self.gather_level, self.resizing) for i, p in enumerate(P)]  # (15)

    def weights(self, features: Features) -> Tensor:
        """Compute A (N, T, L, C) of eq. 11: the share of each level in each of T targets, channel by channel.

        The shares sum to 1 over L. T is L, or L + 1 with the global feature, which is the last. `features` as in
        `forward`.
        """
        P = self.sources(features) if self.sources else features
        return self.attend(gather_levels(P, self.gather_level, self.resizing))[1]

    def attend(self, D: Features) -> tuple[Tensor, Tensor]:
        """Compute the scales s (N, 1, L, C) and the weights A (N, T, L, C) of L gathered levels (N, C, H, W)."""
        x = torch.stack([d.mean(dim=(2, 3)) for d in D], dim=1)  # (N, L, C)  (1-2)
        s = self.rescale(x) if self.rescale else torch.ones_like(x)  # (N, L, C)
        # s is a scale per channel, so that the mean of Q is s times the mean of D
        g = (s * x).sum(dim=1)  # (N, C)  (4-8)
        return s[:, None], self.select(g)


class LateralLevels(nn.Module):
    """A backbone's maps as levels of one width, without a top-down path.

    Args:
        levels: The backbone's levels.
        channels: As in FPN.
        finest: As in FPN.
        coarsest: As in FPN.
        top: As in FPN.

    Raises:
        InputError: As for FPN.
    """

    def __init__(self, levels: Levels, channels: int, finest: int, coarsest: int, top: Top) -> None:
        super().__init__()
        self.start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        inputs = levels.channels[self.start :]
        self.lateral = nn.ModuleList(conv(c, channels, 1) for c in inputs)
        self.top = TopLevels(inputs[-1], channels, len(self.levels) - len(inputs), top)
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute the levels of the backbone's C maps, finest first."""
        inputs = features[self.start :]
        outputs = [lateral(c) for lateral, c in zip(self.lateral, inputs)]
        return outputs + self.top(inputs[-1], outputs[-1])


class ChannelRescaling(nn.Module):
    """Channel rescaling s = sigmoid(W2 relu(W1 x)), eq. 3, over the channels of all levels together."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.W1 = nn.Linear(channels, channels // reduction)
        self.W2 = nn.Linear(channels // reduction, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Compute scales (N, L, C), in 0..1, of the means x (N, L, C)."""
        return self.W2(self.W1(x.flatten(1)).relu()).sigmoid().view(x.shape)


class SelectiveUnits(nn.Module):
    """The selective combination modules of all T targets, eq. 9 to 11.

    Each has its own weights; every layer is one product for all of them.

    Args:
        targets: T.
        levels: L.
        channels: C.
        reduction: Divides C to the width of the hidden layer.
    """

    def __init__(self, targets: int, levels: int, channels: int, reduction: int) -> None:
        super().__init__()
        T, L, C, k = targets, levels, channels, channels // reduction
        self.shape = (T, L, C)
        # torch's initialization of a linear layer
        self.W = nn.Parameter(torch.empty(T, k, C).uniform_(-1, 1) / math.sqrt(C))
        self.V = nn.Parameter(torch.empty(T, L * C, k).uniform_(-1, 1) / math.sqrt(k))
        # vectors with these names: engine/optim.py recognizes biases by their names' ends, norms by their one dimension
        self.W_bias = nn.Parameter(torch.empty(T * k).uniform_(-1, 1) / math.sqrt(C))
        self.V_bias = nn.Parameter(torch.empty(T * L * C).uniform_(-1, 1) / math.sqrt(k))
        self.norm_weight = nn.Parameter(torch.ones(T * k))
        self.norm_bias = nn.Parameter(torch.zeros(T * k))

    def forward(self, g: Tensor) -> Tensor:
        """Compute A (N, T, L, C) of the global context g (N, C)."""
        T, L, C = self.shape
        z = torch.einsum("nc,tkc->ntk", g, self.W) + self.W_bias.view(T, -1)
        z = F.layer_norm(z, z.shape[-1:]) * self.norm_weight.view(T, -1) + self.norm_bias.view(T, -1)
        U = torch.einsum("ntk,tmk->ntm", z.relu(), self.V) + self.V_bias.view(T, -1)  # (N, T, L * C)  (9-10)
        return U.view(-1, T, L, C).softmax(dim=2)


def combine(D: Features, weights: Tensor) -> Tensor:
    """Compute F^t = sum_i weights[t, i] * D^i: L maps (N, C, H, W) and weights (N, T, L, C) to (N, T, C, H, W)."""
    w = weights.to(D[0].dtype)[..., None, None]  # (N, T, L, C, 1, 1)
    mixed = D[0][:, None] * w[:, :, 0]
    for i in range(1, len(D)):
        # faster than one matrix product, which would transpose the maps
        mixed = torch.addcmul(mixed, D[i][:, None], w[:, :, i])
    return mixed


def add_resized(p: Tensor, f: Tensor, index: int, level: int, resizing: Resizing = "pool") -> Tensor:
    """Add a map to another, after `scatter_level` has brought it to that size.

    Args:
        p: The map to add to.
        f: The map to resize.
        index: Number of the level of p, from 0 for the finest.
        level: Number of the level of f.
        resizing: How f is resized.

    Shape:
        p and result (N, C, H_l, W_l); f (N, C, H, W).
    """
    (height, width), (h, w) = p.shape[-2:], f.shape[-2:]
    if not is_exporting() and resizing != "bilinear" and index < level and height % h == 0 and width % w == 0:
        # nearest neighbors repeat f in blocks: added by broadcasting, the upsampled map is never written
        # (N, C, h, blocks of rows, w, of columns)
        blocks = p.unflatten(2, (h, height // h)).unflatten(4, (w, width // w))
        return (blocks + f[:, :, :, None, :, None]).flatten(4, 5).flatten(2, 3)
    return p + scatter_level(f, p, index, level, resizing)
