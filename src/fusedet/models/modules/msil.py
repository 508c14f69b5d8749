"""MSIL.

References:
    "Multi-Semantic Interactive Learning for Object Detection", Wang et al., 2023, section 3.2, equations 3 to 6.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.ops.attention import ChannelAttention
from fusedet.models.ops.layers import GroupNorm, conv

Norm = Literal["gn", "none"]
Activation = Literal["relu", "none"]
Gate = Literal["sigmoid", "hard_sigmoid"]


class MSIL(nn.Module):
    """Semantic alignment, fusion and separation between a classification and a regression branch.

        E(x)  = conv(enc2(x + enc(x)))              one encoder for both branches            (3)
        U     = fuse(concat(E(F_reg), E(F_cls)))                                             (4)
        class = F_cls * sigmoid(dec (CAM (U) * U))  a decoder and a CAM of its own per branch (5, 6)
        box   = F_reg * sigmoid(dec'(CAM'(U) * U))

    The module is shared over the levels of the pyramid, after the towers and before every predictor.

    Args:
        channels: C of both branches, a multiple of 32 with norm="gn".
        align: Equation 3; without it E is the identity (Table 1, "w/o semantic alignment").
        fuse: Equation 4; without it each branch is gated by its own aligned map, and nothing passes between the two
            (ours, in no table).
        separate: Equation 5 as printed; without it the gate is sigmoid(U), and no activation ends the fusion (Table 1,
            "w/o semantic separation"; that form is a choice).
        to_cls: Gate the classification branch (Table 2). With neither branch gated the module has no parameters and
            changes nothing.
        to_reg: Gate the regression branch (Table 2).
        encoder_kernel: Odd. The paper names the layers, not their sizes; all four kernels are choices.
        conv_kernel: Odd.
        fuse_kernel: Odd.
        decoder_kernel: Odd.
        reduction: Of the CAM's MLP, as in CBAM, which the paper cites.
        norm: After each of the encoder's two convolutions and after the fusion: "gn" is GroupNorm(32), "none" a bias of
            the convolutions. The paper names none (a choice).
        activation: In the same places, after the fusion with `separate` only: "relu" or "none" (a choice).
        gate: The outer function of equation 5, "activation function" in the paper (a choice); the one of equation 6 is
            printed. Both values map to 0..1.

    Raises:
        InputError: 32 groups do not divide `channels`; a kernel is even; a name is unknown.
    """

    def __init__(
        self,
        channels: int,
        align: bool = True,
        fuse: bool = True,
        separate: bool = True,
        to_cls: bool = True,
        to_reg: bool = True,
        encoder_kernel: int = 3,
        conv_kernel: int = 1,
        fuse_kernel: int = 1,
        decoder_kernel: int = 3,
        reduction: int = 16,
        norm: Norm = "gn",
        activation: Activation = "relu",
        gate: Gate = "sigmoid",
    ) -> None:
        super().__init__()
        for key, value, kind in (("norm", norm, Norm), ("activation", activation, Activation), ("gate", gate, Gate)):
            require_choice(key, value, kind)
        if channels < 1:
            raise InputError(f"channels={channels} must be at least 1")
        if norm == "gn" and channels % 32:
            raise InputError(
                "msil with norm=gn needs branches of a multiple of 32 channels (GroupNorm has 32 groups), got "
                f"{channels}"
            )
        kernels = {"encoder": encoder_kernel, "conv": conv_kernel, "fuse": fuse_kernel, "decoder": decoder_kernel}
        for name, kernel in kernels.items():
            if kernel < 1 or kernel % 2 == 0:
                raise InputError(f"{name}_kernel={kernel} must be odd, such as 1 or 3")
        if not 1 <= reduction <= channels:
            raise InputError(f"reduction={reduction} must be between 1 and the {channels} channels")
        self.to_cls, self.to_reg, self.gate = to_cls, to_reg, gate
        is_used = to_cls or to_reg
        self.align = (
            _Align(channels, encoder_kernel, conv_kernel, norm, activation) if align and is_used else nn.Identity()
        )
        # without separation U goes into the sigmoid itself, where a ReLU would keep the gate at 0.5 or more
        ending = activation if separate else "none"
        self.fuse = _unit(2 * channels, channels, fuse_kernel, norm, ending) if fuse and is_used else None
        self.separate_cls = _Separate(channels, decoder_kernel, reduction) if separate and to_cls else nn.Identity()
        self.separate_reg = _Separate(channels, decoder_kernel, reduction) if separate and to_reg else nn.Identity()

    def forward(self, cls: Tensor, reg: Tensor) -> tuple[Tensor, Tensor]:
        """Gate the two branches of a level, cls and reg, each (N, C, H, W)."""
        gate_cls, gate_reg = self.gates(cls, reg)
        return cls if gate_cls is None else cls * gate_cls, reg if gate_reg is None else reg * gate_reg

    def gates(self, cls: Tensor, reg: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute the pixel attention (N, C, H, W), in 0..1, of each branch; None for a branch without gate."""
        if not (self.to_cls or self.to_reg):
            return None, None
        # the encoder is shared, so both branches pass it as one batch
        both = self.align(torch.cat([reg, cls]))
        aligned_reg, aligned_cls = both[: cls.shape[0]], both[cls.shape[0] :]
        if self.fuse:
            aligned_cls = aligned_reg = self.fuse(torch.cat([aligned_reg, aligned_cls], dim=1))  # U
        squash = F.hardsigmoid if self.gate == "hard_sigmoid" else torch.sigmoid
        return (
            squash(self.separate_cls(aligned_cls)) if self.to_cls else None,
            squash(self.separate_reg(aligned_reg)) if self.to_reg else None,
        )


class _Align(nn.Module):
    """E of equation 3: (N, C, H, W) to the same shape."""

    def __init__(
        self, channels: int, encoder_kernel: int, conv_kernel: int, norm: Norm, activation: Activation
    ) -> None:
        super().__init__()
        self.enc = _unit(channels, channels, encoder_kernel, norm, activation)
        self.enc2 = _unit(channels, channels, encoder_kernel, norm, activation)
        self.conv = conv(channels, channels, conv_kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.enc2(x + self.enc(x)))


class _Separate(nn.Module):
    """dec(CAM(U) * U) of equation 5, before the gate's function."""

    def __init__(self, channels: int, kernel: int, reduction: int) -> None:
        super().__init__()
        self.cam = ChannelAttention(channels, reduction)  # (6)
        self.dec = conv(channels, channels, kernel)

    def forward(self, fused: Tensor) -> Tensor:
        return self.dec(self.cam(fused) * fused)


def _unit(inputs: int, outputs: int, kernel: int, norm: Norm, activation: Activation) -> nn.Sequential:
    """Make a convolution with GroupNorm(32) or a bias, and a ReLU or none."""
    return nn.Sequential(
        conv(inputs, outputs, kernel, bias=norm == "none"),
        GroupNorm(32, outputs) if norm == "gn" else nn.Identity(),
        nn.ReLU(inplace=True) if activation == "relu" else nn.Identity(),
    )
