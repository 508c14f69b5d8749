"""Files of a dataset: listing images, reading their sizes, and keeping paths inside the data folder."""

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from fusedet.data.channel_decoding import is_array_file, read_array_size
from fusedet.data.image_decoding import read_image_size
from fusedet.data.image_opening import get_image_formats, is_pipe_or_device
from fusedet.errors import InputError

S = TypeVar("S")
T = TypeVar("T")

_SAMPLE = 100  # files that are read first, to measure whether reading waits for the disk
_UNREAD = re.compile(
    r"\.(hei[cf]|hif|jxl|avif|jxr|wdp|raw|dng|cr[23w]|ne[fw]|nrw|arw|srf|sr2|orf|rw2|raf|pef|srw|x3f|3fr|iiq|erf|kdc|"
    r"mrw|rwl|exr|hdr|dcm|svg|eps|xcf|flif|bpg|ecw|sid)"
)
"""Extensions of image formats that Pillow does not read, or only with a plug-in."""
_ALIASES = {"valid": "val", "validation": "val", "training": "train", "testing": "test"}
SPLIT_NAMES = frozenset({"train", "val", "test", "trainval"})
_SYSTEM_FOLDERS = {"__macosx", "@eadir", "$recycle.bin", "system volume information"}
_SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}


class AbsentSplitError(InputError):
    """The files of a split do not exist, though the dataset names them."""


def normalize_split_name(split: str) -> str:
    """Map the aliases of a split to one name.

    >>> normalize_split_name("valid")
    'val'
    """
    return _ALIASES.get(split.lower(), split.lower() if split.lower() in SPLIT_NAMES else split)


def normalize_split_names(names: Sequence[str]) -> list[str]:
    """Map the names of all splits of a dataset to those that fusedet uses; a name that would not be unique stays.

    >>> normalize_split_names(["default", "valid"]), normalize_split_names(["default", "train"])
    (['train', 'val'], ['default', 'train'])
    """
    normal = ["train" if name.lower() == "default" else normalize_split_name(name) for name in names]
    return [short if normal.count(short) == 1 else name for name, short in zip(names, normal, strict=True)]


def select_split(splits: Mapping[str, T], name: str, source: Path) -> T:
    """Return the entry of a split, given its name or an alias; the only one of an unknown name is `train`.

    Raises:
        InputError: The split does not exist; the sentence lists those that do.
    """
    for known, entry in splits.items():
        if known == name or normalize_split_name(known) == normalize_split_name(name):
            return entry
    if name == "train" and len(splits) == 1 and normalize_split_name(next(iter(splits))) not in SPLIT_NAMES:
        return next(iter(splits.values()))
    share = "; data.val=0.2 holds out a fifth of it" if name == "val" and len(splits) == 1 else ""
    raise InputError(f"{source} has no split '{name}': it has {', '.join(sorted(splits)) or 'none'}{share}")


def is_system_file(name: str) -> bool:
    """Return whether a file or folder is hidden or left by an operating system or by GDAL, and so no data.

    >>> [is_system_file(name) for name in ("._a.xml", ".DS_Store", "Thumbs.db", "__MACOSX", "a.png.aux.xml", "a.xml")]
    [True, True, True, True, True, False]
    """
    return name.startswith(".") or name.lower() in _SYSTEM_FOLDERS | _SYSTEM_FILES or name.endswith(".aux.xml")


@cache
def get_image_extensions() -> frozenset[str]:
    """Return the file extensions, in lower case and with the dot, of all supported image formats."""
    formats = get_image_formats()  # before the extensions: a plug-in may add its own
    registered = Image.registered_extensions()
    return frozenset(extension for extension, name in registered.items() if name in formats) | {".mpo"}


def is_image_name(name: str) -> bool:
    """Return whether a file name has the extension of an image and is not hidden."""
    return os.path.splitext(name)[1].lower() in get_image_extensions() and not os.path.basename(name).startswith(".")


def is_unread_image_name(name: str) -> bool:
    """Return whether a file name has the extension of an image format that is not read here, and is not hidden."""
    extension = os.path.splitext(name)[1].lower()
    is_unread = _UNREAD.fullmatch(extension) and extension not in get_image_extensions()
    return bool(is_unread) and not os.path.basename(name).startswith(".")


def list_images(folder: Path) -> list[str]:
    """List all images in a folder and its subfolders, sorted by path, without those of the system."""
    return sorted(path for path in list_files(folder) if is_image_name(path))


