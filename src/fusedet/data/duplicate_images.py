"""Images that are in two splits: the same file, the same content, or nearly the same pixels."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from fusedet.file_hash import hash_file

_GRID = 16  # pixels per side of the reduced image that is compared
_MIN_CONTRAST = 4.0  # gray levels of standard deviation: flatter images all look alike
_MIN_CORRELATION = 0.99
_MAX_DIFFERENCE = 4.0  # mean difference in gray levels, after the means are made equal
_BLOCK = 1 << 22  # pairs that are compared at a time, which bounds memory
_CANDIDATES = 256  # images that one is compared with at a time: frames of a fixed camera mostly fit the first


@dataclass(frozen=True)
class ImagePrint:
    """What identifies an image.

    Attributes:
        digest: SHA-256 of the file.
        gray: (16, 16) float16, the image reduced to gray levels: its perceptual hash.
    """

    digest: str
    gray: np.ndarray


def compute_print(path: Path, image: Tensor) -> ImagePrint:
    """Return what identifies an image, given its file and its pixels (C, H, W) uint8."""
    height, rows = image.shape[1], []
    for i in range(_GRID):  # row by row of the grid, which bounds memory
        gray = image[:, i * height // _GRID : -(-(i + 1) * height // _GRID)].float().mean(dim=0)[None, None]
        rows.append(interpolate(gray, size=(1, _GRID), mode="area")[0, 0])
    small = torch.cat(rows)
    return ImagePrint(hash_file(path), small.numpy().astype(np.float16))


@dataclass(frozen=True)
class SharedImages:
    """The images of one split that are in another.

    Attributes:
        same_file: Pairs of indices (in the one, in the other) of the same file.
        same_content: Pairs of different files of the same bytes.
        similar: Pairs of different files of nearly the same pixels.
    """

    same_file: list[tuple[int, int]]
    same_content: list[tuple[int, int]]
    similar: list[tuple[int, int]]


def find_shared_images(
    paths: Sequence[Path],
    other_paths: Sequence[Path],
    prints: Sequence[ImagePrint | None] = (),
    other_prints: Sequence[ImagePrint | None] = (),
) -> SharedImages:
    """Find the images of one split that are in another; each is in the first group that it fits.

    Nearly the same are images whose perceptual hashes, 16 x 16 gray levels, correlate by 0.99 and differ by few gray
    levels: those of another size or compression, and neighboring frames of a video.

    Args:
        paths: The files of the one split.
        other_paths: Those of the other.
        prints: What identifies the images of the one split, None for images that cannot be read; empty to compare
            paths only.
        other_prints: The same of the other split.
    """
    known = {os.path.realpath(path): j for j, path in enumerate(other_paths)}
    same_file = [(i, known[real]) for i, path in enumerate(paths) if (real := os.path.realpath(path)) in known]
    done = {i for i, _ in same_file}
    digests = {own.digest: j for j, own in enumerate(other_prints) if own}
    same_content = [
        (i, digests[own.digest]) for i, own in enumerate(prints) if own and i not in done and own.digest in digests
    ]
    done |= {i for i, _ in same_content}
    rest = [i for i, own in enumerate(prints) if own and i not in done and _has_contrast(own)]
    others = [j for j, own in enumerate(other_prints) if own and _has_contrast(own)]
    similar = []
    if rest and others:
        own_gray = np.stack([p.gray for i in rest if (p := prints[i])])
        other_gray = np.stack([p.gray for j in others if (p := other_prints[j])])
        similar = [(rest[i], others[j]) for i, j in _find_similar(own_gray, other_gray)]
    return SharedImages(same_file, same_content, similar)


def _has_contrast(own: ImagePrint) -> bool:
    return float(own.gray.astype(np.float32).std()) >= _MIN_CONTRAST


def _find_similar(gray: np.ndarray, other_gray: np.ndarray) -> list[tuple[int, int]]:
    """Find pairs of nearly equal reduced images (N, 16, 16) and (M, 16, 16), at most one per image of the first."""
    centered, other_centered = (
        torch.from_numpy(x.astype(np.float32)).flatten(1) - x.astype(np.float32).mean(axis=(1, 2))[:, None]
        for x in (gray, other_gray)
    )
    other_units = normalize(other_centered)
    pairs: list[tuple[int, int]] = []
    size = max(1, _BLOCK // len(other_gray))
    for start in range(0, len(gray), size):
        part = centered[start : start + size]
        correlates = (normalize(part) @ other_units.T) >= _MIN_CORRELATION
        for i in correlates.any(dim=1).nonzero().flatten().tolist():
            for candidates in correlates[i].nonzero().flatten().split(_CANDIDATES):
                is_similar = (part[i] - other_centered[candidates]).abs().mean(dim=1) <= _MAX_DIFFERENCE
                if is_similar.any():
                    pairs.append((start + i, int(candidates[is_similar][0])))
                    break
    return pairs
