"""Atomic file writing: after a kill at any moment a file is the old one or the new one, never a part."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from fusedet.errors import StorageError


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[BinaryIO]:
    """Open a new file, which replaces the one at `path` after the block unless the block fails.

    Raises:
        StorageError: The file cannot be written, for example on a full disk; the previous one is still whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}; what was there before is still whole"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Replace a file by one with these bytes; raises as `open_atomically` does."""
    with open_atomically(path) as file:
        file.write(data)


def list_leftovers(folder: Path) -> list[Path]:
    """List the unfinished files that a killed process left."""
    return sorted(folder.glob(".*.part"))


def remove_leftovers(folder: Path) -> None:
    """Remove the unfinished files that a killed process left; no other process may be writing there."""
    for file in list_leftovers(folder):
        file.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file to the disk, so that a power cut does not undo the writing."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        os.fsync(file.fileno())
