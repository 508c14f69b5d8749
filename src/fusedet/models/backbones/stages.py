"""The stages of a timm model by number, their deformable form, and the last one by itself."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Self

from timm.models.regnet import Bottleneck as RegNetBottleneck
from timm.models.res2net import Bottle2neck
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.deformable import DeformPack


def split_stages(model: nn.Module, names: list[str], option: str) -> list[list[nn.Module]]:
    """Split a model into its stem and its stages, in execution order.

    Args:
        model: timm model with feature extraction.
        names: Names of the modules that give the feature maps; each ends a stage.
        option: Name of the option that needs the stages, for the message.

    Raises:
        InputError: The model's modules do not split into stages.
    """
    units: list[tuple[str, nn.Module]] = []
    for name, child in model.named_children():
        inside = any(stage.startswith(f"{name}.") for stage in names)
        units += [(f"{name}_{k}", m) for k, m in child.named_children()] if inside else [(name, child)]
    order = [name for name, _ in units]
    last_units = [stage.replace(".", "_") for stage in names]
    if missing := [unit for unit in last_units if unit not in order]:
        raise InputError(f"{option}: this backbone does not split into stages ({missing[0]}), leave the option out")
    first = order.index(last_units[0])
    ends = [0, first, *(order.index(unit) + 1 for unit in last_units)]
    return [[module for _, module in units[a:b]] for a, b in pairwise(ends)]


def select_stages(
    stages: list[list[nn.Module]], strides: tuple[int, ...], option: str, numbers: tuple[int, ...]
) -> dict[int, list[nn.Module]]:
    """Select stages by ResNet's layer numbers: stage 1 ends at stride 4, stage 2 at 8, 3 at 16, 4 at 32.

    Args:
        stages: Modules of the stem, then of each stage.
        strides: Stride at the end of each stage.
        option: The config key of `numbers`, for the message.
        numbers: The stages to select.

    Raises:
        InputError: A number is no stage of the backbone, or is given twice.
    """
    known = {stride.bit_length() - 2: modules for stride, modules in zip(strides, stages[1:])}
    if not set(numbers) <= set(known) or len(set(numbers)) < len(numbers):
        raise InputError(f"{option}={list(numbers)} must be different ones of this backbone's stages {list(known)}")
    return {number: known[number] for number in numbers}


def stride_in_conv1(model: nn.Module, name: str) -> None:
    """Move the stride of every ResNet bottleneck from its second to its first convolution.

    Raises:
        InputError: The model has no such blocks.
    """
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise InputError(f"style=caffe: '{name}' has no bottlenecks of a ResNet, leave the option out")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def drop_first_pool(model: nn.Module, name: str) -> None:
    """Remove the average pooling of stride 1 from the first block of a Res2Net.

    Raises:
        InputError: The model is no Res2Net.
    """
    blocks: list[Any] = [m for m in model.modules() if isinstance(m, Bottle2neck)]
    if not blocks:
        raise InputError(f"pool_first=false: '{name}' is no Res2Net, leave the option out")
    blocks[0].pool = None


def make_deformable(stages: dict[int, list[nn.Module]], name: str, modulated: bool) -> None:
    """Make the 3x3 convolution of every ResNet or RegNet block in these stages deformable; its weights stay.

    In a basic block it is the second one.

    Raises:
        InputError: A stage has no such blocks.
    """
    replace_convolutions(stages, name, "deformable_stages", lambda conv: _to_deformable(conv, modulated))


def replace_convolutions(
    stages: dict[int, list[nn.Module]], name: str, option: str, make: Callable[[nn.Conv2d], nn.Module]
) -> None:
    """Replace the 3x3 convolution of every ResNet or RegNet block in these stages, of a basic block the second one.

    Args:
        stages: The modules of each stage, by ResNet's layer numbers.
        name: Name of the model in messages.
        option: Name of the option in messages.
        make: Makes the module that takes a convolution's place.

    Raises:
        InputError: A stage has no such blocks.
    """
    for number, modules in stages.items():
        blocks: list[Any] = [
            m
            for module in modules
            for m in module.modules()
            if isinstance(m, (BasicBlock, Bottleneck, RegNetBottleneck))
        ]
        if not blocks:
            raise InputError(f"{option}: stage {number} of '{name}' has no blocks of a ResNet, leave the option out")
        for block in blocks:
            holder, key = (block.conv2, "conv") if isinstance(block, RegNetBottleneck) else (block, "conv2")
            setattr(holder, key, make(getattr(holder, key)))


class LastStage(nn.Module):
    """A backbone's last stage, taken out of it to run on the pooled features of RoIs.

    Args:
        blocks: The stage.
        inputs: Channels of its input.
        channels: Channels of its output.
        stride: Quotient of the sizes of its input and output.
        eval_norms: Its BatchNorms that stay in eval mode.
    """

    def __init__(self, blocks: nn.Module, inputs: int, channels: int, stride: int, eval_norms: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.inputs, self.channels = blocks, inputs, channels
        self.stride, self.eval_norms = stride, eval_norms

    def forward(self, x: Tensor) -> Tensor:
        """Compute x (M, inputs, H, W) to (M, channels, H / stride, W / stride)."""
        return self.blocks(x)

    def train(self, mode: bool = True) -> Self:
        """Set train mode, except for frozen BatchNorm."""
        super().train(mode)
        for norm in self.eval_norms:
            norm.eval()
        return self


def _to_deformable(conv: nn.Conv2d, modulated: bool) -> DeformPack:
    (kernel, _), (stride, _), (dilation, _) = conv.kernel_size, conv.stride, conv.dilation
    pack = DeformPack(
        conv.in_channels, conv.out_channels, kernel, stride, conv.groups, dilation, conv.bias is not None, modulated
    )
    pack.load_state_dict(conv.state_dict(), strict=False)  # the offsets keep their zeros
    return pack.to(conv.weight.device, conv.weight.dtype)
