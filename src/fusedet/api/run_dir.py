"""Output directories: created once, never overwritten; and the files that describe a run."""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedet.api.timing import describe_device
from fusedet.atomic_io import list_leftovers, write_atomically
from fusedet.data.bad_images import BadImageLog, format_replacement_summary
from fusedet.errors import InputError
from fusedet.interop.published_weights import is_published_name


def create_run_dir(folder: str | Path) -> Path:
    """Create an empty directory.

    Raises:
        InputError: It exists and is not empty, or cannot be created.
    """
    path = Path(folder)
    check_new_dir(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"out={path} cannot be created: {error.strerror}") from error
    return path


@contextmanager
def reserve_run_dir(folder: str | Path) -> Iterator[Path]:
    """Create an empty directory before long work, and remove what is still empty of it if the work fails.

    Raises:
        InputError: As `create_run_dir`.
    """
    created = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    path = create_run_dir(folder)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # a directory is not empty
            for path in created:
                path.rmdir()
        raise


def check_new_dir(folder: str | Path | None) -> None:
    """Check before the work, if a directory is given, that nothing would be overwritten there.

    Raises:
        InputError: It is a file, or a directory that holds more than temporary files of a killed process.
    """
    path = Path(folder or "")
    if path.is_file():
        raise InputError(f"out={path} is a file: choose another directory")
    if folder and path.is_dir() and set(path.iterdir()) - set(list_leftovers(path)):
        raise InputError(f"out={path} exists and is not empty: nothing is overwritten, choose another directory")


def find_free_path(parent: str | Path, name: str, ending: str = "") -> Path:
    """Return the first of parent/name, parent/name-2, ... that does not exist; a file's name gets its ending."""
    return Path(parent, choose_unused_name(name, lambda own: Path(parent, f"{own}{ending}").exists()) + ending)


def choose_unused_name(name: str, is_taken: Callable[[str], bool], separator: str = "-") -> str:
    """Return the first of name, name-2, name-3, ... that is not taken."""
    return next(own for i in count(1) if not is_taken(own := name if i == 1 else f"{name}{separator}{i}"))


def parent_of(source: str | Path) -> Path:
    """Return where results of a source go by default: into a run directory, beside a file, of a name into runs/NAME."""
    if is_published_name(source):
        return Path("runs") / source
    path = Path(source)
    return path if path.is_dir() else path.parent


def remove_files(folder: Path, *names: str) -> None:
    """Remove files and empty folders that a command wrote before it failed, so that it can be given again; others stay.

    Args:
        folder: Where they are; it is removed if nothing else is in it.
        names: Their names.
    """
    for path in [*(folder / name for name in names), folder]:
        with suppress(OSError):  # it does not exist, or is not empty
            path.rmdir() if path.is_dir() else path.unlink()


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON; numbers that JSON lacks (NaN) become null."""
    write_atomically(path, (json.dumps(to_plain(content), indent=2, ensure_ascii=False) + "\n").encode())


def read_json(file: Path) -> dict[str, Any] | None:
    """Return what a JSON file holds; None for a file that is absent, damaged or holds no mapping."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def read_fingerprints(run: Path) -> dict[str, Any] | None:
    """Return the fingerprints of a run's data by split, from its run.json; None if that file does not exist.

    Raises:
        InputError: The file is damaged.
    """
    file = run / "run.json"
    if not file.is_file():
        return None
    known = (read_json(file) or {}).get("data")
    if not isinstance(known, dict):
        raise InputError(
            f"{file} is damaged: it does not name the run's data; copy it again, or delete it to skip that check"
        )
    return known


def to_plain(value: Any) -> Any:
    """Return a value without tensors, arrays, NumPy scalars, tuples, paths and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return to_plain(value.tolist())
    if isinstance(value, float) and value != value:
        return None
    return value


def describe_environment(device: str, world: int) -> dict[str, Any]:
    """Return versions and hardware, for run.json."""
    packages = ("fusedet", "torch", "torchvision", "timm", "lightning-fabric", "faster-coco-eval", "numpy")
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in packages},
        "device": describe_device(device),
        "processes": world,
    }


def record_replaced_images(log: BadImageLog, out: Path, say: Callable[[str], None]) -> None:
    """Write how many bad images a training replaced into run.json, and report it; all processes call it."""
    rows = log.close()
    if log.rank == 0:
        content = json.loads((out / "run.json").read_text(encoding="utf-8"))
        content["replaced"] = {"images": len({row.image_id for row in rows}), "times": len(rows)}
        write_json(out / "run.json", content)
    if rows:
        say(format_replacement_summary(rows, out / "skipped.csv"))
