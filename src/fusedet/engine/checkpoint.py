"""Checkpoints: written whole or not at all, and read without executing code that they hold."""

import io
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fusedet import safe_load
from fusedet.atomic_io import write_atomically
from fusedet.errors import InputError, shorten_list
from fusedet.host_copy import copy_to_host

Weights = dict[str, Tensor]
DAMAGE = (
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
)
"""What torch's reader raises on changed files."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state, replacing the file at once.

    Args:
        path: The file, such as last.ckpt.
        state: Tensors and plain values; the key "model" holds the weights.

    Raises:
        StorageError: The file cannot be written (a full disk); the previous one is still whole.
    """
    buffer = io.BytesIO()
    on_host = all(tensor.device.type == "cpu" for tensor in state["model"].values())
    torch.save(dict(state) if on_host else copy_to_host(dict(state)), buffer)
    write_atomically(Path(path), buffer.getbuffer())


def save_weights(path: Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, str]) -> None:
    """Write weights and their description as safetensors; raises as `save` does."""
    # safetensors refuses views and shared memory, so each tensor is copied.
    tensors = {k: v.detach() for k, v in state_dict.items()}
    tensors = {k: v.clone(memory_format=torch.contiguous_format) for k, v in copy_to_host(tensors).items()}
    write_atomically(Path(path), safetensors.torch.save(tensors, metadata=dict(meta)))


def load(path: Path) -> dict[str, Any]:
    """Read a file of `save`, on the CPU, tensors and plain values only.

    Raises:
        InputError: The file is absent, cut short, holds code, claims more than it holds, or is no checkpoint.
    """
    path = _existing(Path(path))
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise InputError(f"{path} is not a fusedet checkpoint: give a run's last.ckpt or best.safetensors")
    safe_load.check_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        code = f" ({name[1]})" if name else ""
        raise InputError(
            f"{path} holds code{code}, which is never run: only tensors and plain values are read"
        ) from error
    except DAMAGE as error:
        raise InputError(f"{path} cannot be read as a checkpoint: it is damaged, or not from torch.save") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError(f"{path} is not a fusedet checkpoint: it has no weights under 'model'")
    safe_load.check_tensors(state, path)
    return state


def load_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """Read the weights to predict with, and their description.

    Args:
        path: A .safetensors file or a training checkpoint; the averaged (EMA) weights of a checkpoint are taken where
            it has them.

    Raises:
        InputError: As `load` raises it.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        state = load(path)
        averaged = state.get("ema")
        return _tensors(state["model"] if averaged is None else averaged, path), _texts(state.get("meta", {}), path)
    safe_load.check_file(_existing(path))
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is cut short or not a safetensors file: copy it again, or use the run's last.ckpt"
        ) from error


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], source: Path | str) -> None:
    """Load weights strictly: all keys, no other keys, equal shapes.

    Raises:
        InputError: The weights differ; the message names the first differences, and the model is unchanged.
    """
    refuse_misfit(model, state_dict, source)
    model.load_state_dict(dict(state_dict))


def refuse_misfit(model: nn.Module, state_dict: Mapping[str, Tensor], source: Path | str) -> None:
    """Raise InputError, as `load_into` does, where the weights are not this model's, which may be on device "meta"."""
    own = model.state_dict()
    shapes = [
        f"{key} is {tuple(state_dict[key].shape)} and should be {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    differences = {
        "without": [key for key in own if key not in state_dict],
        "with unknown": [key for key in state_dict if key not in own],
        "of another shape:": shapes,
    }
    if listed := [f"{what} {shorten_list(items, 3)}" for what, items in differences.items() if items]:
        raise InputError(f"{source} does not fit this model: {'; '.join(listed)}")


def _tensors(value: Any, path: Path) -> Weights:
    if not isinstance(value, Mapping):
        raise InputError(f"{path} is not a fusedet checkpoint: its weights must be tensors by name")
    if wrong := [key for key, tensor in value.items() if not (isinstance(key, str) and isinstance(tensor, Tensor))]:
        key = (
            repr(wrong[0][:100]) if isinstance(wrong[0], str) else f"a {type(wrong[0]).__name__}"
        )  # its text may be of any length
        raise InputError(f"{path} is not a fusedet checkpoint: under its weights, {key} is not a tensor by name")
    return dict(value)


def _texts(value: Any, path: Path) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for item in value.items() for text in item):
        raise InputError(f"{path} is not a fusedet checkpoint: its description (meta) must be texts by name")
    return dict(value)


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise InputError(
            f"{path} is a folder, not a checkpoint: give a file in it, such as last.ckpt or best.safetensors"
        )
    if not path.is_file():
        raise InputError(f"no checkpoint exists at {path}: give a run directory, a best.safetensors or a last.ckpt")
    return path
