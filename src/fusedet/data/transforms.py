"""From an image and its record to the network's input and target: keep-ratio resize, flip, photometric distortion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fusedet.data.dataset import ImageAnnotations
from fusedet.errors import InputError
from fusedet.types import Target

MIN_SIDE = 1e-3
"""Objects less wide or high than this, in network pixels inside the image, are left out."""


class Transform(Protocol):
    """What a loader needs: all randomness comes from torch's global generator, and `network_size` draws first."""

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """The image's (height, width) for the network."""
        ...

    def __call__(
        self, image: Tensor, record: ImageAnnotations, masks: bool = False
    ) -> tuple[Tensor, tuple[float, float], Target]:
        """The image, its scale (x, y) and its target, in network pixels."""
        ...


def keep_ratio_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) of the largest image of the same aspect ratio whose sides are at most `short` and `long`.

    Rounded as MMDetection's Resize(keep_ratio=True) does it.
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclass(frozen=True)
class EvalTransform:
    """Resize to at most `size` on the short and `max_size` on the long side; with `flip`, mirrored left to right.

    antialias: each pixel of an image made smaller is a mean of all old ones that it covers; without, of the four nearest old ones,
    as OpenCV's bilinear resize (MMDetection) and torchvision's detectors have it. Enlarging is the same in both.
    """

    size: int
    max_size: int
    flip: bool = False
    antialias: bool = True

    def __post_init__(self) -> None:
        _check_sizes((self.size,), self.max_size)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """The image's (height, width) for the network."""
        return keep_ratio_size(height, width, self.size, self.max_size)

    def __call__(
        self, image: Tensor, record: ImageAnnotations, masks: bool = False
    ) -> tuple[Tensor, tuple[float, float], Target]:
        """As `Train.__call__`, without chance."""
        return _apply(
            image, record, masks, size=self.network_size(*image.shape[1:]), flip=self.flip, antialias=self.antialias
        )


@dataclass(frozen=True)
class TrainTransform:
    """Photometric distortion, resize and horizontal flip.

    sizes, short sides of which one is drawn (resize="choice"), or the first and last of a range of integers
    (resize="range"); max_size, the most of the long side; flip, the probability of a horizontal flip; antialias as in `Eval`.
    A square canvas of s x s holds every image with sizes=[s], max_size=s.
    """

    sizes: Sequence[int]
    max_size: int
    _: KW_ONLY
    resize: Literal["choice", "range"] = "choice"
    flip: float = 0.5
    photometric: bool = False
    antialias: bool = True

    def __post_init__(self) -> None:
        _check_sizes(self.sizes, self.max_size)
        if self.resize not in ("choice", "range"):
            raise InputError(f"resize must be 'choice' or 'range', got {self.resize!r}")
        if self.resize == "range" and (len(self.sizes) != 2 or self.sizes[0] > self.sizes[1]):
            raise InputError(f"resize='range' needs the smallest and the largest short side, got {list(self.sizes)}")
        if not 0 <= self.flip <= 1:
            raise InputError(f"flip must be a probability in 0..1, got {self.flip}")

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """The image's (height, width) for the network, drawn from torch's global generator."""
        if self.resize == "range":
            short = int(torch.randint(self.sizes[0], self.sizes[1] + 1, ()))
        else:
            short = self.sizes[int(torch.randint(len(self.sizes), ()))]
        return keep_ratio_size(height, width, short, self.max_size)

    def __call__(
        self, image: Tensor, record: ImageAnnotations, masks: bool = False
    ) -> tuple[Tensor, tuple[float, float], Target]:
        """The image (3, H', W') uint8, its scale (x, y) in network pixels per original pixel, and its target.

        image (3, H, W) uint8. Boxes follow the image exactly and are clipped to it; objects without area inside it are
        left out; ignored objects go to `Target.ignore`. With masks=True, `Target.masks` (G, H', W') are the objects'
        segments. Raises InputError if the image's size is not the record's, or an object has no segment.
        """
        size = self.network_size(*image.shape[1:])
        flip = bool(torch.rand(()) < self.flip)
        if self.photometric:
            image = v2.RandomPhotometricDistort()(tv_tensors.Image(image))
        return _apply(image, record, masks, size=size, flip=flip, antialias=self.antialias)


def _check_sizes(sizes: Sequence[int], max_size: int) -> None:
    if not sizes or min(sizes) < 1:
        raise InputError(f"short sides must be positive pixels, got {list(sizes)}")
    if max_size < max(sizes):
        raise InputError(f"max_size must be at least the short side: it is {max_size}, the short side {max(sizes)}")


def _apply(
    image: Tensor, record: ImageAnnotations, masks: bool, *, size: tuple[int, int], flip: bool, antialias: bool
) -> tuple[Tensor, tuple[float, float], Target]:
    height, width = image.shape[1:]
    if (height, width) != (record.height, record.width):
        raise InputError(
            f"{record.path} is {width}x{height} pixels, but its annotation says {record.width}x{record.height}: correct the annotation"
        )
    boxes: Tensor = tv_tensors.BoundingBoxes(torch.from_numpy(record.boxes), format="XYXY", canvas_size=(height, width))
    image = F.resize(tv_tensors.Image(image), list(size), antialias=antialias)
    boxes = F.resize(boxes, list(size))
    if flip:
        image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
    boxes = F.clamp_bounding_boxes(boxes).as_subclass(Tensor).float()

    visible = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
    ignored = torch.from_numpy(record.ignore)
    kept = visible & ~ignored
    target = Target(
        boxes=boxes[kept],
        labels=torch.from_numpy(record.labels)[kept],
        masks=_masks(record, kept.nonzero()[:, 0].tolist(), size, flip) if masks else None,
        ignore=boxes[visible & ignored],
    )
    return image.as_subclass(Tensor), (size[1] / width, size[0] / height), target


def _masks(record: ImageAnnotations, kept: list[int], size: tuple[int, int], flip: bool) -> Tensor:
    """(G, H', W') bool, the segments of the objects that are kept."""
    if not kept:
        return torch.zeros(0, *size, dtype=torch.bool)
    full = torch.from_numpy(np.stack([decode_mask(record, i) for i in kept]))
    # as an image of G channels: torchvision resizes masks with "nearest", which shifts them by up to half a pixel
    small = F.resize(full, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return (F.horizontal_flip(small) if flip else small).bool()


def decode_mask(record: ImageAnnotations, i: int) -> np.ndarray:
    """(H, W) uint8 of object i."""
    segment: Any = record.segmentations[i]
    if not segment:
        raise InputError(f"{record.path}: object {i} has no segment, and masks were asked for")
    try:
        mask = coco_mask.decode(coco_mask.segmToRle(segment, record.width, record.height))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{record.path}: the segment of object {i} is neither polygons nor RLE ({error})") from error
    if mask.shape != (record.height, record.width):
        raise InputError(
            f"{record.path}: the segment of object {i} is {mask.shape} instead of {(record.height, record.width)}"
        )
    return mask
