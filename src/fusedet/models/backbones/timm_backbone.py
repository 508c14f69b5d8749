"""Backbone: any timm model with feature extraction, with frozen stages, frozen BatchNorm and deformable stages."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, Self

import timm
import torch
from timm.layers import LayerNorm2d
from timm.models import FeatureListNet, PretrainedCfg
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusedet.errors import InputError, require_choice
from fusedet.models.backbones.pretrained import STRIDES, create_timm_model, to_channels_first
from fusedet.models.backbones.stages import (
    LastStage,
    drop_first_pool,
    make_deformable,
    select_stages,
    split_stages,
    stride_in_conv1,
)
from fusedet.models.backbones.trident import TridentConv, make_trident
from fusedet.models.ops.layers import Norm
from fusedet.types import Features, Levels

Style = Literal["pytorch", "caffe"]


class TimmBackbone(nn.Module):
    """A timm model that gives the feature maps C2 to C5, strides 4, 8, 16 and 32.

    Args:
        name: timm's name of the model, with or without the tag of its weights ("resnet50.tv_in1k").
        pretrained: Fetch timm's weights.
        weights: Local file of weights instead (.safetensors, .pth; a plain state dict).
        frozen_stages: -1 freezes nothing, 0 the stem, k the stem and the first k stages, their BatchNorm included.
            Plug-ins inserted into a frozen stage are trained.
        norm_eval: Keep every BatchNorm of the backbone in eval mode, while scale and shift are trained (MMDetection's
            convention).
        deformable_stages: ResNet's layer numbers, usually (2, 3, 4), c3 to c5 of "Deformable Convolutional Networks".
            Every block's 3x3 convolution there samples at predicted offsets; in a basic block, which MMDetection
            refuses, the second one. They keep their weights and start as the plain convolutions.
        modulated: Deformable convolutions v2, which predict a mask too and start as half of the plain convolutions.
        trident_stages: ResNet's layer numbers of TridentNet's stages, (3,) in the paper, for two-stage detectors. Every
            block's 3x3 convolution there, in a basic block the second one, runs once per dilation with one weight.
        trident_dilations: Dilation of each branch.
        trident_branch: The branch that runs in eval mode, by its index; None for all branches.
        style: Where a ResNet's bottlenecks halve the map: "pytorch" in the 3x3 convolution, "caffe" in the first 1x1
            convolution, as in the paper's code and in MMDetection's caffe models.
        mean: Mean per channel in 0..255 that the weights expect; timm's for this model by default, or the average of
            these for other channels than RGB.
        std: Standard deviation per channel in 0..255; timm's by default, likewise.
        zero_init: Without weights, initialize the last norm of every residual block with 0, as timm and MMDetection do;
            false: with 1, as torchvision does.
        norm: "gn" replaces every BatchNorm of a ResNet by GroupNorm of 32 groups; `frozen_stages` freezes its scales.
        branch_maps: Of an HRNet, the maps of its four branches as they are (C, 2C, 4C and 8C channels), as detection
            papers use them; by default timm's, widened to 128 to 1024 channels.
        pool_first: Of a Res2Net, average-pool the last split of stage 1's first block, as timm and the authors do;
            false: leave it as it is, as MMDetection does.
        output_norm: LayerNorm over the channels of every map, as detectors have it on Swin and ConvNeXt.
        channels: C, the channels of the images. Other numbers than 3 fold or repeat the weights of the first
            convolution, as timm's `in_chans` does.

    Attributes:
        levels: Channels and strides of the feature maps.
        branches: Number of trident branches, 1 without. In train mode, or with trident_branch=None, the maps hold the
            batch once per branch, all images of the first branch first.
        scale: (C, 1, 1). Images in 0..255 times `scale` plus `shift` are what the weights expect.
        shift: (C, 1, 1).

    Raises:
        InputError: The name is unknown; the model has no feature maps of these strides, or no blocks that an option
            needs; `modulated` without `deformable_stages`; a `std` of 0 or less; weights that cannot be loaded.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        weights: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        deformable_stages: tuple[int, ...] = (),
        modulated: bool = False,
        trident_stages: tuple[int, ...] = (),
        trident_dilations: tuple[int, ...] = (1, 2, 3),
        trident_branch: int | None = 1,
        style: Style = "pytorch",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        zero_init: bool = True,
        norm: Norm = "bn",
        branch_maps: bool = False,
        pool_first: bool = True,
        output_norm: bool = False,
        channels: int = 3,
    ) -> None:
        super().__init__()
        require_choice("style", style, Style)
        require_choice("norm", norm, Norm)
        if modulated and not deformable_stages:
            raise InputError(
                "modulated=true needs deformable convolutions: set deformable_stages, such as [2, 3, 4], or leave it "
                "out"
            )
        self.name, self.norm_eval = name, norm_eval
        # the attribute's name is part of every checkpoint's keys (torchvision's too)
        options: dict[str, Any] = {} if zero_init else {"zero_init_last": False}
        options |= {"norm_layer": "groupnorm"} if norm == "gn" else {}
        options |= {"feature_location": ""} if branch_maps else {}
        options |= {} if channels == 3 else {"in_chans": channels}
        self.body = create_timm_model(name, pretrained, weights, options)
        info = self.body.feature_info
        self.map_indices = [i for i, stride in enumerate(info.reduction()) if stride in STRIDES]
        self.stage_modules = [info.module_name()[i] for i in self.map_indices]
        self.levels = Levels(
            tuple(info.channels()[i] for i in self.map_indices), tuple(info.reduction()[i] for i in self.map_indices)
        )
        config = timm.get_pretrained_cfg(name) or PretrainedCfg()
        if std is not None and min(std) <= 0:
            raise InputError(f"std={list(std)} must be above 0")
        for key, given in (("mean", mean), ("std", std)):
            if given is not None and len(given) != channels:
                raise InputError(f"{key}={list(given)} must have a number for each of the {channels} channels")
        mean_255 = _channel_values(config.mean, channels) if mean is None else torch.tensor(mean)
        std_255 = _channel_values(config.std, channels) if std is None else torch.tensor(std)
        self.register_buffer("scale", (1 / std_255).view(channels, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean_255 / std_255).view(channels, 1, 1), persistent=False)
        self.output_norms = nn.ModuleList(
            _channel_norm(self.body, c) if output_norm else nn.Identity() for c in self.levels.channels
        )
        if not pool_first:
            drop_first_pool(self.body, name)
        if style == "caffe":
            stride_in_conv1(self.body, name)
        if deformable_stages:
            make_deformable(self.stages("deformable_stages", deformable_stages), name, modulated)
        self.branches, self.copies = 1, nn.ModuleList()
        if trident_stages:
            if both := set(trident_stages) & set(deformable_stages):
                raise InputError(f"stage {min(both)} cannot be in both trident_stages and deformable_stages")
            chosen = self.stages("trident_stages", trident_stages)
            copies = make_trident(self.body, chosen, name, trident_dilations, trident_branch)
            self.branches = len(trident_dilations)
            self.copies = nn.ModuleList(
                copies if stride < 2 ** (min(chosen) + 1) else nn.Identity() for stride in self.levels.strides
            )
        self.frozen = self._first_stages(frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)
        # collected before plug-ins are inserted: their norms stay in train mode
        self.eval_norms = [
            m for part in ([self.body] if norm_eval else self.frozen) for m in part.modules() if _is_batch_norm(m)
        ]
        self.has_weights = bool(pretrained or weights)

    def forward(self, images: Tensor) -> Features:
        """Compute the feature maps C2 to C5.

        Shape:
            images (N, C, H, W), normalized; result: (N, C_l, H / stride_l, W / stride_l) per level, in train mode
            (branches * N, ...).
        """
        maps = to_channels_first(self.body, self.body(images))
        maps = [norm(maps[i]) for norm, i in zip(self.output_norms, self.map_indices)]
        return [copies(x) for copies, x in zip(self.copies, maps)] if self.copies else maps

    def train(self, mode: bool = True) -> Self:
        """Set train mode, except for frozen BatchNorm."""
        super().train(mode)
        for norm in self.eval_norms:
            norm.eval()
        return self

    def take_last_stage(self) -> LastStage:
        """Take the last stage out of the backbone, for RoI stages that run it on pooled features (C4 detectors).

        The backbone then ends one level earlier.

        Raises:
            InputError: The last stage is no module of its own.
        """
        key = self.stage_modules[-1]
        if not isinstance(self.body, FeatureListNet) or key not in self.body or len(self.map_indices) < 2:
            raise InputError(f"'{self.name}' has no last stage that an RoI stage could take: choose a ResNet")
        if any(isinstance(m, TridentConv) for m in self.body[key].modules()):
            raise InputError("trident_stages must not include the last stage, which the RoI stage takes")
        blocks = self.body.pop(key)
        self.body.return_layers.pop(key)
        self.map_indices.pop()
        self.stage_modules.pop()
        inside = set(blocks.modules())
        stage = LastStage(
            blocks,
            self.levels.channels[-2],
            self.levels.channels[-1],
            self.levels.strides[-1] // self.levels.strides[-2],
            [norm for norm in self.eval_norms if norm in inside],
        )
        self.eval_norms = [norm for norm in self.eval_norms if norm not in inside]
        self.levels = Levels(self.levels.channels[:-1], self.levels.strides[:-1])
        self.output_norms, self.copies = self.output_norms[:-1], self.copies[:-1]
        return stage

    def checkpoint_stages(self) -> None:
        """Keep no activations inside the stages; the backward pass computes each stage again (gradient checkpointing).

        Outputs, gradients and running statistics stay the same.

        Raises:
            InputError: The model does not split into stages.

        References:
            "Training Deep Nets with Sublinear Memory Cost", Chen et al., 2016.
        """
        for stage in split_stages(self.body, self.stage_modules, "train.checkpoint_backbone"):
            for module in stage:
                if any(parameter.requires_grad for parameter in module.parameters()):
                    module.forward = partial(_run_checkpointed, module, module.forward)

    def stages(self, option: str, numbers: tuple[int, ...]) -> dict[int, list[nn.Module]]:
        """Return the modules of stages by ResNet's layer numbers.

        Raises:
            InputError: The backbone has no such stage; the message names `option`.
        """
        return select_stages(split_stages(self.body, self.stage_modules, option), self.levels.strides, option, numbers)

    def _first_stages(self, count: int) -> list[nn.Module]:
        """Return the modules of the stem and the first `count` stages (none for -1), in execution order."""
        if not -1 <= count <= len(self.map_indices):
            raise InputError(f"frozen_stages={count} must be -1 (nothing) to {len(self.map_indices)}")
        if count < 0:
            return []
        stages = split_stages(self.body, self.stage_modules, f"frozen_stages={count}")[: count + 1]
        return [module for stage in stages for module in stage]


