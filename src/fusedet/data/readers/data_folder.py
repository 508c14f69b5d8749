"""The files of a data folder in one walk: annotation files by extension, images by name, and splits by folder."""

import codecs
import mmap
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

from fusedet.data.image_files import (
    SPLIT_NAMES,
    is_image_name,
    list_files,
    normalize_split_name,
    normalize_split_names,
)
from fusedet.errors import InputError

_HEAD = 1 << 16  # bytes that are searched for a keyword


class DataFolder:
    """A data folder, or the folder of an annotation file.

    Args:
        path: The folder or the file.

    Attributes:
        path: The path as given.
        root: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.root = self.path if self.path.is_dir() else self.path.parent
        self._json_formats: dict[str, str | None] = {}

    @cached_property
    def files(self) -> list[str]:
        """All files, sorted by path; without hidden files and those that operating systems leave."""
        return sorted(map(os.path.normpath, list_files(self.root)))

    @cached_property
    def images(self) -> frozenset[str]:
        """All images."""
        return frozenset(file for file in self.files if is_image_name(file))

    def list_annotations(self, *extensions: str) -> list[str]:
        """List the given file, or all files of a folder with one of these extensions (lower case, with the dot)."""
        if self.path.is_file():
            return [str(self.path)] if self.path.suffix.lower() in extensions else []
        return [file for file in self.files if os.path.splitext(file)[1].lower() in extensions]

    def identify_json(self, file: str | Path) -> str | None:
        """Tell the format of a json file, for example "coco" or "labelme"; None if unknown. Each is read once."""
        if (path := str(file)) not in self._json_formats:
            self._json_formats[path] = _identify_json(path)
        return self._json_formats[path]

    def list_json(self, *formats: str) -> list[str]:
        """List the json files of some formats."""
        return [file for file in self.list_annotations(".json") if self.identify_json(file) in formats]

    @cached_property
    def _by_name(self) -> dict[str, list[str]]:
        return _group(self.images, os.path.basename)

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        return _group(self.images, _stem)

    def find_image(self, annotation: str, *names: str) -> str | None:
        """Find the image of an annotation file; only files inside the folder are found.

        Args:
            annotation: The annotation file.
            names: The image's name as written there, with separators of any system, or without extension; the first
                that is found counts. A name is a path from the annotation file, from the folder or from its `images`;
                else its last part counts, and of several images that have it, the one in the most similar folder.

        Raises:
            InputError: Several images fit equally well.
        """
        here, names = os.path.dirname(annotation), tuple(name.replace("\\", "/") for name in names)
        for name in names:
            for base in (here, self.root, self.root / "images"):
                path = os.path.normpath(os.path.join(base, name))
                if path in self.images:
                    return path
        for name in names:
            last = last_part(name)
            if candidates := self._by_name.get(last) or self._by_stem.get(_stem(last) if is_image_name(last) else last):
                return self._nearest(annotation, name, candidates)
        return None

    def _nearest(self, annotation: str, name: str, candidates: list[str]) -> str:
        own = Counter(self._folders(annotation)) + Counter(name.split("/")[:-1])
        scores = [sum((own & Counter(self._folders(path))).values()) for path in candidates]
        beside = [path for path in candidates if os.path.dirname(path) == os.path.dirname(annotation)]
        nearest = [path for path, score in zip(candidates, scores, strict=True) if score == max(scores)]
        # folders cannot tell an image from a mask of another extension
        best = beside or (nearest if len(set(map(os.path.basename, candidates))) == 1 else candidates)
        if len(best) > 1:
            raise InputError(
                f"{annotation} belongs to an image '{name}', but there are several: {best[0]} and {best[1]}"
            )
        return best[0]

    def _folders(self, path: str) -> list[str]:
        return os.path.relpath(os.path.dirname(path), self.root).split(os.sep)

    def group_by_split(
        self, files: Iterable[str], wanted: str | None = None, *, by_file: bool = False
    ) -> dict[str, list[str]]:
        """Group files by the name of a split among their folders; without such folders all are `train`.

        Args:
            files: The files.
            wanted: A split that may also be a folder's name or path; its files are then a further group.
            by_file: Whether a file's own name may be that of a split too, as of files that hold many images.
        """
        files = list(files)

        def find_name(file: str) -> str:
            names = [*self._folders(file), *([_stem(file)] if by_file else [])]
            return next(filter(_names_split, names), "")

        groups = _group(files, find_name)
        rest = groups.pop("", [])
        splits = dict(zip(normalize_split_names(list(groups)), groups.values(), strict=True))
        splits |= {"rest" if "train" in splits else "train": rest} if rest else {}
        if wanted is not None and normalize_split_name(wanted) not in splits:
            folder = os.path.join(os.path.normpath(wanted), "")
            inside = [file for file in files if os.path.relpath(file, self.root).startswith(folder)]
            splits |= {wanted: inside} if inside else {}
        return splits


def is_data_yaml(file: str | Path) -> bool:
    """Return whether a yaml has class names, as that of a YOLO dataset."""
    return file_mentions(file, r"^['\"]?names['\"]?\s*:")


def has_yolo_labels(file: str | Path) -> bool:
    """Return whether a text file has a line of YOLO's labels: a class number and at least four numbers."""
    return file_mentions(file, r"^[ \t]*\d+(\.0*)?([ \t]+[-+.eE\d]+){4,}\s*$")


