"""Checkpoints: written whole or not at all, read without running anything that they hold."""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fusedet.errors import InputError

Weights = dict[str, Tensor]


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Write a training state (tensors and plain values, one key "model") as `path`, replacing what was there at once.

    Raises InputError when it cannot be written (a full disk); the previous file is then still whole.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    _replace(Path(path), buffer.getbuffer())


def save_weights(path: Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, str]) -> None:
    """Write weights and their description as safetensors, under the same promise as `save`."""
    # safetensors refuses views and shared memory, so each tensor becomes its own
    tensors = {k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in state_dict.items()}
    _replace(Path(path), safetensors.torch.save(tensors, metadata=dict(meta)))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU, tensors and plain values only.

    Raises InputError for a file that is absent, cut short, holds code, or is something else.
    """
    path = _existing(Path(path))
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            raise InputError(f"{path} is not a fusedet checkpoint: give a run's last.ckpt or best.safetensors")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is cut short: copy it again, or use another checkpoint of the run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        code = f" ({found.group(1)})" if found else ""
        raise InputError(f"{path} holds code{code}, which is never run: only tensors and plain values are read") from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a checkpoint: it is damaged, or not from torch.save") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise InputError(f"{path} is not a fusedet checkpoint: it has no weights under 'model'")
    return state


def load_weights(path: Path) -> tuple[Weights, dict[str, str]]:
    """The weights to predict with, and their description, of a .safetensors or of a training checkpoint.

    Of a checkpoint with averaged (EMA) weights these are taken. Raises InputError as `load` does.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        state = load(path)
        return state.get("ema") or state["model"], dict(state.get("meta") or {})
    try:
        with safe_open(_existing(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(f"{path} is cut short or not a safetensors file: copy it again, or use the run's last.ckpt") from error


def load_into(model: nn.Module, state_dict: Mapping[str, Tensor], source: Path | str) -> None:
    """Load weights strictly: every key there, none too many, every shape equal.

    Raises InputError that names the first differences; the model is then unchanged.
    """
    own = model.state_dict()
    shapes = [
        f"{key} is {tuple(state_dict[key].shape)} and should be {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    differences = [
        _first("without", [key for key in own if key not in state_dict]),
        _first("with unknown", [key for key in state_dict if key not in own]),
        _first("of another shape:", shapes),
    ]
    if any(differences):
        raise InputError(f"{source} does not fit this model: " + "; ".join(text for text in differences if text))
    model.load_state_dict(dict(state_dict))


def _first(what: str, items: list[str], limit: int = 3) -> str:
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return f"{what} {', '.join(items[:limit])}{more}" if items else ""


def _existing(path: Path) -> Path:
    if path.is_dir():
        raise InputError(f"{path} is a folder, not a checkpoint: give a file in it, such as last.ckpt or best.safetensors")
    if not path.is_file():
        raise InputError(f"there is no checkpoint at {path}")
    return path


def _replace(path: Path, data: bytes | memoryview) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}; what was there before is still whole") from error
    finally:
        temporary.unlink(missing_ok=True)