def _channel_norm(model: nn.Module, channels: int) -> nn.Module:
    """Make a LayerNorm over channels with the epsilon of a model's own."""
    own = next((m for m in model.modules() if isinstance(m, nn.LayerNorm)), None)
    return LayerNorm2d(channels, eps=1e-6 if own is None else own.eps)


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _run_checkpointed(module: nn.Module, forward: Callable[..., Any], *inputs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs)
    contexts = partial(_checkpoint_contexts, module)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=contexts)


def _checkpoint_contexts(module: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the contexts of the first and of the second computation."""
    return nullcontext(), _unchanged_statistics(module)


@contextmanager
def _unchanged_statistics(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of BatchNorm in train mode, which the first computation has updated.

    Copies take their place meanwhile: without any, autograd would save other tensors than the first time.
    """
    norms = [m for m in module.modules() if _is_batch_norm(m) and m.training]
    buffers = [dict(norm._buffers) for norm in norms]
    for norm, own in zip(norms, buffers):
        norm._buffers.update({name: None if value is None else value.clone() for name, value in own.items()})
    try:
        yield
    finally:
        for norm, own in zip(norms, buffers):
            norm._buffers.update(own)


def _channel_values(of_rgb: tuple[float, ...], channels: int) -> Tensor:
    """Return a statistic per channel in 0..255: timm's of RGB, or the average of these for other channels."""
    values = 255 * torch.tensor(of_rgb)
    return values if channels == len(values) else values.mean().repeat(channels)
