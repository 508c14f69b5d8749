"""Transforms of an image and its annotations: keep-ratio resize, horizontal flip, photometric distortion."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from fusedet.data.dataset import ImageAnnotations
from fusedet.data.large_images import LargeImage, resize_image
from fusedet.errors import InputError
from fusedet.types import Target

MIN_SIDE = 1e-3
"""Annotations with a narrower or lower visible part, in network pixels, are dropped."""


class Transform(Protocol):
    """A transform of the loader; it draws from torch's global generator only, and `network_size` draws first."""

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the image's (height, width) for the network."""
        ...

    def __call__(
        self, image: Tensor, annotations: ImageAnnotations, masks: bool = False
    ) -> tuple[Tensor, tuple[float, float], Target]:
        """Return the image, its scale (x, y) and its target, in network pixels."""
        ...


def keep_ratio_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Return the largest (height, width) of the same aspect ratio with sides of at most `short` and `long`.

    Rounded as by MMDetection's Resize(keep_ratio=True).
    """
    scale = min(long / max(height, width), short / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


@dataclass(frozen=True)
class EvalTransform:
    """Deterministic resize, with an optional horizontal flip.

    Attributes:
        size: Maximum of the short side, in pixels.
        max_size: Maximum of the long side, in pixels.
        flip: Whether to flip the image horizontally.
        antialias: Whether a pixel of a smaller image is the mean of all pixels that it covers. Without, it is
            interpolated from the four nearest, as in OpenCV's bilinear resize (MMDetection) and torchvision's
            detectors. Enlarging is the same in both.
    """

    size: int
    max_size: int
    flip: bool = False
    antialias: bool = True

    def __post_init__(self) -> None:
        _check_sizes((self.size,), self.max_size)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Return the image's (height, width) for the network."""
        return keep_ratio_size(height, width, self.size, self.max_size)

    def __call__(
        self, image: Tensor | LargeImage, annotations: ImageAnnotations, masks: bool = False
    ) -> tuple[Tensor, tuple[float, float], Target]:
        """Transform an image as `TrainTransform` does, without data augmentation."""
        return _apply(
            image,
            annotations,
            masks,
            size=self.network_size(*image.shape[1:]),
            flip=self.flip,
            antialias=self.antialias,
        )


