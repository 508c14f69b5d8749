"""Image and video files from files, directories, globs and lists, listed lazily."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal, Self

from fusedet.data.image_files import get_image_extensions, is_unread_image_name
from fusedet.data.video_parts import is_video_name
from fusedet.errors import InputError

Names = tuple[str, ...]
Kind = Literal["image", "video"]


class Sources:
    """The files of files, directories (recursively), globs and lists (`@FILE`, a path per line), in order.

    It can be iterated many times; each time directories are walked and lists are read. The names of one directory at a
    time are in memory. Each file comes once, except from lists, which are taken as they are. Links to directories are
    not followed.

    Args:
        arguments: The sources, as a command takes them.
        kinds: Which files: by their extensions videos, and all others as images.

    Raises:
        InputError: A source does not exist or holds no such file.
    """

    def __init__(self, arguments: Iterable[str], kinds: tuple[Kind, ...] = ("image",)) -> None:
        self.arguments, self.kinds = tuple(arguments), kinds
        self._sources = [_source(argument, kinds) for argument in self.arguments]
        for argument, source in zip(self.arguments, self._sources):
            if next(filter(self._is_kind, source), None) is None:
                left_out = describe_left_out(self.count_left_out())
                raise InputError(f"{argument} matches no {' or '.join(kinds)}{f': {left_out}' if left_out else ''}")

    def __iter__(self) -> Iterator[Path]:
        for i, source in enumerate(self._sources):
            for path in filter(self._is_kind, source):
                if not any(earlier.covers(path) for earlier in self._sources[:i]):
                    yield path

    def only(self, kind: Kind) -> Self:
        """Return the files of one kind, which may be none."""
        chosen = copy(self)
        chosen.kinds = (kind,)
        return chosen

    def _is_kind(self, path: Path) -> bool:
        return ("video" if is_video_name(path.name) else "image") in self.kinds

    def count(self) -> int:
        """Count the files by walking all sources."""
        return sum(1 for _ in self)

    def count_left_out(self) -> dict[str, int]:
        """Count the images in directories whose formats are not read, by extension."""
        folders = [source.folder for source in self._sources if isinstance(source, _Glob) and source.pattern == _ALL]
        names = (name for folder in folders for _, _, files in os.walk(folder) for name in files)
        return dict(Counter(os.path.splitext(name)[1].lower() for name in names if is_unread_image_name(name)))


def describe_left_out(counts: Mapping[str, int]) -> str:
    """Describe images whose formats are not read; "" without any.

    >>> describe_left_out({".heic": 2, ".cr2": 1})
    'not read, as Pillow does not know the format: .heic (2), .cr2 (1); pip install pillow-heif reads HEIC'
    """
    if not counts:
        return ""
    kinds = ", ".join(f"{extension} ({count})" for extension, count in counts.items())
    hint = "; pip install pillow-heif reads HEIC" if counts.keys() & {".heic", ".heif", ".hif"} else ""
    return f"not read, as Pillow does not know the format: {kinds}{hint}"


@dataclass(frozen=True)
class _File:
    path: Path

    def __iter__(self) -> Iterator[Path]:
        yield self.path

    def covers(self, path: Path) -> bool:
        return path == self.path


@dataclass(frozen=True)
class _Glob:
    """The files below a directory whose names match the parts of a pattern; for "**", all images and videos."""

    folder: Path
    pattern: Names

    def __iter__(self) -> Iterator[Path]:
        return _below(self.folder, (), self.pattern)

    def covers(self, path: Path) -> bool:
        return self.folder in path.parents and _fits(path.relative_to(self.folder).parts, self.pattern)


@dataclass(frozen=True)
class _List:
    """A file of paths; a line may name a directory."""

    file: Path

    def __iter__(self) -> Iterator[Path]:
        with self.file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for line in lines:
                if name := line.strip():
                    yield from _Glob(Path(name), _ALL) if os.path.isdir(name) else (Path(name),)

    def covers(self, path: Path) -> bool:
        return False


_ALL = ("**",)


def _source(argument: str, kinds: Iterable[Kind]) -> _File | _Glob | _List:
    path = Path(argument)
    if argument and path.is_dir():  # "" is no folder, but Path("") is the current one
        return _Glob(path, _ALL)
    if path.is_file():
        return _File(path)
    if argument.startswith("@"):
        if not Path(argument[1:]).is_file():
            raise InputError(
                f"there is no list {argument[1:]}: write @FILE, a text file with the path of an image in each line"
            )
        return _List(Path(argument[1:]))
    if not any(c in argument for c in "*?["):
        raise InputError(f"there is no {', '.join(kinds)}, folder or pattern {argument or repr(argument)}")
    magic = next(i for i, part in enumerate(path.parts) if any(c in part for c in "*?["))
    return _Glob(Path(*path.parts[:magic]), path.parts[magic:])


def _below(folder: Path, names: Names, pattern: Names) -> Iterator[Path]:
    """Yield the matching files below folder/names, sorted by path; of each walked directory hold the names."""
    at = folder.joinpath(*names)
    try:
        with os.scandir(at) as scan:
            entries = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in scan)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"the directory {at} cannot be read: {error.strerror}") from error
    for name, is_folder in entries:
        inner = (*names, name)
        if is_folder:
            if _fits(inner, pattern, begun=True):
                yield from _below(folder, inner, pattern)
        elif _fits(inner, pattern) and os.path.isfile(at / name):
            yield at / name


def _fits(names: Names, pattern: Names, begun: bool = False) -> bool:
    """Return whether names match the parts of a pattern; with `begun`, whether further names can complete a match."""
    if pattern == _ALL:
        name = names[-1]
        return begun or os.path.splitext(name)[1].lower() in get_image_extensions() or is_video_name(name)
    if not names or not pattern:
        return bool(pattern) if begun and not names else not names and not pattern
    if pattern[0] == "**":
        return _fits(names, pattern[1:], begun) or _fits(names[1:], pattern, begun)
    return fnmatch(names[0], pattern[0]) and _fits(names[1:], pattern[1:], begun)
