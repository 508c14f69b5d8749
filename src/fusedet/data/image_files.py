"""The files of a dataset: finding images, reading their sizes from the header, staying inside the data folder."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from fusedet.data.image_decoding import get_image_formats, is_pipe_or_device, read_image_size
from fusedet.errors import InputError

S = TypeVar("S")
T = TypeVar("T")

_TRIED = 100  # files that tell whether the disk is waited for
_ALIASES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}


def normalize_split_name(split: str) -> str:
    """One name per split: "valid" and "validation" are "val".

    >>> canonical("valid")
    'val'
    """
    return _ALIASES.get(split.lower(), split)


def select_split(splits: Mapping[str, T], asked: str, source: Path) -> T:
    """The entry of a split by its name or alias; raises InputError that lists the splits that exist."""
    for name, entry in splits.items():
        if name == asked or normalize_split_name(name) == normalize_split_name(asked):
            return entry
    raise InputError(f"{source} has no split '{asked}': it has {', '.join(sorted(splits)) or 'none'}")


@cache
def get_image_extensions() -> frozenset[str]:
    """The lower-case file extensions, with dot, of the formats that are read."""
    known = Image.registered_extensions()
    return frozenset(e for e, form in known.items() if form in get_image_formats()) | {".mpo"}


def is_image_name(name: str) -> bool:
    """Whether a file name ends as an image's does; hidden files are none."""
    return os.path.splitext(name)[1].lower() in get_image_extensions() and not os.path.basename(name).startswith(".")


def list_images(folder: Path) -> list[str]:
    """All images in a folder and its subfolders, sorted by path."""
    return sorted(path for path in list_files(folder) if is_image_name(path))


def list_files(folder: Path) -> Iterator[str]:
    """All files in a folder and its subfolders, each once, also in subfolders that are links to elsewhere.

    Raises OSError for a folder that cannot be read.
    """
    top, followed = os.path.realpath(folder), set()
    for at, inner, names in os.walk(folder, onerror=_raise, followlinks=True):
        if os.path.islink(at) and at != os.fspath(folder):
            there = Path(os.path.realpath(at))
            if (
                there in followed or is_inside(top, there) or is_inside(str(there), Path(top))
            ):  # what is walked anyhow, or a circle
                inner.clear()
                continue
            followed.add(there)
        yield from (os.path.join(at, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without byte order mark; raises InputError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error


def read_bytes(path: str | Path) -> bytes:
    """A file of annotations, whole; raises InputError, for a pipe or a device too, which could be read for ever."""
    try:
        if is_pipe_or_device(path):
            raise InputError(f"{path} is a pipe or a device: a file was expected there")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def resolve_inside(folder: Path, name: str, *roots: Path, source: str | Path) -> str:
    """folder/name; raises InputError where that is absolute or leaves the folder (and all other roots) by "..".

    Links are followed and not judged: no annotation can make one, whoever laid the data there did.
    """
    name = name.replace("\\", "/")  # written on Windows
    if not name or "\0" in name or name.startswith("/") or name[1:3] == ":/" or os.path.splitdrive(name)[0]:
        raise InputError(f"{source} names the file '{name}': it must be a path relative to the data folder")
    path = os.path.join(folder, name)
    if ".." not in name:
        return path
    path = os.path.normpath(path)
    if not is_inside(path, folder, *roots):
        raise InputError(f"{source} names the file '{name}', which lies outside the data folder {folder}")
    return path


def is_inside(path: str, *folders: Path) -> bool:
    """Whether a path lies in one of the folders, as it is written: links are not followed."""
    roots = map(os.path.abspath, folders)
    return any(os.path.commonpath([root, os.path.abspath(path)]) == root for root in roots)


def require_any_image(paths: Sequence[str], folder: str | Path, source: str | Path) -> None:
    """Raises InputError where not one of the first 100 images exists; the rest is for the doctor and the loader."""
    if paths and not any(map(os.path.exists, paths[:100])):
        raise InputError(
            f"none of the first images that {source} lists is in {folder}: {os.path.basename(paths[0])} is absent there"
        )


def require_valid_unicode(names: Iterable[str], source: str | Path) -> None:
    """Raises InputError for a name that no file could hold (lone surrogates)."""
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{source} holds the name {name!r}, which is not valid Unicode") from error


def map_files(read: Callable[[S], T], files: Sequence[S]) -> list[T]:
    """The same as [read(file) for file in files], for what takes little of each file: in threads where the disk is waited for."""
    get_image_formats()  # known once, not in every thread
    wall, busy = time.perf_counter(), time.thread_time()
    found = [read(file) for file in files[:_TRIED]]
    if time.thread_time() - busy > 0.5 * (
        time.perf_counter() - wall
    ):  # threads would take the interpreter from each other
        return found + [read(file) for file in files[_TRIED:]]
    with ThreadPoolExecutor(min(16, 4 + (os.cpu_count() or 1))) as pool:
        return found + list(pool.map(read, files[_TRIED:]))


def read_image_sizes(paths: Sequence[str]) -> np.ndarray:
    """(N, 2) int64 heights and widths after EXIF rotation; raises InputError that counts and names unreadable images."""

    def attempt(path: str) -> tuple[int, int] | InputError:
        try:
            height, width = read_image_size(
                path, any_mode=True
            )  # what cannot be trained on is told with all other bad images
            return (
                (height, width)
                if height and width
                else InputError(f"{path} has no pixels: it is {width} wide and {height} high")
            )
        except InputError as error:
            return error

    found = map_files(attempt, paths)
    bad = [f for f in found if isinstance(f, InputError)]
    if len(bad) > 1:
        raise InputError(f"{len(bad)} of {len(paths)} images cannot be read, the first: {bad[0]}") from bad[0]
    if bad:
        raise bad[0]
    return np.array(found, dtype=np.int64).reshape(-1, 2)
