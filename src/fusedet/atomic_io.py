"""Files that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from fusedet.errors import StorageError


def replace(path: Path, data: bytes | memoryview) -> None:
    """Put a file with these bytes in the place of what was there, at once.

    Raises StorageError when it cannot be written (a full disk); the previous file is then still whole.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror or error}; what was there before is still whole"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """What a killed process had begun to write with `replace`."""
    return sorted(folder.glob(".*.part"))


def clean(folder: Path) -> None:
    """Remove the leftovers; no other process may be writing there."""
    for file in leftovers(folder):
        file.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold what was written, so that a power cut does not take it back."""
    with contextlib.suppress(FileNotFoundError), path.open("rb+") as file:
        os.fsync(file.fileno())
