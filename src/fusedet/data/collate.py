"""Collation of images and targets into one padded batch."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedet.data.dataset import ImageAnnotations
from fusedet.data.transforms import EvalTransform, Transform
from fusedet.types import MULTIPLE, Batch, Target


class Sample(NamedTuple):
    """An image as the network's input.

    Attributes:
        image: (3, H, W) uint8.
        scale: (x, y) network pixels per original pixel.
        image_id: The image's id in the dataset.
        target: The annotations in network pixels, if known.
    """

    image: Tensor
    scale: tuple[float, float]
    image_id: int
    target: Target | None = None


def collate_samples(samples: Sequence[Sample], canvas: tuple[int, int] = (1, 1)) -> Batch:
    """Collate samples into a batch, padded with zeros to multiples of 32 of the largest height and width.

    Masks are padded like the images. The images are channels-last in memory.

    Args:
        samples: The samples.
        canvas: Minimum (height, width) of the batch, before rounding up.
    """
    sizes = [tuple(s.image.shape[1:]) for s in samples]
    height, width = (-(-max(side) // MULTIPLE) * MULTIPLE for side in zip(canvas, *sizes))
    channels = len(samples[0].image)
    images = torch.zeros(len(samples), height, width, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
    for into, sample in zip(images, samples):
        h, w = sample.image.shape[1:]
        into[:, :h, :w] = sample.image
    return Batch(
        images=images,
        sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        ids=tuple(s.image_id for s in samples),
        scales=torch.tensor([s.scale for s in samples], dtype=torch.float32).reshape(-1, 2),
        targets=_join_targets([s.target for s in samples], height, width),
    )


def make_samples(
    image: Any, annotations: ImageAnnotations, transforms: Iterable[Transform], masks: bool = False
) -> list[Sample]:
    """Apply each transform to an image.

    Args:
        image: (3, H, W) uint8; transforms of evaluation take a `LargeImage` too.
        annotations: Of the image.
        transforms: One per sample.
        masks: Whether targets have masks.
    """
    results = [transform(image, annotations, masks) for transform in transforms]
    return [Sample(changed, scale, annotations.image_id, target) for changed, scale, target in results]


def collate_tta_samples(
    images: Sequence[Sequence[Sample]], tta_transforms: Sequence[EvalTransform] = (), canvas: tuple[int, int] = (1, 1)
) -> Batch:
    """Collate images and their copies of test-time augmentation.

    Args:
        images: The samples of each image, one per copy.
        tta_transforms: The transforms of the further copies; their batches become `Batch.tta_batches`.
        canvas: Minimum (height, width) of the first copy's batch, before rounding up.
    """
    first, *further = zip(*images, strict=True)
    batches = (
        replace(collate_samples(samples), flipped=transform.flip)
        for samples, transform in zip(further, tta_transforms, strict=True)
    )
    return replace(collate_samples(first, canvas), tta_batches=tuple(batches))


def _join_targets(targets: Sequence[Target | None], height: int, width: int) -> tuple[Target, ...] | None:
    """Slice the targets from one tensor per field, so that a worker sends few tensors; masks are padded."""
    known = [target for target in targets if target is not None]
    if not known:
        return None
    masks: Sequence[Tensor | None] = [None] * len(known)
    own = [t.masks for t in known if t.masks is not None]
    if len(own) == len(known):
        padded = torch.zeros(sum(map(len, own)), height, width, dtype=torch.bool).split([len(m) for m in own])
        for canvas, mask in zip(padded, own):
            canvas[:, : mask.shape[1], : mask.shape[2]] = mask
        masks = padded
    boxes, labels = _concatenate([t.boxes for t in known]), _concatenate([t.labels for t in known])
    ignore = _concatenate([t.boxes[:0] if t.ignore is None else t.ignore for t in known])
    return tuple(Target(*fields) for fields in zip(boxes, labels, masks, ignore))


def _concatenate(parts: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.cat(parts).split([len(part) for part in parts])
