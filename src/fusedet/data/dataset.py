"""The annotations of a dataset in flat tensors that all worker processes share.

Forked workers share the memory pages. For spawned workers, torch moves tensors to shared memory when it pickles them.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Tile(NamedTuple):
    """Where a tile lies in its image: its first column and row, and the size of the whole image, in pixels."""

    left: int
    top: int
    image_height: int
    image_width: int


@dataclass(frozen=True)
class ImageAnnotations:
    """One image, or a tile of one, and its G annotations.

    Attributes:
        image_id: The image's id in the dataset.
        path: The image's file.
        height: Height in pixels, after EXIF rotation unless the dataset's `exif` is false.
        width: Width in pixels, likewise.
        boxes: (G, 4) float64 xyxy in pixels, continuous with origin 0, not clipped to the image.
        labels: (G,) int64 in 0..K-1.
        ignore: (G,) bool, neither positive nor negative in training: `iscrowd` and `ignore` of COCO, difficult
            annotations of VOC.
        area: (G,) float64, the annotated area where the dataset format has one, else width x height.
        segmentations: Per annotation polygons [[x, y, ...], ...], a COCO RLE dict, or None.
        eval_ignore: (G,) bool, ignored in evaluation: `iscrowd` of COCO, difficult annotations of VOC. Annotations with
            COCO's `ignore` count in evaluation, as in pycocotools.
        tile: Where a tile lies, None for a whole image. Sizes and boxes are those of the tile, segmentations those of
            the whole image.
    """

    image_id: int
    path: Path
    height: int
    width: int
    boxes: np.ndarray
    labels: np.ndarray
    ignore: np.ndarray
    area: np.ndarray
    segmentations: list[Any]
    eval_ignore: np.ndarray
    tile: Tile | None = None


@dataclass(frozen=True)
class DetectionDataset:
    """A split of a dataset: a sequence of `ImageAnnotations`, stored in flat columns.

    Attributes:
        names: The K class names, in the order of the labels.
        category_ids: The K category ids of the dataset.
        source: The file or folder that was read.
        dataset_format: The format that was read, as `readers.auto.detect_format` names it.
        problems: Number of malformed annotations by kind; the key says how they were treated.
        examples: The first file of each kind of problem, where one is known.
        faulty: The annotations of each kind of problem that concerns single boxes, also of those that are dropped:
            (n, 2) int64, their images and labels.
        value_range: The pixel values that become 0 and 255 in images of more than 8 bits per channel; None for the
            whole range of 16 bits.
        image_id_texts: N ids of the images as the dataset has them, where these are texts; else none.
        category_id_texts: The K category ids as the dataset has them, where these are texts; else none.
        exif: Whether EXIF orientation is applied to the images.
        channels: Channels of the images: 3 for RGB.
        windows: (N, 4) int64, the `Tile` of each image; None for whole images.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: str
    dataset_format: str
    image_ids: Tensor  # (N,) int64
    sizes: Tensor  # (N, 2) int64, height and width
    offsets: Tensor  # (N + 1,) int64, where each image's annotations begin
    boxes: Tensor  # (M, 4) float64
    labels: Tensor  # (M,) int64
    ignore: Tensor  # (M,) bool
    eval_ignore: Tensor  # (M,) bool
    area: Tensor  # (M,) float64
    paths: PackedBytes
    segmentations: PackedBytes
    problems: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, str] = field(default_factory=dict)
    faulty: Mapping[str, Tensor] = field(default_factory=dict)
    value_range: tuple[float, float] | None = None
    image_id_texts: PackedBytes | None = None
    category_id_texts: tuple[str, ...] = ()
    exif: bool = True
    channels: int = 3
    windows: Tensor | None = None

    @classmethod
    def build(
        cls,
        names: Iterable[str],
        category_ids: Iterable[int],
        images: Iterable[ImageAnnotations],
        *,
        source: str | Path,
        dataset_format: str,
        problems: Mapping[str, int] | None = None,
    ) -> DetectionDataset:
        """Flatten the annotations of images into columns.

        Args:
            names: (K,) class names.
            category_ids: (K,) category ids.
            images: Annotations of each image.
            source: Where the data come from, for messages.
            dataset_format: Such as "coco".
            problems: Faults that the reader has counted, by their text.
        """
        rows = list(images)

        def column(empty: tuple[int, ...], name: str) -> np.ndarray:
            return np.concatenate([np.zeros(empty), *(np.reshape(getattr(r, name), (-1, *empty[1:])) for r in rows)])

        return cls.from_arrays(
            names,
            category_ids,
            image_ids=np.array([r.image_id for r in rows], dtype=np.int64),
            sizes=np.array([(r.height, r.width) for r in rows], dtype=np.int64),
            paths=[str(r.path) for r in rows],
            image_indices=np.repeat(np.arange(len(rows)), np.array([len(r.boxes) for r in rows], dtype=np.int64)),
            boxes=column((0, 4), "boxes"),
            labels=column((0,), "labels"),
            ignore=column((0,), "ignore"),
            eval_ignore=column((0,), "eval_ignore"),
            area=column((0,), "area"),
            segmentations=[pack_segmentation(s) for r in rows for s in r.segmentations],
            source=source,
            dataset_format=dataset_format,
            problems=problems,
        )

    @classmethod
    def from_arrays(
        cls,
        names: Iterable[str],
        category_ids: Iterable[int],
        *,
        image_ids: np.ndarray,
        sizes: np.ndarray,
        paths: Sequence[str],
        image_indices: np.ndarray,
        boxes: np.ndarray,
        labels: np.ndarray,
        ignore: np.ndarray,
        eval_ignore: np.ndarray,
        area: np.ndarray,
        segmentations: Sequence[bytes],
        source: str | Path,
        dataset_format: str,
        problems: Mapping[str, int] | None = None,
        examples: Mapping[str, str] | None = None,
        faulty: Mapping[str, Tensor] | None = None,
        image_id_texts: Sequence[str] = (),
        category_id_texts: Sequence[str] = (),
    ) -> DetectionDataset:
        """Build a dataset from flat columns of N images and M annotations.

        Annotations may come in any order; those of one image keep their order.

        Args:
            names: The K class names.
            category_ids: The K category ids.
            image_ids: (N,) ids of the images.
            sizes: (N, 2) heights and widths.
            paths: N image files.
            image_indices: (M,) index of each annotation's image, in 0..N-1.
            boxes: (M, 4) xyxy in pixels.
            labels: (M,) in 0..K-1.
            ignore: (M,) bool, ignored in training.
            eval_ignore: (M,) bool, ignored in evaluation.
            area: (M,) in square pixels.
            segmentations: M segmentations as `pack_segmentation` returns them.
            source: The file or folder that was read.
            dataset_format: The format that was read.
            problems: Number of malformed annotations by kind.
            examples: The first file of each kind of problem.
            faulty: The images and labels of the annotations of each kind of problem.
            image_id_texts: N ids of the images, where these are texts.
            category_id_texts: K ids of the categories, where these are texts.
        """
        order = np.argsort(image_indices, kind="stable")
        counts = np.bincount(image_indices, minlength=len(paths))

        def tensor(values: np.ndarray, dtype: Any) -> Tensor:
            return torch.from_numpy(np.ascontiguousarray(values, dtype=dtype))

        return cls(
            names=tuple(names),
            category_ids=tuple(int(c) for c in category_ids),
            source=str(source),
            dataset_format=dataset_format,
            image_ids=tensor(image_ids, np.int64),
            sizes=tensor(np.reshape(sizes, (-1, 2)), np.int64),
            offsets=tensor(np.concatenate([[0], np.cumsum(counts)]), np.int64),
            boxes=tensor(boxes[order], np.float64),
            labels=tensor(labels[order], np.int64),
            ignore=tensor(ignore[order], np.bool_),
            eval_ignore=tensor(eval_ignore[order], np.bool_),
            area=tensor(area[order], np.float64),
            paths=PackedBytes.pack([p.encode("utf-8", "surrogateescape") for p in paths]),
            segmentations=PackedBytes.pack([segmentations[i] for i in order.tolist()]),
            problems=dict(problems or {}),
            examples=dict(examples or {}),
            faulty=dict(faulty or {}),
            image_id_texts=PackedBytes.pack([text.encode() for text in image_id_texts]) if image_id_texts else None,
            category_id_texts=tuple(category_id_texts),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def __iter__(self) -> Iterator[ImageAnnotations]:
        return (self[i] for i in range(len(self)))

    @property
    def image_indices(self) -> np.ndarray:
        """The index (M,) of the image of each annotation."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets.numpy()))

    def path(self, i: int) -> Path:
        """Return the file of image i."""
        return Path(self.paths[i].decode("utf-8", "surrogateescape"))

    def __getitem__(self, i: int) -> ImageAnnotations:
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, end = self.offsets[i : i + 2].tolist()
        height, width = self.sizes[i].tolist()
        return ImageAnnotations(
            image_id=int(self.image_ids[i]),
            path=self.path(i),
            height=height,
            width=width,
            boxes=self.boxes[begin:end].numpy(),
            labels=self.labels[begin:end].numpy(),
            ignore=self.ignore[begin:end].numpy(),
            eval_ignore=self.eval_ignore[begin:end].numpy(),
            area=self.area[begin:end].numpy(),
            segmentations=[unpack_segmentation(self.segmentations[j]) for j in range(begin, end)],
            tile=None if self.windows is None else Tile(*self.windows[i].tolist()),
        )

    def list_image_ids(self) -> list[int] | list[str]:
        """Return the images' ids as the dataset has them: integers or texts."""
        texts = self.image_id_texts
        return self.image_ids.tolist() if texts is None else [texts[i].decode() for i in range(len(self))]

    def fingerprint(self) -> str:
        """Return 16 hex digits that change with any image's name, size, box, label or class name."""
        digest = hashlib.sha256(json.dumps([self.names, self.category_ids]).encode())
        for i in range(len(self)):
            digest.update(self.path(i).name.encode("utf-8", "surrogateescape"))
        for column in (self.image_ids, self.sizes, self.offsets, self.boxes, self.labels, self.ignore):
            digest.update(column.numpy().tobytes())
        if not torch.equal(self.ignore, self.eval_ignore):
            digest.update(self.eval_ignore.numpy().tobytes())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class PackedBytes:
    """A sequence of byte strings, stored in two tensors."""

    data: Tensor  # (bytes,) uint8
    offsets: Tensor  # (N + 1,) int64

    @classmethod
    def pack(cls, items: list[bytes]) -> PackedBytes:
        """Pack byte strings."""
        offsets = torch.from_numpy(np.cumsum([0, *map(len, items)], dtype=np.int64))
        data = torch.empty(int(offsets[-1]), dtype=torch.uint8)
        data.numpy()[:] = np.frombuffer(b"".join(items), dtype=np.uint8)
        return cls(data, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> bytes:
        begin, end = self.offsets[i : i + 2].tolist()
        return self.data[begin:end].numpy().tobytes()


def pack_segmentation(segmentation: Any) -> bytes:
    """Pack polygons as raw float64, an RLE as JSON, and None as no bytes.

    Raw float64 is lossless and much faster than JSON.

    Raises:
        TypeError: A polygon holds anything but numbers.
    """
    if segmentation is None:
        return b""
    if isinstance(segmentation, dict):
        return json.dumps(segmentation).encode()
    lengths = array("Q", [len(segmentation), *map(len, segmentation)])
    return b"P" + lengths.tobytes() + b"".join(array("d", polygon).tobytes() for polygon in segmentation)


def unpack_segmentation(data: bytes) -> Any:
    """Unpack the result of `pack_segmentation`: polygons [[x, y, ...], ...], an RLE dict or None."""
    if not data:
        return None
    if data[:1] != b"P":
        return json.loads(data)
    count = int(np.frombuffer(data, np.uint64, 1, offset=1)[0])
    lengths = np.frombuffer(data, np.uint64, count, offset=9).astype(np.int64)
    values = np.frombuffer(data, np.float64, offset=9 + 8 * count)
    return [polygon.tolist() for polygon in np.split(values, np.cumsum(lengths)[:-1])]
