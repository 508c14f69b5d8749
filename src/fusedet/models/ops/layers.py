"""Small layers and what is done to whole modules."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fusedet.models.ops.deformable import DeformConv, offset_convolutions
from fusedet.types import Features


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)


class GroupNorm(nn.GroupNorm):
    """A group norm that also takes groups of one single value, as a 1x1 map of one image has them: they become the shift."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) to the same shape."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def init_xavier(module: nn.Module) -> None:
    """Xavier's uniform start for every convolution inside, zero biases (FPN's convention)."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.xavier_uniform_(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def init_normal(module: nn.Module, std: float = 0.01) -> None:
    """A normal start of that standard deviation for every convolution inside, zero biases (RetinaNet, 2017, 4.1).

    Convolutions that predict offsets keep theirs.
    """
    offsets = offset_convolutions(module)
    for m in module.modules():
        if isinstance(m, nn.Conv2d) and m not in offsets:
            nn.init.normal_(m.weight, std=std)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def init_prior_bias(bias: Tensor | None, prior: float) -> None:
    """The bias of logits that start with the score `prior`, above 0 and below 1 (RetinaNet, 2017, 4.1)."""
    nn.init.constant_(bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]


def init_kaiming(module: nn.Module) -> None:
    """Kaiming's normal start by fan-out for every plain and transposed convolution inside, zero biases (MMDetection's of RoI branches)."""
    for m in module.modules():
        if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def flatten_maps(maps: Features, width: int) -> Tensor:
    """Maps (N, A * width, H, W) of all levels as rows (N, P, width): finest first, row by row, a cell's anchors together."""
    return torch.cat([m.permute(0, 2, 3, 1).reshape(m.shape[0], -1, width) for m in maps], dim=1)


@torch.no_grad()
def fold_batch_norm(module: nn.Module, example: Tensor) -> nn.Module:
    """A copy in eval mode whose batch norms are folded into the convolutions before them.

    example is one small input (N, C, H, W): a pair is found where a norm's input is the very tensor that a convolution gave,
    and both ran once. Raises RuntimeError if the copy's outputs differ from the original's.
    """
    dtype = example.dtype
    # in float64: a group norm over few cells magnifies the rounding, and the comparison is to find mistakes alone
    module, example = copy.deepcopy(module).eval().double(), example.double()
    before = module(example)
    convolutions, kinds = (nn.Conv2d, DeformConv), (nn.Conv2d, DeformConv, nn.BatchNorm2d)
    made: dict[int, nn.Module] = {}
    pairs: dict[nn.Module, nn.Module] = {}
    runs: dict[nn.Module, int] = {}
    alive: list[Tensor] = []  # keeps every seen tensor, so that no id is given twice

    def seen(m: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        runs[m] = runs.get(m, 0) + 1
        if isinstance(m, convolutions):
            made[id(output)] = m
            alive.append(output)
        elif id(inputs[0]) in made:
            pairs[m] = made[id(inputs[0])]

    hooks = [m.register_forward_hook(seen) for m in module.modules() if isinstance(m, kinds)]
    module(example)
    for hook in hooks:
        hook.remove()
    owners = {m: (parent, name) for parent in module.modules() for name, m in parent.named_children()}
    for norm, convolution in pairs.items():
        if runs[norm] == runs[convolution] == 1 and isinstance(norm, nn.BatchNorm2d):
            fused: nn.Module = fuse_conv_bn_eval(convolution, norm)  # type: ignore[type-var]
            setattr(*owners[convolution], fused)
            # timm's norms carry their activation with them
            setattr(*owners[norm], nn.Sequential(*(getattr(norm, k) for k in ("drop", "act") if hasattr(norm, k))))
    for old, new in zip(before, module(example)):
        if not torch.allclose(old, new, rtol=1e-3, atol=1e-3 * float(old.abs().max())):
            raise RuntimeError(
                "folding the batch norms changed the outputs: the body uses a convolution's output twice"
            )
    return module.to(dtype)
