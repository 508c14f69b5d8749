"""Plug-ins into a body's blocks, without changing a key of the body's own state dict.

Parts of a block that hold no parameters (an activation, the drop path) are replaced by a sequence of themselves and the plug-in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from timm.models._efficientnet_blocks import (
    DepthwiseSeparableConv,
    EdgeResidual,
    InvertedResidual,
    UniversalInvertedResidual,
)
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from fusedet.errors import InputError
from fusedet.models.backbones.timm_backbone import TimmBackbone


class Plugin(Protocol):
    """Options of a block plug-in; `make` gives the module for a block of that many channels in that stage, at that position."""

    @property
    def positions(self) -> tuple[str, ...] | None:
        """Where in every block; None for the block's usual positions."""

    @property
    def stages(self) -> tuple[int, ...]:
        """ResNet's layer numbers."""

    def make(self, channels: int, stage: int, position: str) -> nn.Module:
        """(N, channels, H, W) to the same shape."""


@dataclass(frozen=True)
class Place:
    """The part of a block that carries a plug-in, behind or ahead of what it does; the channels there."""

    part: str
    channels: Callable[[Any], int]
    ahead: bool = False
    usual: bool = True


def _branch(channels: Callable[[Any], int]) -> dict[str, Place]:
    return {"after_branch": Place("drop_path", channels, ahead=True)}


# where a stride is anti-aliased, `aa` follows the activation, and the plug-in the smaller map
PLUGIN_POSITIONS: dict[type[nn.Module], dict[str, Place]] = {
    BasicBlock: {
        "after_conv1": Place("aa", lambda b: b.conv1.out_channels, usual=False),
        "after_conv2": Place("drop_path", lambda b: b.conv2.out_channels, ahead=True),
    },
    Bottleneck: {
        "after_conv1": Place("act1", lambda b: b.conv1.out_channels, usual=False),
        "after_conv2": Place("aa", lambda b: b.conv2.out_channels),
        "after_conv3": Place("drop_path", lambda b: b.conv3.out_channels, ahead=True),
    },
    ConvNeXtBlock: _branch(lambda b: b.conv_dw.out_channels),
    InvertedResidual: _branch(lambda b: b.conv_pwl.out_channels),
    EdgeResidual: _branch(lambda b: b.conv_pwl.out_channels),
    DepthwiseSeparableConv: _branch(lambda b: b.conv_pw.out_channels),
    UniversalInvertedResidual: _branch(lambda b: b.pw_proj.conv.out_channels),
}


def insert_plugin(backbone: TimmBackbone, plugin: Plugin) -> int:
    """Put one module of the plug-in at every position in every block of its stages; the number of modules.

    Blocks of a ResNet or ResNeXt take after_conv1, after_conv2 and, where they have a third convolution, after_conv3; the first two stand
    after norm and activation (and anti-aliasing), the last one before the residual sum (a basic block's last one is after_conv2; where a
    block has squeeze-and-excitation, behind it). Blocks of ConvNeXt, and those of MobileNet and EfficientNet that have a residual sum, take
    after_branch, before that sum. Modules are trained also in frozen stages. Raises InputError, and changes nothing, where a block lacks
    a position, a stage has no such blocks or nothing is asked for.
    """
    stages = backbone.stages("model.plugin.stages", plugin.stages)
    found: list[tuple[nn.Module, Place, nn.Module]] = []
    for number, modules in stages.items():
        blocks = [(m, places) for module in modules for m in module.modules() if (places := _places(m))]
        if not blocks:
            raise InputError(
                f"model.plugin.stages={list(stages)}: stage {number} of '{backbone.name}' has {_blocks_of(modules)}; plug-ins go into "
                f"{_named(PLUGIN_POSITIONS)}: leave the stage out or choose another body"
            )
        for block, places in blocks:
            for position in _positions(plugin, block, places, backbone.name):
                place = places[position]
                try:
                    module = plugin.make(place.channels(block), number, position)
                except InputError as error:
                    raise InputError(f"model.plugin: {error}") from error
                found.append((block, place, module))
    if not found:
        raise InputError(
            "model.plugin: positions and stages must not be empty, nothing would be inserted; model.plugin=null does without"
        )
    for block, place, module in found:
        like = next(block.parameters())
        _carry(block, place, module.to(like.device, like.dtype).train(block.training))
    return len(found)


def _places(block: nn.Module) -> dict[str, Place]:
    """The positions that a block has; none where there is no residual sum."""
    if not getattr(block, "has_skip", True):
        return {}
    return next((places for kind, places in PLUGIN_POSITIONS.items() if isinstance(block, kind)), {})


def _blocks_of(modules: list[nn.Module]) -> str:
    """What a stage without places for plug-ins is made of: the kinds of its blocks, by timm's names."""
    kinds: dict[type[nn.Module], None] = {}
    rest = list(modules)
    while rest:
        module = rest.pop(0)
        if isinstance(module, (nn.Sequential, nn.ModuleList)) or type(module).__name__.endswith("Stage"):
            rest += module.children()
        elif any(True for _ in module.parameters()):
            kinds[type(module)] = None
    return _named(kinds) + (" without a residual sum" if kinds.keys() & PLUGIN_POSITIONS.keys() else "")


def _named(kinds: Iterable[type[nn.Module]]) -> str:
    """Classes with their files, since timm has two of the name Bottleneck."""
    files: dict[str, list[str]] = {}
    for kind in kinds:
        files.setdefault(kind.__module__.rpartition(".")[2], []).append(kind.__name__)
    return ", ".join(f"{', '.join(names)} ({file})" for file, names in files.items())


def _positions(plugin: Plugin, block: nn.Module, places: dict[str, Place], name: str) -> tuple[str, ...]:
    if plugin.positions is None:
        return tuple(position for position, place in places.items() if place.usual)
    if lacking := [p for p in plugin.positions if p not in places]:
        kind = type(block).__name__
        raise InputError(
            f"model.plugin.positions: the blocks of '{name}' ({kind}) have no {lacking[0]}, they have {', '.join(places)}"
        )
    if len(set(plugin.positions)) < len(plugin.positions):
        raise InputError(f"model.plugin.positions={list(plugin.positions)} names a position twice")
    return plugin.positions


def _carry(block: nn.Module, place: Place, module: nn.Module) -> None:
    own = getattr(block, place.part)
    parts = [("plugin", module), ("own", own)] if place.ahead else [("own", own), ("plugin", module)]
    setattr(block, place.part, nn.Sequential(OrderedDict((name, m) for name, m in parts if m is not None)))
