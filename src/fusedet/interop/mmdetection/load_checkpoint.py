"""Read checkpoints of other projects without executing their code."""

import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedet import safe_load
from fusedet.errors import InputError


class _Inert:
    """Stands in for an object of another project: accepts any arguments and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertDict:
    """Stands in for a mapping of another project: only its items are kept, in a plain mapping."""

    def __new__(cls, *args: Any) -> Any:
        # MMEngine's ConfigDict gets its items here, others set them later.
        return OrderedDict(args[0] if len(args) == 1 and isinstance(args[0], Mapping) else {})


def _make_stand_in(path: str, base: type) -> type:
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


# What MMEngine, MMCV and numpy store in a checkpoint beside tensors and plain values.
_OBJECTS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.logging.message_hub.MessageHub",
    "builtins.getattr",  # a history buffer refers to its own methods by it
    "numpy.ndarray",
    "numpy.dtype",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    "argparse.Namespace",  # of torchvision's reference training
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)
_MAPPINGS = (
    "mmengine.config.config.ConfigDict",
    "mmcv.utils.config.ConfigDict",
    "addict.addict.Dict",
    "addict.Dict",
)
STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    _make_stand_in(path, base) for paths, base in ((_OBJECTS, _Inert), (_MAPPINGS, _InertDict)) for path in paths
]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a .pth or .safetensors file on the CPU: tensors, plain values, and inert objects for known bookkeeping.

    Raises:
        InputError: The file is absent or truncated, has other objects (which are named and never executed), or is a
            checkpoint of this project.
    """
    path = Path(path)
    if (path / "best.safetensors").is_file() or (path / "last.ckpt").is_file():
        raise _own_checkpoint_error(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name a checkpoint file, such as {path}/latest.pth")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    safe_load.check_file(path)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\w[\w.]*\w)", str(error)) or re.search(r"Can only .*|Trying to .*", str(error))
        what = match[match.re.groups] if match else "something else than tensors and plain values"
        raise InputError(f"{path} holds {what}, which no checkpoint of weights needs: it is not run") from error
    except Exception as error:  # damaged pickles raise exceptions of many kinds
        raise InputError(f"{path} cannot be read as a checkpoint: it is damaged, or not from torch.save") from error
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {type(content).__name__}: a checkpoint is a mapping with weights under 'state_dict', or "
            "of weights only"
        )
    safe_load.check_tensors(content, path)
    _refuse_own_checkpoint(content.get("meta"), path)
    return dict(content)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    safe_load.check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            _refuse_own_checkpoint(file.metadata(), path)
        return dict(load_file(path))
    except SafetensorError as error:
        raise InputError(f"{path} is cut short or not a safetensors file: copy it again") from error


def _refuse_own_checkpoint(meta: Any, path: Path) -> None:
    if isinstance(meta, Mapping) and meta.get("format") == "fusedet":
        raise _own_checkpoint_error(path)


def _own_checkpoint_error(path: Path) -> InputError:
    return InputError(
        f"{path} is a fusedet checkpoint already, there is nothing to convert: use it as it is, "
        f"fusedet predict {path} IMAGE_OR_FOLDER..."
    )


def extract_weights(content: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """Return the weights for inference: those under 'state_dict', or the mapping itself, without a "module." prefix.

    These are the averaged (EMA) weights if there are any: MMDetection and MMEngine save them under the plain names, and
    the raw ones under `ema_state_dict` or, before 3.x, under names that begin with "ema_".

    Args:
        content: Result of `read_checkpoint`.
        source: Name of the file in messages.

    Raises:
        InputError: There are no weights.
    """
    holder = next(
        (content[key] for key in ("state_dict", "ema_state_dict", "model") if isinstance(content.get(key), Mapping)),
        content,
    )
    state = {str(key): value.detach() for key, value in holder.items() if isinstance(value, Tensor)}
    if state and all(key.startswith("module.") for key in state if key != "steps"):
        state = {key.removeprefix("module."): value for key, value in state.items() if key != "steps"}
    state = {key: value for key, value in state.items() if not key.startswith(("ema_", "data_preprocessor."))}
    if not state:
        raise InputError(f"{source} holds no weights: it needs tensors by name, under 'state_dict' or at the top level")
    return state
