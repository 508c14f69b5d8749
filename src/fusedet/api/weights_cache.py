"""The user's cache of published weights: fetched when a name asks for them, converted once, kept as safetensors."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from filelock import FileLock
from rich.console import Console

from fusedet import interop
from fusedet.api.download import DownloadError, download
from fusedet.engine import checkpoint
from fusedet.errors import InputError
from fusedet.file_hash import hash_file
from fusedet.interop import ConvertedCheckpoint
from fusedet.interop.published_weights import PublishedWeights, find_published_weights

CACHE, MIRROR = "FUSEDET_CACHE", "FUSEDET_WEIGHTS_MIRROR"
"""Environment variables: the folder of the cache; a URL or folder that holds the files in the place of the sources."""


def fetch_weights(name: str | Path) -> Path:
    """Return the checkpoint of published weights in the cache; the first time, it is fetched and converted.

    Two processes fetch it once: the second one waits for the first.

    Args:
        name: SOURCE/NAME.

    Raises:
        InputError: The name is unknown, the file cannot be fetched, is not the published one, or cannot be converted.
        StorageError: The cache cannot be written.
    """
    weights = find_published_weights(name)
    target = cached_checkpoint(weights)
    if target.is_file():
        return target
    with _locked(target):
        if not target.is_file():
            file = _obtain(weights)
            save_converted(target, interop.convert_checkpoint(file, weights.config))
            if file == _downloaded(weights):
                file.unlink()
    return target


def cache_folder() -> Path:
    """Return the folder of the published weights in the user's cache, which may not exist yet."""
    if own := os.environ.get(CACHE):
        return Path(os.path.expanduser(own)) / "weights"  # pathlib's raises for an unknown user
    parent = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(parent) / "fusedet" / "weights"


def cached_checkpoint(weights: PublishedWeights) -> Path:
    """Return where the converted weights are kept, whether they exist or not."""
    return cache_folder() / f"{weights.name}.safetensors"


def place_by_hand(weights: PublishedWeights) -> Path:
    """Return where a user may put the published file."""
    return cache_folder() / weights.file


def find_address(weights: PublishedWeights) -> str:
    """Return from where the published file is taken: its address, or its address or path in the mirror.

    Raises:
        InputError: The mirror is neither a URL nor a folder.
    """
    mirror = os.environ.get(MIRROR)
    if not mirror:
        return weights.address
    if mirror.startswith(("http://", "https://")):
        return f"{mirror.rstrip('/')}/{quote(weights.file)}"
    folder = Path(os.path.expanduser(mirror))
    if not folder.is_dir():
        raise InputError(f"{MIRROR}={mirror} is neither a folder nor an address that begins with http:// or https://")
    return str(folder / weights.file)


def save_converted(file: Path, converted: ConvertedCheckpoint) -> None:
    """Write a converted checkpoint as one of this project."""
    lists = {"names": json.dumps(converted.names), "category_ids": json.dumps(converted.category_ids)}
    meta = {"config": converted.config.to_yaml(), "format": "fusedet", **lists}
    checkpoint.save_weights(file, converted.weights, meta)


def _obtain(weights: PublishedWeights) -> Path:
    """Return the published file with the right hash: put there by hand, of the mirror's folder, or downloaded."""
    by_hand = place_by_hand(weights)
    if by_hand.is_file():
        return _checked(by_hand, weights)
    address = find_address(weights)
    if not address.startswith(("http://", "https://")):
        if not Path(address).is_file():
            raise InputError(
                f"{MIRROR}={os.environ[MIRROR]} has no {weights.file}, the file of {weights.name}: put it there from "
                f"{weights.address}, or unset {MIRROR}"
            )
        return _checked(Path(address), weights)
    file = _downloaded(weights)
    try:
        download(address, file, weights.sha256, Console(stderr=True))
    except DownloadError as error:
        raise InputError(
            f"{weights.name} could not be fetched from {address} ({error}): connect to the network and give the same "
            f"command, put the file at {by_hand}, or set {MIRROR} to a URL or folder that holds {weights.file}"
        ) from error
    return file


def _downloaded(weights: PublishedWeights) -> Path:
    """Return where a downloaded file is until it is converted."""
    return cached_checkpoint(weights).parent / weights.file


def _checked(file: Path, weights: PublishedWeights) -> Path:
    if not hash_file(file).startswith(weights.sha256):
        raise InputError(
            f"{file} is not the file of {weights.name}: its SHA-256 does not begin with {weights.sha256}; take the "
            f"one from {weights.address}"
        )
    return file


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Let one process at a time make a file of the cache.

    Raises:
        InputError: The cache cannot be written.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{target}.lock")
        lock.acquire()
    except OSError as error:
        raise InputError(
            f"the cache {cache_folder()} cannot be written ({error.strerror or error}): set {CACHE} to another folder"
        ) from error
    try:
        yield
    finally:
        lock.release()