def list_files(folder: Path) -> Iterator[str]:
    """Yield all files in a folder and its subfolders once, following links to folders elsewhere.

    Hidden files and folders, and those that operating systems leave, are skipped.

    Raises:
        OSError: A folder cannot be read.
    """
    top, followed = os.path.realpath(folder), set()
    for directory, subfolders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if os.path.islink(directory) and directory != os.fspath(folder):
            target = Path(os.path.realpath(directory))
            # a folder that is walked anyway, or a cycle of links
            if target in followed or is_inside(top, target) or is_inside(str(target), Path(top)):
                subfolders.clear()
                continue
            followed.add(target)
        subfolders[:] = [name for name in subfolders if not is_system_file(name)]
        yield from (os.path.join(directory, name) for name in names if not is_system_file(name))


def _raise(error: OSError) -> None:
    raise error


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, with or without byte order mark; raises InputError."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: save it as UTF-8") from error


def read_bytes(path: str | Path) -> bytes:
    """Read a whole file.

    Raises:
        InputError: The file cannot be read, or is a pipe or a device, whose reading might never end.
    """
    try:
        if is_pipe_or_device(path):
            raise InputError(f"{path} is a pipe or a device: a file was expected there")
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def resolve_inside(folder: Path, name: str, *roots: Path, source: str | Path) -> str:
    """Join a folder and a file name from an annotation, refusing names that leave the folder.

    Links are followed: an annotation file cannot create one.

    Args:
        folder: The folder that the name is relative to.
        name: The file name, with separators of any system.
        roots: Further folders that the path may lie in.
        source: The file that holds the name, for the error message.

    Raises:
        InputError: The name is empty or absolute, or leaves all the folders by "..".
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
    """Return whether a path lies in one of the folders; links are not resolved."""
    roots = map(os.path.abspath, folders)
    return any(os.path.commonpath([root, os.path.abspath(path)]) == root for root in roots)


def require_any_image(paths: Sequence[str], folder: str | Path, source: str | Path) -> None:
    """Raise InputError where none of the first 100 images exists; `data.validation` checks them all."""
    if paths and not any(map(os.path.exists, paths[:100])):
        raise AbsentSplitError(
            f"none of the first images that {source} lists is in {folder}: {os.path.basename(paths[0])} is absent there"
        )


def require_valid_unicode(names: Iterable[str], source: str | Path) -> None:
    """Raise InputError for a name with lone surrogates, which no file can have."""
    for name in names:
        try:
            name.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{source} holds the name {name!r}, which is not valid Unicode") from error


def map_files(read: Callable[[S], T], files: Sequence[S]) -> list[T]:
    """Return [read(file) for file in files], in threads where reading waits for the disk."""
    get_image_formats()  # fills its cache once, not in every thread
    wall, busy = time.perf_counter(), time.thread_time()
    results = [read(file) for file in files[:_SAMPLE]]
    # where the processor is the limit, threads would only contend for the interpreter lock
    if time.thread_time() - busy > 0.5 * (time.perf_counter() - wall):
        return results + [read(file) for file in files[_SAMPLE:]]
    with ThreadPoolExecutor(min(16, 4 + (os.cpu_count() or 1))) as pool:
        return results + list(pool.map(read, files[_SAMPLE:]))


def read_image_sizes(paths: Sequence[str], *, exif: bool = True) -> np.ndarray:
    """Read the sizes of images from their headers.

    Args:
        paths: The files.
        exif: Whether the sizes are those after EXIF rotation.

    Returns:
        (N, 2) int64 heights and widths.

    Raises:
        InputError: Images cannot be read; the sentence counts them and names the first.
    """

    def attempt(path: str) -> tuple[int, int] | InputError:
        try:
            # modes that cannot be trained on are reported later, with all other bad images
            is_array = is_array_file(path)
            height, width = read_array_size(path) if is_array else read_image_size(path, any_mode=True, exif=exif)
            if height and width:
                return height, width
            return InputError(f"{path} has no pixels: it is {width} wide and {height} high")
        except InputError as error:
            return error

    sizes = map_files(attempt, paths)
    bad = [size for size in sizes if isinstance(size, InputError)]
    if len(bad) > 1:
        raise InputError(f"{len(bad)} of {len(paths)} images cannot be read, the first: {bad[0]}") from bad[0]
    if bad:
        raise bad[0]
    return np.array(sizes, dtype=np.int64).reshape(-1, 2)
