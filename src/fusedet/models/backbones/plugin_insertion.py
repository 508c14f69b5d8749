"""Insertion of plug-ins into a backbone's blocks, without changing a key of the backbone's own state dict.

Parts of a block without parameters (an activation, the drop path) are replaced by a sequence of themselves and the
plug-in.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    UniversalInvertedResidual,
)
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from fusedet.errors import InputError, prefix_errors
from fusedet.models.backbones.timm_backbone import TimmBackbone
from fusedet.models.protocols import BlockPlugin


@dataclass(frozen=True)
class Position:
    """A position for plug-ins in a type of block.

    Attributes:
        part: Name of the block's part that carries the plug-in.
        channels: Number of channels there, from the block.
        before: The plug-in runs before the part, not after it.
        default: It is one of the block's default positions.
    """

    part: str
    channels: Callable[[Any], int]
    before: bool = False
    default: bool = True


def _branch(channels: Callable[[Any], int]) -> dict[str, Position]:
    return {"after_branch": Position("drop_path", channels, before=True)}


# `aa`, the anti-aliasing of a stride, follows the activation: a plug-in there sees the smaller map
PLUGIN_POSITIONS: dict[type[nn.Module], dict[str, Position]] = {
    BasicBlock: {
        "after_conv1": Position("aa", lambda b: b.conv1.out_channels, default=False),
        "after_conv2": Position("drop_path", lambda b: b.conv2.out_channels, before=True),
    },
    Bottleneck: {
        "after_conv1": Position("act1", lambda b: b.conv1.out_channels, default=False),
        "after_conv2": Position("aa", lambda b: b.conv2.out_channels),
        "after_conv3": Position("drop_path", lambda b: b.conv3.out_channels, before=True),
    },
    ConvNeXtBlock: _branch(lambda b: b.conv_dw.out_channels),
    InvertedResidual: _branch(lambda b: b.conv_pwl.out_channels),
    EdgeResidual: _branch(lambda b: b.conv_pwl.out_channels),
    DepthwiseSeparableConv: _branch(lambda b: b.conv_pw.out_channels),
    UniversalInvertedResidual: _branch(lambda b: b.pw_proj.conv.out_channels),
}


def insert_plugin(backbone: TimmBackbone, plugin: BlockPlugin) -> int:
    """Insert one module of the plug-in at every position in every block of its stages.

    Positions by type of block:

    - ResNet and ResNeXt: `after_conv1` and `after_conv2`, after norm and activation (and anti-aliasing), and
      `after_conv3` of a bottleneck, before the residual sum. The last convolution of a basic block is `after_conv2`,
      before the sum. In a block with squeeze-and-excitation the last position is behind it.
    - ConvNeXt, and MobileNet's and EfficientNet's blocks with a residual sum: `after_branch`, before that sum.

    The modules are trained in frozen stages too.

    Returns:
        The number of inserted modules.

    Raises:
        InputError: A block lacks a position, a stage has no such blocks, or nothing would be inserted; the backbone is
            unchanged then.
    """
    stages = backbone.stages("model.plugin.stages", plugin.stages)
    insertions: list[tuple[nn.Module, Position, nn.Module]] = []
    for number, modules in stages.items():
        blocks = [(m, known) for module in modules for m in module.modules() if (known := _positions_of(m))]
        if not blocks:
            raise InputError(
                f"model.plugin.stages={list(stages)}: stage {number} of '{backbone.name}' has {_blocks_of(modules)}; "
                f"plug-ins go into {_format_types(PLUGIN_POSITIONS)}: leave the stage out or choose another backbone"
            )
        for block, known in blocks:
            for name in _chosen_positions(plugin, block, known, backbone.name):
                with prefix_errors("model.plugin"):
                    module = plugin.make(known[name].channels(block), number, name)
                insertions.append((block, known[name], module))
    if not insertions:
        raise InputError(
            "model.plugin: positions and stages must not be empty, nothing would be inserted; model.plugin=null "
            "does without"
        )
    for block, position, module in insertions:
        like = next(block.parameters())
        _attach(block, position, module.to(like.device, like.dtype).train(block.training))
    return len(insertions)


def _positions_of(block: nn.Module) -> dict[str, Position]:
    """Return the positions of a block by name; none for a block without a residual sum."""
    if not getattr(block, "has_skip", True):
        return {}
    return next((known for kind, known in PLUGIN_POSITIONS.items() if isinstance(block, kind)), {})


def _blocks_of(modules: list[nn.Module]) -> str:
    """Name the types of a stage's blocks, for a stage without positions for plug-ins."""
    kinds: dict[type[nn.Module], None] = {}
    queue = list(modules)
    while queue:
        module = queue.pop(0)
        if isinstance(module, (nn.Sequential, nn.ModuleList)) or type(module).__name__.endswith("Stage"):
            queue += module.children()
        elif any(True for _ in module.parameters()):
            kinds[type(module)] = None
    return _format_types(kinds) + (" without a residual sum" if kinds.keys() & PLUGIN_POSITIONS.keys() else "")


def _format_types(kinds: Iterable[type[nn.Module]]) -> str:
    """Format classes with their files, since timm has two named Bottleneck."""
    files: dict[str, list[str]] = {}
    for kind in kinds:
        files.setdefault(kind.__module__.rpartition(".")[2], []).append(kind.__name__)
    return ", ".join(f"{', '.join(names)} ({file})" for file, names in files.items())


def _chosen_positions(
    plugin: BlockPlugin, block: nn.Module, known: dict[str, Position], backbone: str
) -> tuple[str, ...]:
    if plugin.positions is None:
        return tuple(name for name, position in known.items() if position.default)
    if missing := [p for p in plugin.positions if p not in known]:
        kind = type(block).__name__
        raise InputError(
            f"model.plugin.positions: the blocks of '{backbone}' ({kind}) have no {missing[0]}, they have "
            f"{', '.join(known)}"
        )
    if len(set(plugin.positions)) < len(plugin.positions):
        raise InputError(f"model.plugin.positions={list(plugin.positions)} names a position twice")
    return plugin.positions


def _attach(block: nn.Module, position: Position, module: nn.Module) -> None:
    own = getattr(block, position.part)
    parts = [("plugin", module), ("own", own)] if position.before else [("own", own), ("plugin", module)]
    setattr(block, position.part, nn.Sequential(OrderedDict((name, m) for name, m in parts if m is not None)))
