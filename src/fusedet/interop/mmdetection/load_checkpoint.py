"""Checkpoints of other projects, read without running anything that they hold."""

from __future__ import annotations

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
    """Stands for an object of another project: takes whatever it was made of and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertDict:
    """Stands for a mapping of another project: its items alone are kept, in a plain one."""

    def __new__(cls, *made_of: Any) -> Any:
        # MMEngine's ConfigDict has its items here, others set them later
        return OrderedDict(made_of[0] if len(made_of) == 1 and isinstance(made_of[0], Mapping) else {})


def _stand_in(path: str, base: type) -> type:
    module, _, name = path.rpartition(".")
    return type(name, (base,), {"__module__": module, "__qualname__": name})


# what MMEngine, MMCV and numpy leave in a checkpoint beside tensors and plain values
STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *(
        _stand_in(path, _Inert)
        for path in (
            "mmengine.logging.history_buffer.HistoryBuffer",
            "mmengine.logging.message_hub.MessageHub",
            "builtins.getattr",  # a history buffer names its own methods by it
            "numpy.ndarray",
            "numpy.dtype",
            *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
            *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Int64", "Int32", "Bool")),
            "argparse.Namespace",  # of torchvision's reference training
            "pathlib.PosixPath",
            "pathlib.WindowsPath",
        )
    ),
    *(
        _stand_in(path, _InertDict)
        for path in (
            "mmengine.config.config.ConfigDict",
            "mmcv.utils.config.ConfigDict",
            "addict.addict.Dict",
            "addict.Dict",
        )
    ),
]


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a .pth (or .safetensors) file holds, on the CPU: tensors and plain values; inert objects for the known bookkeeping.

    Raises InputError for a file that is absent or cut short, for anything else in it, which is named and never run, and for a
    checkpoint of this project.
    """
    path = Path(path)
    if (path / "best.safetensors").is_file() or (path / "last.ckpt").is_file():
        raise _own(path)
    if not path.is_file():
        raise InputError(
            f"there is no file {path}"
            if not path.is_dir()
            else f"{path} is a folder: give a checkpoint's file, such as {path}/latest.pth"
        )
    if path.suffix == ".safetensors":
        return _safetensors(path)
    safe_load.check(path)
    try:
        with torch.serialization.safe_globals(STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\w[\w.]*\w)", str(error)) or re.search(r"Can only .*|Trying to .*", str(error))
        what = found[found.re.groups] if found else "something else than tensors and plain values"
        raise InputError(f"{path} holds {what}, which no checkpoint of weights needs: it is not run") from error
    except (
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        IndexError,
        TypeError,
        AttributeError,
        AssertionError,
        MemoryError,
    ) as error:
        raise InputError(f"{path} cannot be read as a checkpoint: it is damaged, or not from torch.save") from error
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds a {type(content).__name__}: a checkpoint is a mapping with weights under 'state_dict', or of weights alone"
        )
    safe_load.check_tensors(content, path)
    _refuse_own(content.get("meta"), path)
    return dict(content)


def _safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    safe_load.check(path)
    try:
        with safe_open(path, framework="pt") as file:
            _refuse_own(file.metadata(), path)
        return dict(load_file(path))
    except SafetensorError as error:
        raise InputError(f"{path} is cut short or not a safetensors file: copy it again") from error


def _refuse_own(meta: Any, path: Path) -> None:
    if isinstance(meta, Mapping) and meta.get("format") == "fusedet":
        raise _own(path)


def _own(path: Path) -> InputError:
    return InputError(
        f"{path} is fusedet's own already, there is nothing to convert: use it as it is, fusedet predict {path} IMAGE_OR_FOLDER..."
    )


def extract_weights(content: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """The weights to predict with: those under 'state_dict', or the mapping itself; without a wrapper's "module." before the names.

    Averaged (EMA) weights are what is taken: MMDetection and MMEngine put them under the plain names when they save, and the others
    under `ema_state_dict`, or, before 3.x, under names that begin with "ema_". Where there is nothing but `ema_state_dict`, that is it.
    Raises InputError where there are none.
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
        raise InputError(
            f"{source} holds no weights: there should be tensors by name, under 'state_dict' or at its top"
        )
    return state
