"""MSE-FPN.

References:
    "Multi-scale semantic enhancement network for object detection", Guo et al., 2023. Equations and tables are
    numbered as there.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.necks.fpn import Top, TopLevels, pyramid_levels, top_down
from fusedet.models.necks.gates import Gate, make_gate
from fusedet.models.ops.autocast import without_autocast
from fusedet.models.ops.exporting import average_pool_to, is_exporting
from fusedet.models.ops.layers import GroupNorm, conv, init_xavier
from fusedet.models.ops.pyramid_resize import resize_bilinear
from fusedet.types import Features, Levels

Enhancement = Literal["full", "channel", "spatial", "conv1x1", "none"]
Injection = Literal["full", "split", "conv1x1", "add", "none"]
GatePlace = Literal["lateral", "topdown"]
GateSource = Literal["lateral", "backbone"]
Norm = Literal["gn1", "none"]


class MSEFPN(nn.Module):
    """FPN whose laterals receive the semantics of all levels (SEM, SIM) and pass a gate (GCG).

    Without the three it is FPN.

    Values of `sem`, the processing of the global context M:

    - "full": both branches. "channel", "spatial": one of them (Table 4).
    - "conv1x1": a dense 1x1 convolution (Table 2's substitute; its width is a choice).
    - "none": the identity.

    Values of `sim`, the injection of the result M' into every lateral:

    - "full": all channels of M' (the reading of the text).
    - "split": every level takes its own channels of M', a level outside `context` none (TopFormer's way, which figure
      2's "to corresponding levels" suggests).
    - "conv1x1": the sum with a 1x1 convolution of M' (Tables 2 and 4).
    - "add": the sum with M' itself, which `sem_conv` brings to `channels`.
    - "none": no injection.

    Values of `gate`: "gcg"; "cag", "ca" (coordinate attention) and "cam" (CBAM's) of Table 6; "none".

    An option of a part that is off has no effect.

    Args:
        levels: The backbone's levels, as in FPN.
        channels: As in FPN.
        finest: As in FPN.
        coarsest: As in FPN.
        top: As in FPN.
        context: The levels S whose maps make the global context M (eq. 1 and 2), by pyramid numbers (3 has stride 8).
            (3, 4, 5) is the paper's choice, (2, 3, 4, 5) and (4, 5) are its Table 3. Levels below `finest` are allowed.
        sem: Semantic enhancement of M.
        sem_conv: A 1x1 convolution of M' to `channels`, one for all levels (another reading of Table 4's "adding 1x1
            convolutional layers after the SEM output").
        sim: Semantic injection of M'.
        pre_conv: One more 1x1 convolution on the lateral before "full" or "split" (Table 5).
        gate: The gate.
        gate_place: "lateral" gates every lateral before the top-down sum (eq. 10 acts on F_i); "topdown" gates what a
            level passes down ("from the higher-level features"): a choice.
        gate_source: What "gcg" pools its weights from: "lateral" is the map that it scales (eq. 10), "backbone" C_i
            (the sentence before eq. 9).
        embed: Spatial branch: C' of Q and K (a choice).
        v_groups: Spatial branch: groups of W_v. 1 is the text; more makes the "small increase in parameters" true.
        norm: Spatial branch: meaning of "normalizing the R group". "gn1" is GroupNorm of one group without parameters,
            "none" none (a choice).
        pool_first: Spatial branch: true for eq. 6, sigmoid of the mean; false for the prose, mean of the sigmoids,
            which needs the (H W)^2 matrix.
        reduction: Channel branch: reduction of eq. 3 (a choice).
        sim_groups: Groups of SIM's GroupNorm (a choice).
        gate_reduction: Reduction of "ca" and "cam"; None for 32 and 16.
        cag_relu: ReLU on each term of "cag" (a choice).

    Raises:
        InputError: As in FPN; `context` names levels that the backbone lacks; no `sim` takes the result of `sem`;
            `pre_conv` without SIM; `sem_conv` does not fit `sim`; `gate_source` without "gcg"; groups that do not
            divide their channels.
    """

    def __init__(
        self,
        levels: Levels,
        channels: int = 256,
        finest: int = 3,
        coarsest: int = 7,
        top: Top = "on_input",
        context: tuple[int, ...] = (3, 4, 5),
        sem: Enhancement = "full",
        sem_conv: bool = False,
        sim: Injection = "full",
        pre_conv: bool = False,
        gate: Gate = "gcg",
        gate_place: GatePlace = "lateral",
        gate_source: GateSource = "lateral",
        embed: int = 256,
        v_groups: int = 1,
        norm: Norm = "gn1",
        pool_first: bool = True,
        reduction: int = 16,
        sim_groups: int = 32,
        gate_reduction: int | None = None,
        cag_relu: bool = False,
    ) -> None:
        super().__init__()
        for key, value, kind in (
            ("sem", sem, Enhancement),
            ("sim", sim, Injection),
            ("gate", gate, Gate),
            ("gate_place", gate_place, GatePlace),
            ("gate_source", gate_source, GateSource),
            ("norm", norm, Norm),
        ):
            require_choice(key, value, kind)
        self.start, self.levels = pyramid_levels(levels, channels, finest, coarsest)
        inputs = levels.channels[self.start :]
        self.lateral = nn.ModuleList(conv(c, channels, 1) for c in inputs)  # C_i -> channels
        self.output = nn.ModuleList(conv(channels, channels, 3) for _ in inputs)
        self.top = TopLevels(inputs[-1], channels, len(self.levels) - len(inputs), top)

        if sim == "none" and sem != "none":
            raise InputError(
                f"sem={sem} needs a sim that takes its result: set sem=none, or sim to full, split or conv1x1"
            )
        if sem_conv and sim in ("split", "none"):
            raise InputError(
                f"sem_conv=true mixes the channels of all levels, sim={sim} does not take them: set sem_conv=false, or "
                "sim to full, conv1x1 or add"
            )
        if sim == "add" and not sem_conv:
            raise InputError(
                f"sim=add needs a context of the laterals' {channels} channels: set sem_conv=true, or sim to conv1x1"
            )
        if gate_source == "backbone" and gate != "gcg":
            raise InputError(f"gate_source=backbone is an option of gate=gcg, got gate={gate}: set gate_source=lateral")
        if pre_conv and sim not in ("full", "split"):
            raise InputError(
                f"pre_conv=true stands before SIM, and sim={sim} has none: set pre_conv=false, or sim to full or split"
            )
        if sim in ("full", "split") and (sim_groups < 1 or channels % sim_groups):
            raise InputError(
                f"channels={channels} must be a multiple of sim_groups={sim_groups}, the groups of SIM's GroupNorm"
            )
        if min(embed, reduction, 1 if gate_reduction is None else gate_reduction) < 1:
            raise InputError(
                f"embed={embed}, reduction={reduction}, gate_reduction={gate_reduction} must be at least 1"
            )
        self.sources = [] if sim == "none" else level_indices(levels, context)
        widths = [levels.channels[i] for i in self.sources]
        total, ends = sum(widths), list(accumulate(widths))
        own = {i: slice(end - width, end) for i, width, end in zip(self.sources, widths, ends)}
        width = channels if sem_conv else total
        whole = {i: slice(0, width) for i in range(self.start, len(levels)) if total}
        taken = {i: part for i, part in (own if sim == "split" else whole).items() if i >= self.start}
        if sim == "split" and not taken:
            raise InputError(f"sim=split needs a level of context={tuple(context)} that is not below finest={finest}")
        # the channels of M' that each lateral takes
        self.parts = {str(i - self.start): part for i, part in taken.items()}
        inject = (
            partial(SIM, groups=sim_groups, local=pre_conv)
            if sim in ("full", "split")
            else partial(Add, convolve=sim == "conv1x1")
        )
        self.sem = make_sem(sem, total, embed, reduction, v_groups, norm == "gn1", pool_first)
        if sem_conv:
            self.sem = nn.Sequential(self.sem, conv(total, channels, 1))
        self.sim = nn.ModuleDict({i: inject(part.stop - part.start, channels) for i, part in self.parts.items()})
        self.gate_place, self.gate_source = gate_place, gate_source
        gated = inputs[gate_place == "topdown" :]  # the finest level passes nothing down
        self.gate = nn.ModuleList(
            make_gate(gate, channels, gate_reduction, cag_relu, c if gate_source == "backbone" else None) for c in gated
        )
        init_xavier(self)

    def forward(self, features: Features) -> Features:
        """Compute the P levels of the backbone's C maps, finest first."""
        inputs = features[self.start :]
        maps = [lateral(c) for lateral, c in zip(self.lateral, inputs)]  # X_i, then F_i, then T_i
        if self.sources:
            context = self.sem(self.global_context(features))  # M' (N, Cn, H, W)
            for key, inject in self.sim.items():
                maps[int(key)] = inject(maps[int(key)], context[:, self.parts[key]])
        gates: list[Callable[[Tensor], Tensor]] = list(self.gate)
        if self.gate_source == "backbone":
            gates = [partial(gate, c) for gate, c in zip(gates, inputs[-len(gates) :])]
        if self.gate_place == "lateral":
            maps = [gate(f) for gate, f in zip(gates, maps)]
        maps = top_down(maps, gates if self.gate_place == "topdown" else ())
        outputs = [output(m) for output, m in zip(self.output, maps)]
        return outputs + self.top(inputs[-1], outputs[-1])

    def global_context(self, features: Features) -> Tensor:
        """Compute M (N, Cn, H, W) of eq. 1 and 2, at stride 64.

        The maps of the levels S are average-pooled to half the size of the backbone's last map and concatenated.
        """
        height, width = features[-1].shape[-2:]
        size = ((height + 1) // 2, (width + 1) // 2)
        pool = average_pool_to if is_exporting() else F.adaptive_avg_pool2d
        return torch.cat([pool(features[i], size) for i in self.sources], dim=1)


class SEM(nn.Module):
    """Semantic enhancement, eq. 3 to 8: M' = R' * V * M_w + M.

    Without the channel branch M' = R' * V + M, without the spatial one M' = M * M_w + M.

    Args:
        channels: Cn.
        embed: As in MSEFPN.
        reduction: As in MSEFPN.
        v_groups: As in MSEFPN.
        gn1: Normalize R.
        pool_first: As in MSEFPN.
        channel: Use the channel branch; at least one of the two branches is used.
        spatial: Use the spatial branch.

    Raises:
        InputError: `v_groups` does not divide the channels.
    """

    def __init__(
        self,
        channels: int,
        embed: int,
        reduction: int,
        v_groups: int,
        gn1: bool,
        pool_first: bool,
        channel: bool,
        spatial: bool,
    ) -> None:
        super().__init__()
        self.channel, self.spatial, self.gn1, self.pool_first = channel, spatial, gn1, pool_first
        if channel:
            inner = max(1, channels // reduction)
            self.fc2, self.fc1 = conv(channels, inner, 1), conv(inner, channels, 1)
        if spatial:
            if v_groups < 1 or channels % v_groups:
                raise InputError(f"v_groups={v_groups} must divide the {channels} channels of the global context")
            self.w_q, self.w_k = conv(channels, embed, 1), conv(channels, embed, 1)
            self.w_v = nn.Conv2d(channels, channels, 1, groups=v_groups)

    def forward(self, M: Tensor) -> Tensor:
        """Compute M' (N, Cn, H, W) of M (N, Cn, H, W)."""
        enhanced = M
        if self.spatial:
            R = relation(self.w_q(M).flatten(2), self.w_k(M).flatten(2), self.gn1, self.pool_first)  # (N, H * W)
            enhanced = R.to(M.dtype).view(M.shape[0], 1, *M.shape[2:]) * self.w_v(M)  # R' * V  (7)
        if self.channel:
            enhanced = enhanced * self.fc1(self.fc2(M.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()  # M_w  (3)
        return enhanced + M  # (8)


def relation(Q: Tensor, K: Tensor, gn1: bool = True, pool_first: bool = True, eps: float = 1e-5) -> Tensor:
    """Compute R' of eq. 6 from R = Q^T K, normalized over all its N x N entries where `gn1`.

    R is read as N maps of N cells, and the pooling takes the mean over the maps. The other reading, the mean over the
    cells of each map, is the same function with W_q and W_k exchanged. It is computed in float32 at least, inside
    autocast too.

    With `pool_first`, R itself is never computed. With q, k the means of Q's and K's columns and Q_c, K_c the centered
    columns, an entry is q.k + Q_c[n].k + q.K_c[m] + Q_c[n].K_c[m]. Over all n and m the last three have mean 0 and are
    uncorrelated. So the first is the mean of R, their mean squares add up to its variance, and the mean over n leaves
    q.k + q.K_c[m].

    Shape:
        Q and K (B, C', N), N cells; result (B, N) in 0..1.
    """
    Q, K = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (Q, K))
    with without_autocast(Q):
        if not pool_first:
            R = Q.transpose(1, 2) @ K  # (B, N, N)
            return (F.layer_norm(R, R.shape[1:], eps=eps) if gn1 else R).sigmoid().mean(dim=1)
        q, k = Q.mean(dim=2, keepdim=True), K.mean(dim=2, keepdim=True)  # (B, C', 1)
        if not gn1:
            return (q * K).sum(dim=1).sigmoid()
        Q_c, K_c = Q - q, K - k
        pooled = (q * K_c).sum(dim=1)  # (B, N), less the mean of R
        gram = (Q_c @ Q_c.transpose(1, 2) * (K_c @ K_c.transpose(1, 2))).sum(dim=(1, 2)) / Q.shape[2] ** 2
        variance = (Q_c * k).sum(dim=1).square().mean(dim=1) + pooled.square().mean(dim=1) + gram  # (B,)
        return torch.sigmoid(pooled * torch.rsqrt(variance + eps)[:, None])


class SIM(nn.Module):
    """Semantic injection: F_i = X_i * up(sigmoid(GN(conv(M')))) + up(GN(conv(M'))), figure 4.

    The paper's "matrix multiplication" is element-wise, since the three have one size. Convolution, norm and sigmoid
    precede the bilinear upsampling (TopFormer's way).

    Args:
        inputs: Channels of M'.
        channels: Channels of X_i.
        groups: Of the GroupNorm.
        local: Apply a 1x1 convolution to X_i first (Table 5).
    """

    def __init__(self, inputs: int, channels: int, groups: int = 32, local: bool = False) -> None:
        super().__init__()
        self.local = conv(channels, channels, 1) if local else nn.Identity()
        self.gate = nn.Sequential(conv(inputs, channels, 1), GroupNorm(groups, channels))
        self.semantics = nn.Sequential(conv(inputs, channels, 1), GroupNorm(groups, channels))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Compute F_i (N, C, H_i, W_i) of x, of the same shape, and M' (N, inputs, H, W)."""
        size = (x.shape[-2], x.shape[-1])
        weights = resize_bilinear(self.gate(context).sigmoid(), size)
        return self.local(x) * weights + resize_bilinear(self.semantics(context), size)


class Add(nn.Module):
    """Substitute of SIM: F_i = X_i + up(conv(M')); without `convolve` F_i = X_i + up(M')."""

    def __init__(self, inputs: int, channels: int, convolve: bool = True) -> None:
        super().__init__()
        self.conv = conv(inputs, channels, 1) if convolve else nn.Identity()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Compute F_i (N, C, H_i, W_i) of x, of the same shape, and M' (N, inputs, H, W)."""
        return x + resize_bilinear(self.conv(context), (x.shape[-2], x.shape[-1]))


def make_sem(
    kind: Enhancement, channels: int, embed: int, reduction: int, v_groups: int, gn1: bool, pool_first: bool
) -> nn.Module:
    """Make the semantic enhancement (N, C, H, W) -> (N, C, H, W) of a global context.

    Args:
        kind: As `sem` in MSEFPN.
        channels: C.
        embed: As in MSEFPN.
        reduction: As in MSEFPN.
        v_groups: As in MSEFPN.
        gn1: Normalize R over all its entries.
        pool_first: As in MSEFPN.

    Raises:
        InputError: `v_groups` does not divide the channels.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "conv1x1":
        return conv(channels, channels, 1)
    return SEM(
        channels, embed, reduction, v_groups, gn1, pool_first, channel=kind != "spatial", spatial=kind != "channel"
    )


def level_indices(levels: Levels, context: tuple[int, ...]) -> list[int]:
    """Return the indices of the levels with these pyramid numbers among a backbone's levels, finest first.

    Raises:
        InputError: `context` is empty, has a number twice, or names a level that the backbone lacks.
    """
    missing = [i for i in context if 2**i not in levels.strides]
    if missing or not context or len(set(context)) < len(context):
        numbers = [stride.bit_length() - 1 for stride in levels.strides]
        raise InputError(f"context={tuple(context)} must name some of the backbone's levels {numbers}, each once")
    return sorted(levels.strides.index(2**i) for i in context)
