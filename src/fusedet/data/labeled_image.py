"""An image with its boxes and masks in torchvision's types, and the geometric operations that all of them follow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from fusedet.data.dataset import ImageAnnotations
from fusedet.data.transforms import MIN_SIDE, check_image_size, decode_mask
from fusedet.types import Target

MIN_LEFTOVER = 1.0
"""Objects that are narrower or lower after data augmentation, in network pixels, are dropped."""
FILL = 114
"""The gray of pixels that a rotation or shear brings in from outside the image."""


@dataclass(frozen=True)
class LabeledImage:
    """An image and its G objects.

    Attributes:
        image: (C, H, W) uint8.
        boxes: (G, 4) float64 xyxy in pixels, clipped to the image.
        labels: (G,) int64.
        ignore: (G,) bool, neither positive nor negative in training.
        visible: (G,) float64, the share of each object that the operations so far have left, in 0..1.
        masks: (G, H, W) uint8 of 0 and 1, empty for ignored objects without a segmentation; or None.
    """

    image: tv_tensors.Image
    boxes: tv_tensors.BoundingBoxes
    labels: Tensor
    ignore: Tensor
    visible: Tensor
    masks: tv_tensors.Mask | None = None

    @classmethod
    def load(cls, image: Tensor, annotations: ImageAnnotations, masks: bool) -> LabeledImage:
        """Wrap a decoded image and its annotations, of which those without a visible area are dropped.

        Raises:
            InputError: The image is not of the annotated size, or an annotation has no valid segmentation for its mask.
        """
        height, width = image.shape[1:]
        check_image_size(annotations.path, (height, width), (annotations.height, annotations.width))
        ignore = torch.from_numpy(annotations.ignore)
        decoded = None
        if masks:
            full = np.zeros((len(ignore), height, width), dtype=np.uint8)
            for i, is_ignored in enumerate(ignore.tolist()):
                if not is_ignored or annotations.segmentations[i]:
                    full[i] = decode_mask(annotations, i)
            decoded = tv_tensors.Mask(torch.from_numpy(full))
        boxes = to_boxes(torch.from_numpy(annotations.boxes).clone(), (height, width))
        labels = torch.from_numpy(annotations.labels)
        visible = torch.ones(len(labels), dtype=torch.float64)
        return cls(tv_tensors.Image(image), clamp(boxes), labels, ignore, visible, decoded).without_empty()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.image.shape[1:]
        return height, width

    def select(self, keep: Tensor) -> LabeledImage:
        """Return the image with some of its objects, by index or as booleans."""
        masks = None if self.masks is None else tv_tensors.Mask(self.masks[keep])
        boxes = to_boxes(self.boxes[keep], self.size)
        return replace(
            self,
            boxes=boxes,
            labels=self.labels[keep],
            ignore=self.ignore[keep],
            visible=self.visible[keep],
            masks=masks,
        )

    def without_empty(self) -> LabeledImage:
        """Drop the objects without a visible area."""
        has_area = ((self.boxes[:, 2:] - self.boxes[:, :2]) >= MIN_SIDE).all(1).as_subclass(Tensor)
        return self if bool(has_area.all()) else self.select(has_area)

    def crop(self, top: int, left: int, height: int, width: int) -> LabeledImage:
        """Cut out a window, and drop the objects outside of it.

        Args:
            top: First row, in pixels.
            left: First column, in pixels.
            height: Height of the window, in pixels.
            width: Width of the window, in pixels.

        Returns:
            The window; boxes are clipped to it, and `visible` is what is left of each object.
        """
        if (top, left, height, width) == (0, 0, *self.size):
            return self
        before = area(self.boxes)
        boxes = clamp(F.crop(self.boxes, top, left, height, width))
        masks = None if self.masks is None else F.crop(self.masks, top, left, height, width)
        visible = self.visible * area(boxes) / before
        # one block of memory, channels last: resizing a view is slower, and leaves the channels apart
        part = F.crop(self.image, top, left, height, width).as_subclass(Tensor)
        image = tv_tensors.Image(part.permute(1, 2, 0).contiguous().permute(2, 0, 1))
        return replace(self, image=image, boxes=boxes, visible=visible, masks=masks).without_empty()

    def resize(self, size: tuple[int, int], antialias: bool) -> LabeledImage:
        """Resize to (height, width); masks take the value of the nearest pixel."""
        masks = self.masks
        if masks is not None and len(masks):
            # as an image of G channels: torchvision resizes masks with "nearest", which shifts them by half a pixel
            plain = masks.as_subclass(Tensor)
            masks = tv_tensors.Mask(F.resize(plain, list(size), interpolation=InterpolationMode.NEAREST_EXACT))
        elif masks is not None:
            masks = tv_tensors.Mask(masks.new_zeros(0, *size))
        image = F.resize(self.image, list(size), antialias=antialias)
        return replace(self, image=image, boxes=F.resize(self.boxes, list(size)), masks=masks)

    def flip(self) -> LabeledImage:
        """Flip horizontally."""
        masks = None if self.masks is None else F.horizontal_flip(self.masks)
        return replace(self, image=F.horizontal_flip(self.image), boxes=F.horizontal_flip(self.boxes), masks=masks)

    def turn(self, turns: int) -> LabeledImage:
        """Turn counter-clockwise by as many right angles."""
        turns %= 4
        height, width = self.size
        size = (width, height) if turns % 2 else (height, width)
        x1, y1, x2, y2 = self.boxes.as_subclass(Tensor).unbind(1)
        corners = (
            (x1, y1, x2, y2),
            (y1, width - x2, y2, width - x1),
            (width - x2, height - y2, width - x1, height - y1),
            (height - y2, x1, height - y1, x2),
        )[turns]
        masks = None if self.masks is None else tv_tensors.Mask(torch.rot90(self.masks, turns, (1, 2)))
        image = tv_tensors.Image(torch.rot90(self.image, turns, (1, 2)))
        return replace(self, image=image, boxes=to_boxes(torch.stack(corners, dim=1), size), masks=masks)

    def warp(self, angle: float, shear: float) -> LabeledImage:
        """Rotate clockwise about the center and shear along x, both in degrees; the size stays.

        A box becomes that of the warped mask. An ignored object without a mask gets the bounds of its warped box.
        """
        assert self.masks is not None, "boxes of warped objects come from their masks"
        masks = _warp(self.masks, angle, shear, InterpolationMode.NEAREST, 0)
        loose = F.affine(self.boxes, angle, [0, 0], 1.0, [shear, 0])
        before = count_pixels(self.masks)
        boxes = torch.where((before > 0)[:, None], mask_bounds(masks), clamp(loose).as_subclass(Tensor))
        share = torch.where(before > 0, count_pixels(masks) / before.clamp(min=1), torch.ones(len(before)))
        image = _warp(self.image, angle, shear, InterpolationMode.BILINEAR, FILL)
        return replace(
            self,
            image=tv_tensors.Image(image),
            boxes=to_boxes(boxes, self.size),
            visible=self.visible * share,
            masks=tv_tensors.Mask(masks),
        ).without_empty()

    def to_target(self, min_visible: float, masks: bool) -> Target:
        """Return the objects as a target.

        An object narrower or lower than `MIN_LEFTOVER` is dropped. One of which less than `min_visible` is visible
        becomes an ignored region.

        Args:
            min_visible: The share that a target shows at least, in 0..1.
            masks: Whether the target has `Target.masks`.
        """
        boxes = self.boxes.as_subclass(Tensor).float()
        is_large = ((boxes[:, 2:] - boxes[:, :2]) >= MIN_LEFTOVER).all(1)
        ignored = self.ignore | (self.visible < min_visible)
        kept = is_large & ~ignored
        own = None
        if masks:
            assert self.masks is not None, "masks were not loaded"
            own = self.masks.as_subclass(Tensor)[kept].bool()
        return Target(boxes=boxes[kept], labels=self.labels[kept], masks=own, ignore=boxes[is_large & ignored])


def to_boxes(boxes: Tensor, size: tuple[int, int]) -> tv_tensors.BoundingBoxes:
    """Wrap (G, 4) xyxy as boxes of an image of that (height, width)."""
    return tv_tensors.BoundingBoxes(boxes.as_subclass(Tensor), format="XYXY", canvas_size=size)


def clamp(boxes: tv_tensors.BoundingBoxes) -> tv_tensors.BoundingBoxes:
    """Clip boxes to their image."""
    return F.clamp_bounding_boxes(boxes)


def area(boxes: Tensor) -> Tensor:
    """Return the areas (G,) of boxes; 0 for an empty one."""
    plain = boxes.as_subclass(Tensor)
    return (plain[:, 2:] - plain[:, :2]).clamp(min=0).prod(1)


def count_pixels(masks: Tensor) -> Tensor:
    """Count the pixels (G,) of masks (G, H, W) of 0 and 1; many times as fast as torch's sum of bytes."""
    return torch.tensor([np.count_nonzero(mask) for mask in _to_bool(masks)], dtype=torch.int64)


