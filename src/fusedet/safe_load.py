"""Checks of untrusted checkpoint files before their tensors are allocated."""

import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER

from fusedet.errors import InputError

HEADER = 16 * 2**20
"""Largest safetensors header that is read, in bytes; a detector's has some hundred kilobytes."""
SHARED = 10
"""Largest size of all tensors relative to the file's: weights may be stored once under several names."""
_MAKERS = {"bytearray", "TypedStorage", "UntypedStorage"}
_DAMAGE = "is cut short or damaged: copy it again"


def check_file(path: Path) -> None:
    """Check an existing file of torch.save or safetensors before it is loaded.

    Raises:
        InputError: The file is cut short; its entries are compressed or overlap (torch.save stores them uncompressed,
            so that a small file cannot become a large one); its header is larger than any detector's; or its pickle
            allocates memory from a number.
    """
    with path.open("rb") as file:
        start = file.read(8)
        if path.suffix == ".safetensors":
            _header(path, start)
        elif start[:2] == b"PK":
            _zip(path)
        else:
            _old(path, file)


def check_tensors(content: Any, path: Path) -> None:
    """Check loaded values: all tensors must be strided tensors on the CPU, and no larger than the file allows.

    An expanded tensor takes a few bytes in a file and any size once it is copied.

    Raises:
        InputError: A tensor is of another kind, its storage is larger than the file, or all are too large for it.
    """
    claimed, size = 0, path.stat().st_size
    for tensor in iterate_tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(
                f"{path} holds a tensor that is not a plain one ({tensor.layout}, {tensor.device}): "
                "only plain ones are read"
            )
        if tensor.untyped_storage().nbytes() > size:  # torch 2.6 lets it reach beyond the file's entry
            raise InputError(f"{path} {_DAMAGE}")
        claimed += tensor.numel() * tensor.element_size()
    if claimed > SHARED * size:
        raise InputError(
            f"{path} claims {claimed / 2**20:.0f} MiB of tensors in a file of {size / 2**20:.1f} MiB: it is not loaded"
        )


def iterate_tensors(content: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested mappings and lists of any depth."""
    rest, seen = [content], set()
    while rest:
        value = rest.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            rest.extend(value.values() if isinstance(value, dict) else value)


def _header(path: Path, start: bytes) -> None:
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if length > HEADER:
        raise InputError(
            f"{path} claims a header of {length / 2**20:.0f} MiB, weights need less than {HEADER // 2**20}: "
            "it is not read"
        )


def _zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # no two readers of the archive may see different contents
            if archive.comment or len({e.filename for e in entries}) < len(entries):
                raise InputError(f"{path} is not a file of torch.save: its archive has a comment or holds a name twice")
            if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
                raise InputError(
                    f"{path} holds compressed data ('{packed[0]}'), which torch.save never writes and which could fill "
                    "the memory: save it again with torch.save"
                )
            if sum(e.file_size for e in entries) > path.stat().st_size:
                raise InputError(f"{path} claims more data than it has bytes: it is not loaded")
            for entry in entries:
                if entry.filename.rpartition("/")[2] == "data.pkl":
                    with archive.open(entry) as pickled:
                        _refuse_makers(pickled, path)
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, struct.error) as error:
        raise InputError(f"{path} {_DAMAGE}") from error


def _old(path: Path, file: IO[bytes]) -> None:
    """Check a file from before torch 1.6: five pickles, then the tensors."""
    file.seek(0)
    try:
        _refuse_makers(file, path)
        if not file.read(1):
            _refuse_plain(file, path)
        file.seek(-1, 1)
        for _ in range(4):
            _refuse_makers(file, path)
    except InputError:
        raise
    except (ValueError, struct.error) as error:
        raise InputError(f"{path} is cut short, or not a checkpoint: copy it again") from error


def _refuse_plain(file: IO[bytes], path: Path) -> None:
    """Raise InputError for a file that is a single pickle, naming its classes, unless it starts like torch.save's."""
    file.seek(0)
    names, texts = [], [""]
    for operation, argument, _ in pickletools.genops(file):
        if argument == MAGIC_NUMBER:
            raise InputError(f"{path} {_DAMAGE}")
        if operation.name == "GLOBAL":
            names.append(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":  # its module and name are the two texts before it
            names.append(".".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    held = f" and holds {', '.join(dict.fromkeys(names))}" if names else ""
    raise InputError(
        f"{path} is a plain pickle, not a file of torch.save{held}: it is not run; save the weights with torch.save"
    )


def _refuse_makers(file: IO[bytes], path: Path) -> None:
    """Read one pickle without running it; raise InputError if it names what allocates memory from a number."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name != "GLOBAL":  # the only way to a name that `weights_only` accepts
            continue
        module, _, name = str(argument).partition(" ")
        if name in _MAKERS or (module.startswith("torch") and name.endswith("Tensor")):
            raise InputError(f"{path} holds {module}.{name}, which no checkpoint of weights needs: it is not loaded")
