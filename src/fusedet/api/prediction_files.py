"""Parts of predictions as files, and what they are together: never more than one of them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fusedet.atomic_io import sync
from fusedet.errors import InputError, StorageError

Info = dict[str, Any]
_HEAD = '{"info": '


def join(parts: Sequence[Path | Info], target: Path, skipped: bool = False) -> None:
    """Put parts together as one file in COCO's form; of all of them, one at a time is in memory. The objects are numbered from 1.

    skipped: whether what could not be read is listed too.
    """
    temporary = target.with_name(f".{target.name}.part")
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogatepass") as file:
            file.write('{"images": [')
            file.writelines(_listed(_items(parts, "images")))
            file.write(f'], "categories": {text(_content(parts[0])["categories"])}, "annotations": [')
            file.writelines(_listed({**one, "id": i} for i, one in enumerate(_items(parts, "annotations"), start=1)))
            if skipped:
                file.write('], "skipped": [')
                file.writelines(_listed(_items(parts, "skipped")))
            file.write("]}")
        sync(temporary)  # the parts are removed afterwards
        temporary.replace(target)
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}; the parts are whole, go on with --resume"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _items(parts: Sequence[Path | Info], key: str) -> Iterator[Info]:
    for part in parts:
        yield from _content(part)[key]


def _content(part: Path | Info) -> Info:
    if isinstance(part, dict):
        return part
    return dict(json.loads(part.read_text(encoding="utf-8", errors="surrogatepass")))


def _listed(items: Iterable[Info]) -> Iterator[str]:
    for i, item in enumerate(items):
        yield (", " if i else "") + text(item)


def text(value: Any) -> str:
    """As JSON, in any script."""
    return json.dumps(value, ensure_ascii=False)


def info_of(file: Path) -> Info:
    """A part's figures, from the beginning of its file."""
    with file.open(encoding="utf-8") as opened:
        head = opened.read(2000)
    try:
        info, _ = json.JSONDecoder().raw_decode(head, len(_HEAD))
        return dict(info)
    except (ValueError, TypeError):
        raise InputError(f"{file} is no part of a prediction: remove it, and go on with --resume") from None
