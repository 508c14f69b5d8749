"""Data augmentation that changes the scale, cuts, turns or joins images: scale jitter, crop, mosaic and others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.labeled_image import LabeledImage
from fusedet.data.mixing import blend, join_quadrants, paste
from fusedet.data.transforms import TrainTransform, keep_ratio_size
from fusedet.errors import InputError
from fusedet.types import Target

ReadOther = Callable[[], tuple[Tensor, ImageAnnotations]]
"""Draws another image of the dataset, and returns it with its annotations."""

_ZOOM = 1.5  # by how much an image is at most enlarged beyond filling its part of a mosaic
_PASTED = 0.5  # the probability that an object is pasted


class _Plan(NamedTuple):
    """What is drawn before the image is known.

    Attributes:
        is_mosaic: Whether the image is joined with others.
        turns: Counter-clockwise right angles.
        window: (height, width) of what is cut out of the turned image.
        size: (height, width) for the network.
    """

    is_mosaic: bool
    turns: int
    window: tuple[int, int]
    size: tuple[int, int]


@dataclass(frozen=True)
class AugmentedTransform(TrainTransform):
    """Further data augmentation over that of `TrainTransform`.

    For each image, in this order: right angles, rotation and shear, crop, photometric distortion, resize, flip. Then
    mixup or copy-paste. A mosaic replaces crop and resize by its own. Leftovers follow `LabeledImage.to_target`.

    Attributes:
        scale_jitter: [least, most] factor of the resize to the first of `sizes` and `max_size`. Larger results are
            cropped to these sizes, at a random place (large-scale jittering, Ghiasi et al. 2021).
        crop: [least, most] share of each side that is cut out. The window holds a randomly chosen object as a whole,
            where any fits.
        rotate: Largest rotation to either side, in degrees.
        shear: Largest shear along x to either side, in degrees.
        right_angles: Whether images are turned by 0 to 3 right angles.
        mosaic: Probability of a mosaic. Each of four images fills its quadrant of a canvas of `sizes[0]` x `max_size`,
            enlarged by up to 1.5 and cut; the center lies in the inner half of each side.
        mixup: Probability of mixup with another image that fills the canvas; the weight is drawn from Beta(8, 8).
        copy_paste: Probability of copy-paste: each object of another image that fills the canvas is pasted with a
            probability of 1/2.
        min_visible: Share that a target shows at least; objects of which less is left become ignored regions.
        mixing_epochs: Number of epochs with mosaic and mixup; None: all.
        read_other: Draws another image; the loader sets it.
    """

    scale_jitter: tuple[float, float] | None = None
    crop: tuple[float, float] | None = None
    rotate: float = 0.0
    shear: float = 0.0
    right_angles: bool = False
    mosaic: float = 0.0
    mixup: float = 0.0
    copy_paste: float = 0.0
    min_visible: float = 0.25
    mixing_epochs: int | None = None
    read_other: ReadOther | None = None

    @property
    def needs_masks(self) -> bool:
        """Whether every object must have a segmentation."""
        return bool(self.rotate or self.shear or self.copy_paste)

    def check_dataset(self, dataset: DetectionDataset) -> None:
        """Raise InputError where objects lack the segmentation that an option needs."""
        if not self.needs_masks:
            return
        is_absent = (dataset.segmentations.offsets.diff() == 0) & ~dataset.ignore
        if count := int(is_absent.sum()):
            key = "copy_paste" if self.copy_paste else "rotate" if self.rotate else "shear"
            more = "" if self.copy_paste else ", or data.right_angles=true, which needs none"
            raise InputError(
                f"data.{key}={getattr(self, key):g} needs the mask of every object, but {count} of the "
                f"{len(dataset.labels)} objects of {dataset.source} have no segmentation: use data with masks{more}"
            )

    def in_epoch(self, epoch: int, read_other: ReadOther) -> Self:
        """Return the transform of an epoch, from 0, with its source of other images."""
        if self.mixing_epochs is None or epoch < self.mixing_epochs:
            return replace(self, read_other=read_other)
        return replace(self, read_other=read_other, mosaic=0.0, mixup=0.0)

    def network_size(self, height: int, width: int) -> tuple[int, int]:
        """Draw the image's (height, width) for the network from torch's global generator."""
        return self._plan(height, width).size

    def __call__(
        self, image: Tensor, annotations: ImageAnnotations, masks: bool = False
    ) -> tuple[Tensor, tuple[float, float], Target]:
        """Transform an image and its annotations; arguments and results are those of `TrainTransform`."""
        plan = self._plan(*image.shape[1:])
        load_masks = masks or self.needs_masks
        own = self._label(image, annotations, load_masks, plan.turns)
        if plan.is_mosaic:
            own = self._join(own, plan.size, load_masks)
        else:
            own = self._view(own, plan.window, plan.size, keeps_objects=self.crop is not None)
        if self.mixup and torch.rand(()) < self.mixup:
            share = float(torch.distributions.Beta(8.0, 8.0).sample())
            own = blend(own, self._fill(self._read(load_masks), plan.size), share)
        elif self.copy_paste and torch.rand(()) < self.copy_paste:
            own = self._paste(own, self._fill(self._read(load_masks), plan.size))
        scale = (plan.size[1] / plan.window[1], plan.size[0] / plan.window[0])
        return own.image.as_subclass(Tensor), scale, own.to_target(self.min_visible, masks)

    def _plan(self, height: int, width: int) -> _Plan:
        is_mosaic = bool(self.mosaic and torch.rand(()) < self.mosaic)
        turns = int(torch.randint(4, ())) if self.right_angles else 0
        if turns % 2:
            height, width = width, height
        canvas = (self.max_size, self.sizes[0]) if height > width else (self.sizes[0], self.max_size)
        if is_mosaic:
            return _Plan(True, turns, (height, width), canvas)
        window = (height, width)
        if self.crop:
            window = (max(1, round(height * _uniform(*self.crop))), max(1, round(width * _uniform(*self.crop))))
        if not self.scale_jitter:
            return _Plan(False, turns, window, super().network_size(*window))
        factor = _uniform(*self.scale_jitter)
        full = [max(1, round(side * factor)) for side in keep_ratio_size(*window, self.sizes[0], self.max_size)]
        size = (min(full[0], canvas[0]), min(full[1], canvas[1]))
        window = (max(1, round(height * size[0] / full[0])), max(1, round(width * size[1] / full[1])))
        return _Plan(False, turns, window, size)

    def _label(self, image: Tensor, annotations: ImageAnnotations, masks: bool, turns: int) -> LabeledImage:
        labeled = LabeledImage.load(image, annotations, masks)
        if turns:
            labeled = labeled.turn(turns)
        if self.rotate or self.shear:
            labeled = labeled.warp(_uniform(-self.rotate, self.rotate), _uniform(-self.shear, self.shear))
        return labeled

    def _view(
        self, labeled: LabeledImage, window: tuple[int, int], size: tuple[int, int], *, keeps_objects: bool
    ) -> LabeledImage:
        """Cut a window of that (height, width) out of an image, and resize, flip and distort it."""
        cut = labeled.crop(*_place_window(labeled, window, keeps_objects), *window)
        is_flipped = bool(torch.rand(()) < self.flip)
        if self.photometric:
            cut = replace(cut, image=v2.RandomPhotometricDistort()(tv_tensors.Image(cut.image)))
        resized = cut.resize(size, self.antialias)
        return resized.flip() if is_flipped else resized

    def _fill(self, labeled: LabeledImage, size: tuple[int, int]) -> LabeledImage:
        """Enlarge or shrink an image until it fills a (height, width), and cut off what is beyond."""
        scale = max(size[0] / labeled.size[0], size[1] / labeled.size[1]) * _uniform(1.0, _ZOOM)
        height, width = (min(side, max(1, round(new / scale))) for side, new in zip(labeled.size, size, strict=True))
        return self._view(labeled, (height, width), size, keeps_objects=True)

    def _read(self, masks: bool) -> LabeledImage:
        assert self.read_other is not None, "mosaic, mixup and copy-paste need the other images: use the loader"
        image, annotations = self.read_other()
        return self._label(image, annotations, masks, int(torch.randint(4, ())) if self.right_angles else 0)

    def _join(self, labeled: LabeledImage, size: tuple[int, int], masks: bool) -> LabeledImage:
        parts = [labeled, *(self._read(masks) for _ in range(3))]
        top, left = (max(1, round(side * _uniform(0.25, 0.75))) for side in size)
        bottom, right = size[0] - top, size[1] - left
        quadrants = ((top, left), (top, right), (bottom, left), (bottom, right))
        order = torch.randperm(4).tolist()
        return join_quadrants([self._fill(parts[i], quadrant) for i, quadrant in zip(order, quadrants, strict=True)])

    def _paste(self, labeled: LabeledImage, other: LabeledImage) -> LabeledImage:
        """Paste some of the objects that are visible enough."""
        is_chosen = (torch.rand(len(other.labels)) < _PASTED) & ~other.ignore & (other.visible >= self.min_visible)
        return paste(labeled, other.select(is_chosen)) if bool(is_chosen.any()) else labeled


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _place_window(labeled: LabeledImage, window: tuple[int, int], keeps_objects: bool) -> tuple[int, int]:
    """Draw (top, left) of a window inside an image.

    With `keeps_objects` it holds one of the objects that fit into it, drawn at random. Where none fits, it lies as far
    as possible inside one of the others.
    """
    if window == labeled.size:
        return 0, 0
    free = [side - part for side, part in zip(labeled.size, window, strict=True)]
    low, high = [0, 0], free
    boxes = labeled.boxes.as_subclass(Tensor)[~labeled.ignore]
    if keeps_objects and len(boxes):
        begin, end = boxes[:, [1, 0]].floor(), boxes[:, [3, 2]].ceil()
        fits = ((end - begin) <= torch.tensor(window)).all(1).nonzero()[:, 0]
        candidates = fits if len(fits) else torch.arange(len(boxes))
        i = candidates[int(torch.randint(len(candidates), ()))]
        bounds = [sorted(pair) for pair in zip((end[i] - torch.tensor(window)).tolist(), begin[i].tolist())]
        low = [min(most, max(0, int(pair[0]))) for pair, most in zip(bounds, free)]
        high = [min(most, max(0, int(pair[1]))) for pair, most in zip(bounds, free)]
    top, left = (int(torch.randint(a, b + 1, ())) for a, b in zip(low, high))
    return top, left
