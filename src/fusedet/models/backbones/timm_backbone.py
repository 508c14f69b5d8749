"""Bodies: any timm model with feature extraction, with frozen stages, batch norms at rest and deformable stages."""

from __future__ import annotations

from typing import Literal, Self

import timm
import torch
from timm.models import PretrainedCfg
from torch import Tensor, nn

from fusedet.errors import InputError, one_of
from fusedet.models.backbones.pretrained import STRIDES, create_timm_model
from fusedet.models.backbones.stages import make_deformable, select_stages, split_stages, stride_in_conv1
from fusedet.types import Features, Levels

Style = Literal["pytorch", "caffe"]


class TimmBackbone(nn.Module):
    """A timm body that gives C2 to C5 (strides 4, 8, 16, 32).

    name: timm's name of the model, with or without the tag of its weights ("resnet50.tv_in1k").
    pretrained: fetch timm's weights. weights: a local file of them instead (.safetensors, .pth; a plain state dict).
    frozen_stages: -1 nothing, 0 the stem, k the stem and the first k stages; frozen batch norms rest too. Plug-ins that are inserted
    into a frozen stage are trained.
    norm_eval: all batch norms of the body stay in eval mode while scale and shift are trained (MMDetection's convention).
    deformable_stages: ResNet's layer numbers, usually [2, 3, 4] (c3-c5 of "Deformable Convolutional Networks"), where every block's
    3x3 convolution samples at offsets that it predicts; in basic blocks, where MMDetection refuses them, the second convolution.
    They keep their weights; without `modulated` they start as the plain convolutions, and with it (a mask too, v2) as half of them.
    style: where a ResNet's bottlenecks halve the map, in the 3x3 convolution ("pytorch") or in the first 1x1 convolution ("caffe", as
    in the paper's code and in MMDetection's caffe bodies).
    zero_init: without weights, the last norm of every residual block starts at 0, the block as the identity (timm's and MMDetection's
    habit); false, at 1 (torchvision's).
    mean, std: per channel of RGB in 0..255, what the weights know images to be normalised by; timm's for this model by default.
    Raises InputError for an unknown name, a body without feature maps of these strides or without such blocks, modulated without
    deformable stages, a std that is not above 0, and weights that cannot be had.

    `levels` promises channels and strides; images in 0..255 times `scale` plus `shift` (3, 1, 1) are what the weights know.
    """

    def __init__(
        self,
        name: str,
        pretrained: bool = True,
        weights: str | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        deformable_stages: tuple[int, ...] = (),
        modulated: bool = False,
        style: Style = "pytorch",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        one_of("style", style, Style)
        if modulated and not deformable_stages:
            raise InputError(
                "modulated=true is of deformable convolutions: name deformable_stages, such as [2, 3, 4], or leave it out"
            )
        self.name, self.norm_eval = name, norm_eval
        self.body = create_timm_model(name, pretrained, weights, zero_init)
        info = self.body.feature_info
        self.places = [i for i, stride in enumerate(info.reduction()) if stride in STRIDES]
        self.modules_of_levels = [info.module_name()[i] for i in self.places]
        self.levels = Levels(
            tuple(info.channels()[i] for i in self.places), tuple(info.reduction()[i] for i in self.places)
        )
        config = timm.get_pretrained_cfg(name) or PretrainedCfg()
        if std is not None and min(std) <= 0:
            raise InputError(f"std={list(std)} must be above 0")
        middle = 255 * torch.tensor(config.mean) if mean is None else torch.tensor(mean)
        spread = 255 * torch.tensor(config.std) if std is None else torch.tensor(std)
        self.register_buffer("scale", (1 / spread).view(3, 1, 1), persistent=False)
        self.register_buffer("shift", (-middle / spread).view(3, 1, 1), persistent=False)
        if style == "caffe":
            stride_in_conv1(self.body, name)
        if deformable_stages:
            make_deformable(self.stages("deformable_stages", deformable_stages), name, modulated)
        self.frozen = self._first_stages(frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)
        # taken now: the norms of plug-ins, which come later, never rest
        self.resting = [
            m for part in ([self.body] if norm_eval else self.frozen) for m in part.modules() if _is_batch_norm(m)
        ]
        self.has_weights = bool(pretrained or weights)

    def forward(self, images: Tensor) -> Features:
        """Normalised images (N, 3, H, W) to C2..C5."""
        maps = self.body(images)
        return [maps[i] for i in self.places]

    def train(self, mode: bool = True) -> Self:
        """Train mode, but for the batch norms that rest."""
        super().train(mode)
        for norm in self.resting:
            norm.eval()
        return self

    def stages(self, option: str, numbers: tuple[int, ...]) -> dict[int, list[nn.Module]]:
        """The modules of these stages, which number like ResNet's layers; InputError, naming the option, for others."""
        return select_stages(
            split_stages(self.body, self.modules_of_levels, option), self.levels.strides, option, numbers
        )

    def _first_stages(self, count: int) -> list[nn.Module]:
        """The modules of the stem and the first `count` stages (none for -1), in the order in which they run."""
        if not -1 <= count <= len(self.places):
            raise InputError(f"frozen_stages={count} must be -1 (nothing) to {len(self.places)}")
        if count < 0:
            return []
        return [
            m
            for stage in split_stages(self.body, self.modules_of_levels, f"frozen_stages={count}")[: count + 1]
            for m in stage
        ]


def _is_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