@dataclass(frozen=True)
class TrainTransform:
    """Data augmentation: photometric distortion, random resize and random horizontal flip.

    With sizes=[s] and max_size=s, every image fits a square canvas of s x s.

    Attributes:
        sizes: Maxima of the short side, in pixels: one is drawn (resize="choice"), or they are the first and last of a
            range of integers (resize="range").
        max_size: Maximum of the long side, in pixels.
        resize: "choice" or "range".
        flip: Probability of a horizontal flip, in 0..1.
        photometric: Whether to apply torchvision's RandomPhotometricDistort.
        antialias: As in `EvalTransform`.

    Raises:
        InputError: A short side is below 1 pixel or above `max_size`, `resize` is neither of its values, "range" has
            not two ascending sizes, or `flip` is no probability.
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
        """Draw the image's (height, width) for the network from torch's global generator."""
        if self.resize == "range":
            short = int(torch.randint(self.sizes[0], self.sizes[1] + 1, ()))
        else:
            short = self.sizes[int(torch.randint(len(self.sizes), ()))]
        return keep_ratio_size(height, width, short, self.max_size)

    def __call__(
        self, image: Tensor, annotations: ImageAnnotations, masks: bool = False
    ) -> tuple[Tensor, tuple[float, float], Target]:
        """Transform an image and its annotations.

        Boxes follow the image exactly and are clipped to it. Annotations without a visible area are dropped; ignored
        annotations become `Target.ignore`.

        Args:
            image: (3, H, W) uint8.
            annotations: The image's annotations.
            masks: Whether the target has `Target.masks` (G, H', W').

        Returns:
            The image (3, H', W') uint8, its scale (x, y) in network pixels per original pixel, and its target.

        Raises:
            InputError: The image is not of the annotated size, or an annotation has no valid segmentation for its mask.
        """
        size = self.network_size(*image.shape[1:])
        flip = bool(torch.rand(()) < self.flip)
        if self.photometric:
            image = v2.RandomPhotometricDistort()(tv_tensors.Image(image))
        return _apply(image, annotations, masks, size=size, flip=flip, antialias=self.antialias)


def _check_sizes(sizes: Sequence[int], max_size: int) -> None:
    if not sizes or min(sizes) < 1:
        raise InputError(f"short sides must be positive pixels, got {list(sizes)}")
    if max_size < max(sizes):
        raise InputError(f"max_size must be at least the short side: it is {max_size}, the short side {max(sizes)}")


def check_image_size(path: Path, actual: Sequence[int], annotated: Sequence[int]) -> None:
    """Raise InputError where the (height, width) of an image is not the annotated one."""
    if tuple(actual) != tuple(annotated):
        raise InputError(
            f"{path} is {actual[1]}x{actual[0]} pixels, but its annotation says {annotated[1]}x{annotated[0]}: "
            "correct the annotation"
        )


def _apply(
    image: Tensor | LargeImage,
    annotations: ImageAnnotations,
    masks: bool,
    *,
    size: tuple[int, int],
    flip: bool,
    antialias: bool,
) -> tuple[Tensor, tuple[float, float], Target]:
    height, width = image.shape[1:]
    check_image_size(annotations.path, (height, width), (annotations.height, annotations.width))
    boxes: Tensor = tv_tensors.BoundingBoxes(
        torch.from_numpy(annotations.boxes), format="XYXY", canvas_size=(height, width)
    )
    pixels = resize_image(image, size, antialias)
    boxes = F.resize(boxes, list(size))
    if flip:
        pixels, boxes = F.horizontal_flip(pixels), F.horizontal_flip(boxes)
    boxes = F.clamp_bounding_boxes(boxes).as_subclass(Tensor).float()

    visible = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_SIDE).all(1)
    ignored = torch.from_numpy(annotations.ignore)
    kept = visible & ~ignored
    target = Target(
        boxes=boxes[kept],
        labels=torch.from_numpy(annotations.labels)[kept],
        masks=_masks(annotations, kept.nonzero()[:, 0].tolist(), size, flip) if masks else None,
        ignore=boxes[visible & ignored],
    )
    return pixels.as_subclass(Tensor), (size[1] / width, size[0] / height), target


def _masks(annotations: ImageAnnotations, kept: list[int], size: tuple[int, int], flip: bool) -> Tensor:
    """Decode and resize the masks of the kept annotations, (G, H', W') bool."""
    if not kept:
        return torch.zeros(0, *size, dtype=torch.bool)
    full = torch.from_numpy(np.stack([decode_mask(annotations, i) for i in kept]))
    # as an image of G channels: torchvision resizes masks with "nearest", which shifts them by up to half a pixel
    small = F.resize(full, list(size), interpolation=InterpolationMode.NEAREST_EXACT)
    return (F.horizontal_flip(small) if flip else small).bool()


def decode_mask(annotations: ImageAnnotations, i: int) -> np.ndarray:
    """Decode the segmentation of annotation i as (H, W) uint8; raises InputError where it is absent or malformed."""
    segmentation: Any = annotations.segmentations[i]
    if not segmentation:
        raise InputError(f"{annotations.path}: annotation {i} has no segmentation, but masks are needed")
    tile = annotations.tile
    height, width = (tile.image_height, tile.image_width) if tile else (annotations.height, annotations.width)
    try:
        mask = coco_mask.decode(coco_mask.segmToRle(segmentation, width, height))
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise InputError(
            f"{annotations.path}: the segmentation of annotation {i} is neither polygons nor an RLE ({error})"
        ) from error
    if mask.shape != (height, width):
        raise InputError(
            f"{annotations.path}: the segmentation of annotation {i} is {mask.shape} instead of {(height, width)}"
        )
    if tile:
        # a copy, so that the mask of the whole image is freed
        mask = mask[tile.top : tile.top + annotations.height, tile.left : tile.left + annotations.width].copy()
    return mask
