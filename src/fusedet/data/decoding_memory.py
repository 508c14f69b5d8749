"""Memory of the process around the decoding of large files: heap that is free, and pages of a file that were read."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread

import torch
from torch import Tensor

_PAUSE = 0.02  # seconds between two releases of the pages that were read


def release_free_memory() -> None:
    """Return what was freed before, as by loading a model, from the heap to the system where the C library is glibc."""
    with suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def map_file_once(path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Map a file, uint8 (bytes,), for a decoder that reads it once from its beginning to its end.

    Pages that were read leave the memory of the process again, where the system can do so. Any that is read a second
    time comes from the file again.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It is empty.
    """
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch warns of memory that is read-only
    if not hasattr(mmap, "MADV_DONTNEED"):
        yield torch.frombuffer(mapped, dtype=torch.uint8)
        return
    done = Event()

    def release_pages() -> None:
        while not done.wait(_PAUSE):
            mapped.madvise(mmap.MADV_DONTNEED)

    thread = Thread(target=release_pages, daemon=True)
    thread.start()
    try:
        yield torch.frombuffer(mapped, dtype=torch.uint8)
    finally:
        done.set()
        thread.join()
