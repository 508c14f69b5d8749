"""Small layers, weight initialization, and folding of BatchNorm."""

import copy
import math
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fusedet.errors import InputError, require_choice
from fusedet.models.ops.deformable import DeformConv, offset_convolutions
from fusedet.types import Features

Module = TypeVar("Module", bound=nn.Module)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """Make a convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)


Norm = Literal["gn", "bn"]
"""GroupNorm of 32 groups, or BatchNorm."""


class GroupNorm(nn.GroupNorm):
    """GroupNorm that also takes groups of a single value, as in a 1x1 map; their output is the shift."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, ...)."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class BatchNorm(nn.BatchNorm2d):
    """BatchNorm that uses its running statistics where a channel has one value only, without variance."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x (N, C, H, W)."""
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(x)


def conv_norm(inputs: int, outputs: int, kernel: int, norm: Norm | None, stride: int = 1) -> nn.Module:
    """Make a convolution with bias, or one without and a norm after it.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        kernel: Side of the kernel, odd; the size stays at stride 1.
        norm: "gn" is GroupNorm(32), "bn" BatchNorm; None for a bias instead.
        stride: Of the convolution.

    Raises:
        InputError: `norm` is unknown, or 32 groups do not divide the outputs.
    """
    if norm is None:
        return conv(inputs, outputs, kernel, stride)
    require_choice("norm", norm, Norm)
    if norm == "gn" and outputs % 32:
        raise InputError(f"norm=gn needs channels in multiples of 32, got {outputs}")
    after = GroupNorm(32, outputs) if norm == "gn" else BatchNorm(outputs)
    return nn.Sequential(conv(inputs, outputs, kernel, stride, bias=False), after)


def init_xavier(module: nn.Module) -> None:
    """Initialize every convolution inside by Xavier's uniform distribution, biases by 0 (FPN's convention).

    A group starts like a convolution of its own. torch counts the output channels of all groups as the fan-out of each,
    so that it would start a convolution of 32 groups four times too small.
    """
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            outputs, inputs = m.weight.shape[:2]  # inputs: of one group
            nn.init.xavier_uniform_(m.weight, gain=math.sqrt((inputs + outputs) / (inputs + outputs / m.groups)))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def init_normal(module: nn.Module, std: float = 0.01) -> None:
    """Initialize every convolution inside by a normal distribution, biases by 0 (RetinaNet, 2017, section 4.1).

    Convolutions that predict offsets keep their zeros.
    """
    offsets = offset_convolutions(module)
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m not in offsets:
            nn.init.normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def init_prior_bias(bias: Tensor | None, prior: float) -> None:
    """Initialize the bias of logits so that scores start at `prior`, in (0, 1) (RetinaNet, 2017, section 4.1)."""
    nn.init.constant_(bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]


def init_zero(module: Module) -> Module:
    """Initialize every parameter inside by 0 and return the module.

    A residual branch that ends in it starts as 0, a gate before a sigmoid as 1/2.
    """
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def init_kaiming(module: nn.Module) -> None:
    """Initialize every convolution inside by Kaiming's normal distribution (fan-out), biases by 0.

    Transposed convolutions too; MMDetection initializes RoI branches so.
    """
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def flatten_maps(maps: Features, width: int) -> Tensor:
    """Flatten the output maps of all levels to one row per prior.

    Shape:
        maps: (N, A * width, H_l, W_l) per level; result (N, P, width): finest level first, row by row, the A anchors of
        a cell together.
    """
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, width) for m in maps], dim=1)


@torch.no_grad()
def fold_batch_norm(module: nn.Module, example: Tensor) -> nn.Module:
    """Copy a module into eval mode and fold every BatchNorm into the convolution before it.

    A norm and a convolution are a pair where the norm's input is the convolution's output tensor and both run once.

    Args:
        module: Its forward takes `example` and returns a sequence of tensors.
        example: Small input (N, C, H, W).

    Raises:
        RuntimeError: The copy's outputs differ from the original's.
    """
    dtype = example.dtype
    # in float64: GroupNorm over few cells magnifies rounding, and the comparison shall show mistakes only
    module, example = copy.deepcopy(module).eval().double(), example.double()
    before = module(example)
    convolutions, kinds = (nn.Conv2d, DeformConv), (nn.Conv2d, DeformConv, nn.BatchNorm2d)
    produced: dict[int, nn.Module] = {}
    pairs: dict[nn.Module, nn.Module] = {}
    runs: dict[nn.Module, int] = {}
    alive: list[Tensor] = []  # keeps every recorded tensor, so that no id is reused

    def record(m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[m] = runs.get(m, 0) + 1
        if isinstance(m, convolutions):
            produced[id(output)] = m
            alive.append(output)
        elif id(inputs[0]) in produced:
            pairs[m] = produced[id(inputs[0])]

    hooks = [m.register_forward_hook(record) for m in module.modules() if isinstance(m, kinds)]
    module(example)
    for hook in hooks:
        hook.remove()
    parents = {m: (parent, name) for parent in module.modules() for name, m in parent.named_children()}
    for norm, convolution in pairs.items():
        if runs[norm] == runs[convolution] == 1 and isinstance(norm, nn.BatchNorm2d):
            fused: nn.Module = fuse_conv_bn_eval(convolution, norm)  # type: ignore[type-var]
            setattr(*parents[convolution], fused)
            # timm's norms include their activation
            setattr(*parents[norm], nn.Sequential(*(getattr(norm, k) for k in ("drop", "act") if hasattr(norm, k))))
    for old, new in zip(before, module(example)):
        if not torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().max())):
            raise RuntimeError("folding BatchNorm changed the outputs: the backbone uses a convolution's output twice")
    return module.to(dtype)
