"""The stages of a timm body, by numbers, and their deformable form."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from fusedet.errors import InputError
from fusedet.models.ops.deformable import DeformPack


def split_stages(body: nn.Module, names: list[str], option: str) -> list[list[nn.Module]]:
    """The body's modules in the order in which they run: the stem, then each stage, which ends with the module that gives its map.

    names: of these modules. Raises InputError, naming the option that asks, for a body whose stages cannot be told apart.
    """
    units: list[tuple[str, nn.Module]] = []
    for name, child in body.named_children():
        inside = any(stage.startswith(f"{name}.") for stage in names)
        units += [(f"{name}_{k}", m) for k, m in child.named_children()] if inside else [(name, child)]
    order = [name for name, _ in units]
    places = [stage.replace(".", "_") for stage in names]
    if lacking := [place for place in places if place not in order]:
        raise InputError(
            f"{option}: this body has no stages that can be told apart ({lacking[0]}), leave the option out"
        )
    first = order.index(places[0])
    ends = [0, first, *(order.index(place) + 1 for place in places)]
    return [[module for _, module in units[a:b]] for a, b in pairwise(ends)]


def select_stages(
    stages: list[list[nn.Module]], strides: tuple[int, ...], option: str, numbers: tuple[int, ...]
) -> dict[int, list[nn.Module]]:
    """Those stages that are asked for, by ResNet's layer numbers: stage 1 ends at stride 4, stage 2 at 8, 3 at 16, 4 at 32."""
    known = {stride.bit_length() - 2: modules for stride, modules in zip(strides, stages[1:])}
    if not set(numbers) <= set(known) or len(set(numbers)) < len(numbers):
        raise InputError(f"{option}={list(numbers)} must be different ones of this body's stages {list(known)}")
    return {number: known[number] for number in numbers}


def stride_in_conv1(body: nn.Module, name: str) -> None:
    """Let every bottleneck of a ResNet halve the map in its first convolution, not in its second one.

    Raises InputError for a body without such blocks.
    """
    blocks: list[Any] = [m for m in body.modules() if isinstance(m, Bottleneck)]
    if not blocks:
        raise InputError(f"style=caffe: '{name}' has no bottlenecks of a ResNet, leave the option out")
    for block in blocks:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride


def make_deformable(stages: dict[int, list[nn.Module]], name: str, modulated: bool) -> None:
    """Make the 3x3 convolution (of a basic block the second one) of every ResNet block in these stages deformable, weights kept.

    Raises InputError for a stage without such blocks.
    """
    for number, modules in stages.items():
        blocks: list[Any] = [
            m for module in modules for m in module.modules() if isinstance(m, (BasicBlock, Bottleneck))
        ]
        if not blocks:
            raise InputError(
                f"deformable_stages: stage {number} of '{name}' has no blocks of a ResNet, leave the option out"
            )
        for block in blocks:
            block.conv2 = _deformable(block.conv2, modulated)


def _deformable(conv: nn.Conv2d, modulated: bool) -> DeformPack:
    (kernel, _), (stride, _), (dilation, _) = conv.kernel_size, conv.stride, conv.dilation
    pack = DeformPack(
        conv.in_channels, conv.out_channels, kernel, stride, conv.groups, dilation, conv.bias is not None, modulated
    )
    pack.load_state_dict(conv.state_dict(), strict=False)  # the offsets keep their zeros
    return pack.to(conv.weight.device, conv.weight.dtype)
