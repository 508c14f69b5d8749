"""What a file of weights claims about itself, checked before memory is taken for it."""

from __future__ import annotations

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
"""Bytes of a safetensors header that are read at most; a detector's has some hundred kilobytes."""
SHARED = 10
"""How many times its own size a file's tensors may have in sum: weights may stand under several names."""
_MAKERS = {"bytearray", "TypedStorage", "UntypedStorage"}
_DAMAGE = "is cut short or damaged: copy it again"


def check(path: Path) -> None:
    """Look at a file of torch.save or safetensors, that is there, before it is loaded.

    Raises InputError, with nothing of it loaded, for one that is cut short, for compressed or overlapping entries (torch.save stores them
    plainly, so that a small file cannot become a large one), for a header that is larger than any detector's, and for a pickle that
    makes memory from a number.
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
    """Raises InputError where loaded values hold anything but plain tensors on the CPU, or where these claim more than the file holds.

    A tensor of one number, expanded, is a few bytes in a file and any size where it is copied.
    """
    claimed = 0
    for tensor in tensors(content):
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise InputError(
                f"{path} holds a tensor that is not a plain one ({tensor.layout}, {tensor.device}): only plain ones are read"
            )
        claimed += tensor.numel() * tensor.element_size()
    if claimed > SHARED * (size := path.stat().st_size):
        raise InputError(
            f"{path} claims {claimed / 2**20:.0f} MiB of tensors in a file of {size / 2**20:.1f} MiB: it is not loaded"
        )


def tensors(content: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and lists, of any depth."""
    rest, seen = [content], set()
    while rest:
        one = rest.pop()
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, (dict, list, tuple, set)) and id(one) not in seen:
            seen.add(id(one))
            rest.extend(one.values() if isinstance(one, dict) else one)


def _header(path: Path, start: bytes) -> None:
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if length > HEADER:
        raise InputError(
            f"{path} claims a header of {length / 2**20:.0f} MiB, weights need less than {HEADER // 2**20}: it is not read"
        )


def _zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # two readers of one archive must not see two things
            if archive.comment or len({e.filename for e in entries}) < len(entries):
                raise InputError(f"{path} is not a file of torch.save: its archive has a comment or holds a name twice")
            if packed := [e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED]:
                raise InputError(
                    f"{path} holds compressed data ('{packed[0]}'), which torch.save never writes and which could fill the memory: save "
                    "it again with torch.save"
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
    """Before torch 1.6: five pickles, then the tensors."""
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
    """Raises InputError for a file that is one pickle alone, with the names in it, unless it is the number that torch.save begins with."""
    file.seek(0)
    names, texts = [], [""]
    for operation, argument, _ in pickletools.genops(file):
        if argument == MAGIC_NUMBER:
            raise InputError(f"{path} {_DAMAGE}")
        if operation.name == "GLOBAL":
            names.append(str(argument).replace(" ", "."))
        elif operation.name == "STACK_GLOBAL":  # of the two texts before it
            names.append(".".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    held = f" and holds {', '.join(dict.fromkeys(names))}" if names else ""
    raise InputError(
        f"{path} is a plain pickle, not a file of torch.save{held}: it is not run; save the weights with torch.save"
    )


def _refuse_makers(file: IO[bytes], path: Path) -> None:
    """Read one pickle, without running it; raises InputError where it names what makes memory from a number."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name != "GLOBAL":  # the only way to a name that `weights_only` knows
            continue
        module, _, name = str(argument).partition(" ")
        if name in _MAKERS or (module.startswith("torch") and name.endswith("Tensor")):
            raise InputError(f"{path} holds {module}.{name}, which no checkpoint of weights needs: it is not loaded")