def file_mentions(file: str | Path, pattern: str) -> bool:
    """Return whether the first 64 KiB of a regular file match a pattern."""
    return re.search(pattern.encode(), _read_head(file), re.MULTILINE) is not None


def _identify_json(file: str) -> str | None:
    """Identify the format of a json file by the keys at its beginning, else by those of the whole file."""
    kind = _match_json_keys(_read_head(file))
    if kind is not None or not os.path.isfile(file) or os.path.getsize(file) <= _HEAD:
        return kind
    try:  # an image in the file (LabelMe's imageData) or many categories may stand before the keys
        with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _match_json_keys(content)
    except (OSError, ValueError):
        return None  # reported when it is read


def _match_json_keys(content: bytes | mmap.mmap) -> str | None:
    kinds = (kind for kind, *keys in _JSON_KEYS if all(re.search(key.encode(), content) for key in keys))
    return next(kinds, None)


_JSON_KEYS = (
    ("labelme", r'"shapes"\s*:\s*\['),
    ("via", r'"regions"\s*:', r'"(shape_attributes|file_attributes)"\s*:'),
    ("via", r'"_via_img_metadata"\s*:'),
    ("Label Studio", r'"(from_name|annotation_results|completed_by)"\s*:'),
    ("Datumaro", r'"dm_format_version"\s*:'),
    ("Create ML", r'"coordinates"\s*:\s*\{\s*"(x|y|width|height)"'),
    ("Supervisely", r'"classTitle"\s*:'),
    ("coco", r'"images"\s*:\s*\['),
    ("coco", r'"annotations"\s*:\s*\[', r'"(image_id|categories)"\s*:'),
)
"""Formats and the patterns that their files must all match."""


def _read_head(file: str | Path) -> bytes:
    """Read the first bytes of a file, as UTF-8 without a byte order mark."""
    if not os.path.isfile(file):  # a pipe, whose reading might never end
        return b""
    try:
        with open(file, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return b""  # reported when it is read
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return head.decode("utf-16", "ignore").encode("utf-8", "ignore")
    return head.removeprefix(codecs.BOM_UTF8)


def last_part(name: str) -> str:
    r"""Return the last part of a file name with separators of any system.

    >>> last_part("..\\\\upload\\\\4\\\\a.jpg"), last_part("/data/upload/4/a.jpg")
    ('a.jpg', 'a.jpg')
    """
    return name.replace("\\", "/").rsplit("/", 1)[-1]


def _stem(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


def _group(paths: Iterable[str], key: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for path in sorted(paths):
        groups[key(path)].append(path)
    return groups


def _names_split(folder: str) -> bool:
    return normalize_split_name(folder.lower()) in SPLIT_NAMES or folder.lower() == "default"
