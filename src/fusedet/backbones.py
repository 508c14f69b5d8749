"""Bodies: any timm model with feature extraction, with frozen stages and batch norms at rest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import timm
import torch
from safetensors import SafetensorError
from timm.models import PretrainedCfg, load_state_dict
from torch import Tensor, nn

from fusedet.errors import InputError, unknown
from fusedet.types import Features, Levels

_STRIDES = (4, 8, 16, 32)


class Backbone(nn.Module):
    """A timm body that gives C2 to C5 (strides 4, 8, 16, 32).

    name: timm's name of the model, with or without the tag of its weights ("resnet50.tv_in1k").
    pretrained: fetch timm's weights. weights: a local file of them instead (.safetensors, .pth; a plain state dict).
    frozen_stages: -1 nothing, 0 the stem, k the stem and the first k stages; frozen batch norms rest too.
    norm_eval: all batch norms stay in eval mode while scale and shift are trained (MMDetection's convention).
    Raises InputError for an unknown name, a body without feature maps of these strides, and weights that cannot be had.

    `levels` promises channels and strides; pictures in 0..255 times `scale` plus `shift` (3, 1, 1) are what the weights know.
    """

    def __init__(
        self, name: str, pretrained: bool = True, weights: str | None = None, frozen_stages: int = -1, norm_eval: bool = False
    ) -> None:
        super().__init__()
        self.name, self.norm_eval = name, norm_eval
        self.body = _create(name, pretrained, weights)
        info = self.body.feature_info
        places = [i for i, stride in enumerate(info.reduction()) if stride in _STRIDES]
        self.places = places
        self.levels = Levels(tuple(info.channels()[i] for i in places), tuple(info.reduction()[i] for i in places))
        config = timm.get_pretrained_cfg(name) or PretrainedCfg()
        mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)
        self.frozen = _stages(self.body, [info.module_name()[i] for i in places], frozen_stages)
        for module in self.frozen:
            module.requires_grad_(False)
        self.has_weights = bool(pretrained or weights)

    def forward(self, images: Tensor) -> Features:
        """Normalised pictures (N, 3, H, W) to C2..C5."""
        maps = self.body(images)
        return [maps[i] for i in self.places]

    def train(self, mode: bool = True) -> Self:
        """Train mode, but for the batch norms that rest."""
        super().train(mode)
        resting = [self.body] if self.norm_eval else self.frozen
        for module in resting if mode else []:
            for m in module.modules():
                if isinstance(m, nn.modules.batchnorm._BatchNorm):
                    m.eval()
        return self


def _create(name: str, pretrained: bool, weights: str | None) -> Any:
    if not timm.is_model(name.split(".")[0]):
        raise unknown("timm model", name, timm.list_models())
    state = _state(weights) if weights else {}
    overlay = {"file": weights} if weights else None
    try:
        with _silent():
            body: Any = timm.create_model(name, features_only=True, pretrained=pretrained or bool(weights), pretrained_cfg_overlay=overlay)
    except OSError as error:
        raise InputError(
            f"model.backbone.pretrained=true: the weights of '{name}' could not be fetched ({type(error).__name__}): connect to the "
            "network, give a local file with model.backbone.weights=FILE, or train from scratch with model.backbone.pretrained=false"
        ) from error
    except (RuntimeError, AttributeError, KeyError, UnpicklingError, SafetensorError) as error:
        # of torch's list of differences the first is enough
        lines = [line.strip(" \t.") for line in str(error).splitlines() if line.strip()]
        reason = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        source = f"model.backbone.weights={weights} holds no weights of '{name}'" if weights else f"timm's '{name}' cannot be a backbone"
        raise InputError(f"{source}: {reason}") from error
    if weights:
        _check_loaded(body, state, weights)
    if not set(_STRIDES[1:]) <= set(body.feature_info.reduction()):
        raise InputError(f"timm's '{name}' gives strides {body.feature_info.reduction()}, a pyramid needs 8, 16 and 32")
    _check_maps(name)
    return body


def _check_maps(name: str) -> None:
    """Some of timm's bodies take one size of picture only, or give maps of another layout: asked of a copy without data."""
    with torch.device("meta"):
        probe: Any = timm.create_model(name, features_only=True, pretrained=False).eval()
        try:
            maps = probe(torch.zeros(1, 3, 96, 160))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise InputError(f"timm's '{name}' does not take pictures of any size ({reason}): choose a convolutional body") from error
    promised = [(c, 96 // s, 160 // s) for c, s in zip(probe.feature_info.channels(), probe.feature_info.reduction())]
    if [tuple(m.shape[1:]) for m in maps] != promised:
        raise InputError(f"timm's '{name}' gives maps of other shapes than its strides promise: choose a convolutional body")


def _state(weights: str) -> dict[str, Tensor]:
    """The state dict of a file, read without running anything that it holds."""
    if not Path(weights).is_file():
        raise InputError(f"model.backbone.weights={weights}: there is no such file")
    try:
        with _silent():
            state = load_state_dict(weights)
    except (RuntimeError, AttributeError, KeyError, EOFError, ValueError, UnpicklingError, SafetensorError) as error:
        raise InputError(
            f"model.backbone.weights={weights} cannot be read as a state dict (code in it is never run): give a whole .safetensors or "
            ".pth file of tensors by timm's names"
        ) from error
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


@contextmanager
def _silent() -> Iterator[None]:
    """Without the warnings of timm, the hub and torch: what is wrong with weights is said in one sentence of our own."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _check_loaded(body: nn.Module, state: dict[str, Tensor], weights: str) -> None:
    """timm loads bodies leniently: every parameter must really have come from the file."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for tensor in state.values():
        by_shape.setdefault(tensor.shape, []).append(tensor)
    missing = [k for k, p in body.named_parameters() if not any(torch.equal(t.to(p.dtype), p) for t in by_shape.get(p.shape, []))]
    if missing:
        raise InputError(
            f"model.backbone.weights={weights} lacks {len(missing)} of the body's parameters, the first is '{missing[0]}': "
            f"it must hold a state dict by timm's names"
        )


def _stages(body: nn.Module, names: list[str], count: int) -> list[nn.Module]:
    """The modules of the stem and the first `count` stages (none for -1), in the order in which they run."""
    if not -1 <= count <= len(names):
        raise InputError(f"frozen_stages={count} must be -1 (nothing) to {len(names)}")
    if count < 0:
        return []
    units: list[tuple[str, nn.Module]] = []
    for name, child in body.named_children():
        inside = any(stage.startswith(f"{name}.") for stage in names)
        units += [(f"{name}_{k}", m) for k, m in child.named_children()] if inside else [(name, child)]
    order = [name for name, _ in units]
    places = [stage.replace(".", "_") for stage in names]
    if lacking := [place for place in places if place not in order]:
        raise InputError(f"frozen_stages={count}: this body has no stages that can be told apart ({lacking[0]}), set frozen_stages=-1")
    end = order.index(places[0]) if count == 0 else order.index(places[count - 1]) + 1
    return [module for _, module in units[:end]]
