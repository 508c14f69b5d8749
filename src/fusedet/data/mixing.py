"""Training images made of several: mosaic, mixup and copy-paste."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from fusedet.data.labeled_image import LabeledImage, count_pixels, mask_bounds, to_boxes


def join_quadrants(parts: Sequence[LabeledImage]) -> LabeledImage:
    """Join four images into one.

    Args:
        parts: The images at the top left, top right, bottom left and bottom right; neighbors have the same height or
            width.

    References:
        Bochkovskiy et al., YOLOv4: Optimal Speed and Accuracy of Object Detection, 2020, section 3.3.
    """
    (top, left), (bottom, right) = parts[0].size, parts[3].size
    size = (top + bottom, left + right)
    image = torch.empty(*size, len(parts[0].image), dtype=torch.uint8).permute(2, 0, 1)
    placed = []
    for part, (y, x) in zip(parts, ((0, 0), (0, left), (top, 0), (top, left)), strict=True):
        height, width = part.size
        image[:, y : y + height, x : x + width] = part.image
        boxes = to_boxes(part.boxes.as_subclass(Tensor) + torch.tensor([x, y, x, y]), size)
        padding = [x, y, size[1] - x - width, size[0] - y - height]
        masks = None if part.masks is None else F.pad(part.masks, padding)
        placed.append(replace(part, boxes=boxes, masks=masks))
    return _join_objects(placed, image)


def blend(first: LabeledImage, second: LabeledImage, share: float) -> LabeledImage:
    """Blend two images of one size, rounded down; the objects of both are targets.

    Args:
        first: An image.
        second: The other one.
        share: The weight of the first, in 0..1.

    References:
        Zhang et al., Bag of Freebies for Training Object Detection Neural Networks, 2019, section 3.1.
    """
    height, width = first.size
    below, above = (
        Image.fromarray(part.image.as_subclass(Tensor).permute(1, 2, 0).contiguous().view(height, -1).numpy())
        for part in (first, second)
    )  # any number of channels side by side, as one gray image: Pillow blends bytes without floating-point copies
    pixels = torch.from_numpy(np.array(Image.blend(below, above, 1 - share)))
    return _join_objects((first, second), pixels.view(height, width, -1).permute(2, 0, 1))


def paste(onto: LabeledImage, source: LabeledImage) -> LabeledImage:
    """Paste all objects of an image by their masks onto another of the same size.

    Covered pixels leave the masks of the objects below. An object that loses pixels gets the box of what remains.

    References:
        Ghiasi et al., Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation, CVPR 2021.
    """
    assert onto.masks is not None, "objects are pasted by their masks"
    assert source.masks is not None, "objects are pasted by their masks"
    pasted = source.masks.as_subclass(Tensor).bool().any(0)
    image = torch.where(pasted, source.image.as_subclass(Tensor), onto.image.as_subclass(Tensor))
    masks = onto.masks.as_subclass(Tensor)
    remaining = masks * ~pasted
    before, after = count_pixels(masks), count_pixels(remaining)
    is_covered = after < before
    boxes = torch.where(is_covered[:, None], mask_bounds(remaining), onto.boxes.as_subclass(Tensor))
    below = replace(
        onto,
        boxes=to_boxes(boxes, onto.size),
        visible=onto.visible * torch.where(is_covered, after / before.clamp(min=1), torch.ones(len(before))),
        masks=tv_tensors.Mask(remaining),
    )
    return _join_objects((below.without_empty(), source), image)


def _join_objects(parts: Sequence[LabeledImage], image: Tensor) -> LabeledImage:
    """Return an image with the objects of several of its size."""
    size = (image.shape[1], image.shape[2])
    masks = [part.masks for part in parts if part.masks is not None]
    return LabeledImage(
        image=tv_tensors.Image(image),
        boxes=to_boxes(torch.cat([part.boxes.as_subclass(Tensor) for part in parts]), size),
        labels=torch.cat([part.labels for part in parts]),
        ignore=torch.cat([part.ignore for part in parts]),
        visible=torch.cat([part.visible for part in parts]),
        masks=tv_tensors.Mask(torch.cat(masks)) if len(masks) == len(parts) else None,
    )
