"""Images and their targets to one batch, padded alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fusedet.data.dataset import ImageAnnotations
from fusedet.data.transforms import EvalTransform, Transform
from fusedet.types import MULTIPLE, Batch, Target


class Sample(NamedTuple):
    """An image ready for the network: image (3, H, W) uint8, scale (x, y), its id and its target."""

    image: Tensor
    scale: tuple[float, float]
    image_id: int
    target: Target | None = None


def collate_samples(samples: Sequence[Sample], canvas: tuple[int, int] = (1, 1)) -> Batch:
    """One batch, channels-last in memory, padded with zeros to multiples of 32 of the largest height and width.

    canvas (height, width) that the batch has at least, before rounding. Masks are padded like the images.
    """
    sizes = [tuple(s.image.shape[1:]) for s in samples]
    height, width = (-(-max(side) // MULTIPLE) * MULTIPLE for side in zip(canvas, *sizes))
    images = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for into, sample in zip(images, samples):
        h, w = sample.image.shape[1:]
        into[:, :h, :w] = sample.image
    return Batch(
        images=images,
        sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        ids=tuple(s.image_id for s in samples),
        scales=torch.tensor([s.scale for s in samples], dtype=torch.float32).reshape(-1, 2),
        targets=_joined([s.target for s in samples], height, width),
    )


def make_samples(
    image: Tensor, record: ImageAnnotations, transforms: Iterable[Transform], masks: bool = False
) -> list[Sample]:
    """An image (3, H, W) uint8 as each of the transforms gives it."""
    seen = [transform(image, record, masks) for transform in transforms]
    return [Sample(changed, scale, record.image_id, target) for changed, scale, target in seen]


def collate_views(
    images: Sequence[Sequence[Sample]], views: Sequence[EvalTransform] = (), canvas: tuple[int, int] = (1, 1)
) -> Batch:
    """One batch of images, each given by its samples: the first ones, and in `Batch.views` those of the further `views`."""
    first, *others = zip(*images, strict=True)
    seen = (replace(collate_samples(samples), flipped=view.flip) for samples, view in zip(others, views, strict=True))
    return replace(collate_samples(first, canvas), views=tuple(seen))


def _joined(targets: Sequence[Target | None], height: int, width: int) -> tuple[Target, ...] | None:
    """The targets as slices of one tensor per field, so that a worker sends few of them; masks padded to the canvas."""
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
    boxes, labels = _slices([t.boxes for t in known]), _slices([t.labels for t in known])
    ignore = _slices([t.boxes[:0] if t.ignore is None else t.ignore for t in known])
    return tuple(Target(*fields) for fields in zip(boxes, labels, masks, ignore))


def _slices(parts: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.cat(parts).split([len(part) for part in parts])
