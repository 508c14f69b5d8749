"""Download of a file: whole or not at all, continued after a break, checked against the beginning of its SHA-256.

`torch.hub` and pooch do not continue a broken download, and pooch wants whole hashes; `huggingface_hub` continues its
own repositories' files by a function that is not public. The standard library is enough.
"""

import re
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rich.console import Console

from fusedet.api.progress import progress_bar
from fusedet.errors import InputError, StorageError
from fusedet.file_hash import hash_file

TIMEOUT = 30.0
"""Seconds without a byte after which a connection counts as broken."""
_CHUNK = 2**18


class DownloadError(Exception):
    """A file could not be fetched; the text says why."""


def download(address: str, target: Path, sha256: str, console: Console | None = None) -> None:
    """Fetch a file from an HTTP address, unless it exists; what a broken download left in TARGET.part is continued.

    Args:
        address: The address.
        target: The file to write; it exists afterwards only if its hash is right.
        sha256: The beginning of the file's SHA-256.
        console: Shows the progress, if it is a terminal.

    Raises:
        DownloadError: The address is malformed, there is no connection, the server refuses, or the connection breaks
            without bringing a byte.
        InputError: The file has another hash; it is deleted.
        StorageError: The file cannot be written.
    """
    if target.is_file() and hash_file(target).startswith(sha256):
        return
    part = target.with_name(f"{target.name}.part")
    is_continued = part.exists()
    _complete(address, part, console)
    if is_continued and not hash_file(part).startswith(sha256):  # what was there may be of another file
        part.unlink()
        _complete(address, part, console)
    if not hash_file(part).startswith(sha256):
        part.unlink()
        raise InputError(
            f"{address} is not the published file: its SHA-256 does not begin with {sha256}; it was deleted, fetch it "
            "again or from another place"
        )
    part.replace(target)


def _complete(address: str, part: Path, console: Console | None) -> None:
    """Append to a file until it is complete; a break is tolerated as long as each connection brings bytes."""
    while True:
        size = _size(part)
        try:
            return _append(address, part, console)
        except HTTPError as error:
            raise DownloadError(f"the server answers {error.code} {error.reason}") from error
        except (OSError, HTTPException) as error:  # URLError is an OSError
            if _size(part) <= size:
                reason = error.reason if isinstance(error, URLError) else error
                raise DownloadError(str(reason) or type(error).__name__) from error


def _append(address: str, part: Path, console: Console | None) -> None:
    """Fetch what a file lacks, over one connection.

    Raises:
        OSError: The connection fails or breaks; what came before is in the file.
    """
    start = _size(part)
    headers = {"User-Agent": "fusedet"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        request = Request(address, headers=headers)
        response = urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416 and start:  # nothing is left to fetch; the hash tells whether the file is right
            return
        raise
    except ValueError as error:
        raise DownloadError(str(error)) from error  # a malformed address
    with response:
        place = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
        is_rest = response.status == 206 and place is not None and int(place[1]) == start
        start = start if is_rest else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        try:
            file = part.open("ab" if is_rest else "wb")
        except OSError as error:
            raise _storage_error(part, error) from error
        with file, progress_bar(console, total, part.name.removesuffix(".part"), in_bytes=True) as advance:
            advance(start)
            while chunk := response.read1(_CHUNK):  # as soon as it comes: a break loses nothing
                try:
                    file.write(chunk)
                    file.flush()
                except OSError as error:
                    raise _storage_error(part, error) from error
                advance(len(chunk))
    if total is not None and _size(part) < total:
        raise ConnectionError(f"the connection broke after {_size(part)} of {total} bytes")


def _storage_error(file: Path, error: OSError) -> StorageError:
    return StorageError(f"{file} cannot be written: {error.strerror or error}")


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