def mask_bounds(masks: Tensor) -> Tensor:
    """Return the boxes (G, 4) float64 that enclose masks (G, H, W) of 0 and 1; zeros for an empty one."""
    occupied = _to_bool(masks)
    bounds = []
    for axis in (1, 2):  # columns (G, W), rows (G, H)
        line = np.asarray(occupied.any(axis=axis))
        bounds.append((line.argmax(axis=1), line.shape[1] - line[:, ::-1].argmax(axis=1)))
    (left, right), (top, bottom) = bounds
    is_drawn = np.asarray(occupied.any(axis=(1, 2)))
    boxes = np.stack([left, top, right, bottom], axis=1) * is_drawn[:, None]
    return torch.from_numpy(boxes.astype(np.float64))


def _to_bool(masks: Tensor) -> np.ndarray:
    return np.asarray(masks.as_subclass(Tensor).contiguous().numpy().view(np.bool_))


def _warp(channels: Tensor, angle: float, shear: float, interpolation: InterpolationMode, fill: int) -> Tensor:
    """Warp channels (C, H, W) uint8 one by one, as Pillow's images.

    torchvision warps many masks faster so than in one tensor, and the colors of an image alike.
    """
    warped = [
        np.asarray(
            F.affine(Image.fromarray(channel), angle, [0, 0], 1.0, [shear, 0], interpolation=interpolation, fill=[fill])
        )
        for channel in channels.contiguous().as_subclass(Tensor).numpy()
    ]
    return torch.from_numpy(np.stack(warped)) if warped else channels.as_subclass(Tensor)
