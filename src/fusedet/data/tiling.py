"""Tiles of large images: where they lie, and datasets of them to train on and to validate on."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch

from fusedet.config.schema import PredictionTiles
from fusedet.data.dataset import DetectionDataset, PackedBytes
from fusedet.data.transforms import MIN_SIDE


def tile_windows(height: int, width: int, size: int, overlap: float) -> np.ndarray:
    """Cover an image with overlapping windows, row by row.

    The first and the last of a row touch the borders, and the others lie at equal distances, so that neighbors overlap
    by at least the given share. An image that is no longer than a tile along an axis has one window there, of its own
    length.

    Args:
        height: Height of the image in pixels.
        width: Width of the image.
        size: Side of a tile in pixels.
        overlap: Least overlap of neighbors, as a share of `size`, in [0, 1).

    Returns:
        (T, 4) int64 xyxy in pixels.

    >>> tile_windows(100, 220, 100, 0.2)[:, [0, 2]].tolist()
    [[0, 100], [60, 160], [120, 220]]
    """

    def starts(length: int) -> np.ndarray:
        if length <= size:
            return np.zeros(1, dtype=np.int64)
        count = 1 + math.ceil(round((length - size) / max(1.0, size * (1 - overlap)), 9))
        return np.linspace(0, length - size, count).round().astype(np.int64)

    top, left = (grid.ravel() for grid in np.meshgrid(starts(height), starts(width), indexing="ij"))
    return np.stack([left, top, np.minimum(left + size, width), np.minimum(top + size, height)], axis=1)


def list_windows(height: int, width: int, tiles: PredictionTiles) -> np.ndarray:
    """List the windows of an image that validation and prediction see, the whole image first.

    An image that is no longer than a tile has one window, itself. Without `tiles.size` every image has.

    Args:
        height: Height of the image in pixels.
        width: Width of the image.
        tiles: Size and overlap of the tiles, and whether the whole image is seen too.

    Returns:
        (T, 4) int64 xyxy in pixels.
    """
    whole = np.array([[0, 0, width, height]])
    if tiles.size is None or max(height, width) <= tiles.size:
        return whole
    own = tile_windows(height, width, tiles.size, tiles.overlap)
    return np.concatenate([whole, own]) if tiles.whole else own


def count_windows(dataset: DetectionDataset, tiles: PredictionTiles) -> list[int]:
    """Count the windows of each image that validation sees."""
    return [len(list_windows(height, width, tiles)) for height, width in dataset.sizes.tolist()]


def view_dataset(dataset: DetectionDataset, tiles: PredictionTiles, min_visible: float) -> DetectionDataset:
    """Return a dataset of the windows that validation sees, image by image; arguments as for `tile_dataset`."""
    return _cut_dataset(dataset, lambda height, width: list_windows(height, width, tiles), min_visible)


def tile_dataset(dataset: DetectionDataset, size: int, overlap: float, min_visible: float) -> DetectionDataset:
    """Return a dataset whose images are the tiles of another's, cut when they are read.

    Boxes are clipped to their tile. An object of which less than `min_visible` lies in a tile is an ignored region
    there. A tile has the id and the file of its image.

    Args:
        dataset: The images.
        size: Side of a tile in pixels.
        overlap: Least overlap of neighbors, as a share of `size`, in [0, 1).
        min_visible: The share of a box that a tile must hold, in 0..1.
    """
    return _cut_dataset(dataset, lambda height, width: tile_windows(height, width, size, overlap), min_visible)


def _cut_dataset(
    dataset: DetectionDataset, windows_of: Callable[[int, int], np.ndarray], min_visible: float
) -> DetectionDataset:
    """Return a dataset of the windows that a function gives for each (height, width)."""
    indices, windows, rows, boxes, counts, shares = [], [], [], [], [], []
    offsets, all_boxes = dataset.offsets.numpy(), dataset.boxes.numpy()
    for i, (height, width) in enumerate(dataset.sizes.tolist()):
        own = windows_of(height, width)
        image_boxes = _clip(all_boxes[offsets[i] : offsets[i + 1]], np.array([[0, 0, width, height]]))[0]
        clipped = _clip(image_boxes, own)
        is_inside = ((clipped[..., 2:] - clipped[..., :2]) >= MIN_SIDE).all(axis=-1)  # (T, G)
        tile, row = np.nonzero(is_inside)
        share = _area(clipped[tile, row]) / _area(image_boxes[row])
        indices.append(np.full(len(own), i))
        windows.append(own)
        rows.append(offsets[i] + row)
        boxes.append(clipped[tile, row] - np.tile(own[tile, :2], 2))
        counts.append(is_inside.sum(axis=1))
        shares.append(share)
    image_indices, window, row = np.concatenate(indices), np.concatenate(windows), np.concatenate(rows)
    at, is_cut = torch.from_numpy(row), torch.from_numpy(np.concatenate(shares) < min_visible)
    sides = torch.from_numpy(window[:, 2:] - window[:, :2])
    tiled_boxes = torch.from_numpy(np.concatenate(boxes))
    texts = dataset.image_id_texts
    return dataclasses.replace(
        dataset,
        image_ids=dataset.image_ids[image_indices],
        sizes=sides.flip(1),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(counts))])),
        boxes=tiled_boxes,
        labels=dataset.labels[at],
        ignore=dataset.ignore[at] | is_cut,
        eval_ignore=dataset.eval_ignore[at] | is_cut,
        area=(tiled_boxes[:, 2:] - tiled_boxes[:, :2]).prod(1),
        paths=PackedBytes.pack([dataset.paths[i] for i in image_indices.tolist()]),
        segmentations=PackedBytes.pack([dataset.segmentations[i] for i in row.tolist()]),
        image_id_texts=None if texts is None else PackedBytes.pack([texts[i] for i in image_indices.tolist()]),
        windows=torch.from_numpy(np.concatenate([window[:, :2], dataset.sizes.numpy()[image_indices]], axis=1)),
    )


def _clip(boxes: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """Clip boxes (G, 4) to each of the windows (T, 4), (T, G, 4)."""
    low, high = np.tile(windows[:, None, :2], 2), np.tile(windows[:, None, 2:], 2)
    return np.asarray(boxes[None].clip(low, high))


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.asarray((boxes[:, 2:] - boxes[:, :2]).prod(axis=1))
