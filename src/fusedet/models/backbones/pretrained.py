"""Creation of timm models, their weights from timm or from a file, and the checks of both."""

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import load_state_dict
from torch import Tensor, nn

from fusedet import safe_load
from fusedet.errors import InputError, make_unknown_error, shorten_list
from fusedet.function_skipping import shapes_only
from fusedet.models.backbones.swin import pad_before_shift, size_options
from fusedet.quiet import quiet
from fusedet.types import Features

STRIDES = (4, 8, 16, 32)
OPTIONS = {"zero_init_last": "zero_init=false", "norm_layer": "norm=gn", "feature_location": "branch_maps=true"}
"""Settings of `TimmBackbone` by the arguments of timm's models that they set."""
_LOGGERS = ("timm", "huggingface_hub")  # an InputError says what is wrong with weights


def create_timm_model(name: str, pretrained: bool, weights: str | None, options: Mapping[str, Any]) -> Any:
    """Create a timm model with feature extraction, with timm's weights or those of a file.

    Args:
        name: timm's name of the model, with or without the tag of its weights.
        pretrained: Fetch timm's weights.
        weights: Local file of weights instead.
        options: Further arguments of timm's model.

    Raises:
        InputError: The name is unknown, the model is unfit for a pyramid, or the weights cannot be loaded.
    """
    if not timm.is_model(name.split(".")[0]):
        raise make_unknown_error("timm model", name, timm.list_models())
    state = _read_state_dict(weights) if weights else {}
    overlay = {"file": weights} if weights else None
    try:
        with quiet(*_LOGGERS):
            loaded = pretrained or bool(weights)
            model = _create(name, pretrained=loaded, pretrained_cfg_overlay=overlay, **options)
    except TypeError as error:
        given = next((key for key in options if key in str(error)), None)
        if given is None:
            raise
        raise InputError(
            f"model.backbone.{OPTIONS[given]}: timm's '{name}' has no such option, leave it out"
        ) from error
    except OSError as error:
        raise InputError(
            f"model.backbone.pretrained=true: the weights of '{name}' could not be fetched ({type(error).__name__}): "
            "connect to the network, give a local file with model.backbone.weights=FILE, start from a detector with "
            "train.weights=CHECKPOINT, or train from scratch with model.backbone.pretrained=false"
        ) from error
    except (RuntimeError, AttributeError, KeyError, UnpicklingError, SafetensorError) as error:
        # the first line of torch's list of differences is enough
        lines = [line.strip(" \t.") for line in str(error).splitlines() if line.strip()]
        reason = lines[min(1, len(lines) - 1)] if lines else type(error).__name__
        source = (
            f"model.backbone.weights={weights} holds no weights of '{name}'"
            if weights
            else f"timm's '{name}' cannot be a backbone"
        )
        raise InputError(f"{source}: {reason}") from error
    if weights:
        _check_loaded(model, state, weights, name, options.get("in_chans", 3))
    if not set(STRIDES[1:]) <= set(model.feature_info.reduction()):
        raise InputError(
            f"timm's '{name}' gives strides {model.feature_info.reduction()}, a pyramid needs 8, 16 and 32"
        )
    pad_before_shift(model)
    if fault := _feature_map_fault(name):
        raise InputError(f"timm's '{name}' {fault}: choose a convolutional backbone")
    return model


def to_channels_first(model: Any, maps: Features) -> Features:
    """Permute the maps of a model that gives (N, H, W, C) to (N, C, H, W)."""
    return [x.permute(0, 3, 1, 2) for x in maps] if getattr(model, "output_fmt", "NCHW") == "NHWC" else maps


def _create(name: str, **options: Any) -> Any:
    """Create a timm model with feature extraction on the default device, "meta" included.

    Some releases of timm and torch compute widths or rates of stochastic depth with tensors in the constructor, which
    fails on the meta device, where tensors have no values. Such a model is created on the CPU and moved.
    """
    make = partial(timm.create_model, name, features_only=True, **size_options(name), **options)
    if torch.empty(0).device.type != "meta":
        return make()
    with shapes_only():
        try:
            return make()
        except RuntimeError:
            with torch.device("cpu"):
                return make().to("meta")


@cache
def _feature_map_fault(name: str) -> str | None:
    """Say why a timm model's feature maps are unfit, None if they are not.

    Some timm models take images of one size only, or give maps of another layout. A forward pass on the meta device
    shows it. The result depends on the name only and the pass is most of a construction's time, so it is cached.
    """
    with torch.device("meta"):
        probe = _create(name, pretrained=False).eval()
        try:
            with shapes_only():
                maps = to_channels_first(probe, probe(torch.zeros(1, 3, 96, 160)))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            return f"does not take images of any size ({reason})"
    info = probe.feature_info
    expected = [(c, 96 // s, 160 // s) for c, s in zip(info.channels(), info.reduction())]
    if [tuple(m.shape[1:]) for m in maps] != expected:
        return "gives feature maps of other shapes than its strides say"
    return None


def _read_state_dict(weights: str) -> dict[str, Tensor]:
    """Read the state dict of a file without running code in it."""
    if not Path(weights).is_file():
        raise InputError(f"model.backbone.weights={weights}: there is no such file")
    try:
        safe_load.check_file(Path(weights))
        with quiet(*_LOGGERS):
            state = load_state_dict(weights, weights_only=True)  # older timm runs code by default
        safe_load.check_tensors(state, Path(weights))
    except InputError as error:
        raise InputError(
            f"model.backbone.weights={weights} cannot be read as a state dict (code in it is never run): {error}"
        ) from error
    except (
        RuntimeError,
        AttributeError,
        KeyError,
        EOFError,
        ValueError,
        TypeError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise InputError(
            f"model.backbone.weights={weights} cannot be read as a state dict (code in it is never run): give a whole "
            ".safetensors or .pth file of tensors by timm's names"
        ) from error
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


def _check_loaded(model: nn.Module, state: dict[str, Tensor], weights: str, name: str, channels: int) -> None:
    """Check that parameters and norm statistics came from the file: timm loads a backbone leniently.

    Values are compared, because timm renames the tensors of some backbones.
    """
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for tensor in state.values():
        by_shape.setdefault(tensor.shape, []).append(tensor)
    wanted = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}

    def is_loaded(value: Tensor) -> bool:
        if any(torch.equal(tensor.to(value.dtype), value) for tensor in by_shape.get(value.shape, [])):
            return True
        is_first = channels != 3 and value.ndim == 4 and value.shape[1] == channels  # timm has converted it from RGB
        return is_first and torch.Size((value.shape[0], 3, *value.shape[2:])) in by_shape

    missing = [key for key, value in wanted.items() if not is_loaded(value)]
    if missing:
        raise InputError(
            f"model.backbone.weights={weights} lacks {len(missing)} of the {len(wanted)} tensors of '{name}': "
            f"{shorten_list(missing, 3)}; it holds {shorten_list(state, 3) or 'no tensor'}: give this model's state "
            "dict by timm's names"
        )
