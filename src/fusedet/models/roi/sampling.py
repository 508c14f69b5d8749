"""Which proposals a stage learns from: assigned by overlap, objects themselves added, sampled (Fast R-CNN, 2015, 2.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusedet.models.ops.assigners import IGNORED, MaxIoU, objects
from fusedet.models.ops.samplers import Sampler
from fusedet.types import Proposals, Target


@dataclass(frozen=True)
class RoISamples:
    """Regions of a batch to learn from, image by image.

    rois (S, 5), the image's number and a box in pixels; owners (S,) int64, the object's index within its image, -1 background;
    image (S,) int64; added (S,) bool, the region is an object's own box.
    """

    rois: Tensor
    owners: Tensor
    image: Tensor
    added: Tensor | None = None

    @cached_property
    def positive(self) -> Tensor:
        """The rows (R,) of those that answer for an object; the first look waits for a GPU."""
        return (self.owners >= 0).nonzero().squeeze(1)

    def objects(self, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """Boxes (R, 4) and labels (R,) of the positive ones' objects."""
        return objects(targets, self.image[self.positive], self.owners[self.positive])


class MatchedProposals(NamedTuple):
    """The objects' own boxes, then the proposals of a batch: boxes (N, P, 4), owners (N, P), -1 background and -2 padding, overlaps
    (N, P) with the nearest object, -1 for padding; objects, how many of P are places of objects."""

    boxes: Tensor
    owners: Tensor
    overlaps: Tensor
    objects: int


@torch.no_grad()
def match_proposals(proposals: Proposals, targets: Sequence[Target], positive: float | Tensor) -> MatchedProposals:
    """Proposals, with the objects added, that overlap an object by `positive` or more are its own."""
    assigner = MaxIoU(positive, positive, low_quality=False)
    found = [assigner.match(boxes, target) for boxes, target in zip(proposals.boxes.unbind(), targets, strict=True)]
    owners, overlaps = (torch.stack(column) for column in zip(*found))  # (N, R)
    real = torch.arange(owners.shape[1], device=owners.device) < proposals.counts[:, None]
    objects = pad_sequence([t.boxes.to(proposals.boxes.dtype) for t in targets], batch_first=True)  # (N, G, 4)
    numbers = torch.arange(objects.shape[1], device=owners.device)
    present = numbers < torch.tensor([len(t) for t in targets], device=owners.device)[:, None]
    return MatchedProposals(
        torch.cat([objects, proposals.boxes], dim=1),
        torch.cat([torch.where(present, numbers, IGNORED), torch.where(real, owners, IGNORED)], dim=1),
        torch.cat([2.0 * present - 1, torch.where(real, overlaps, -1)], dim=1),
        objects.shape[1],
    )


@torch.no_grad()
def sample_rois(matched: MatchedProposals, sampler: Sampler) -> RoISamples:
    """A random choice of them."""
    image, place = sampler.sample(matched.owners, matched.overlaps).nonzero(as_tuple=True)  # (S,); a GPU is waited for
    boxes = matched.boxes[image, place]
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    return RoISamples(rois, matched.owners[image, place], image, place < matched.objects)


def pad_to_proposals(boxes: Tensor, image: Tensor, images: int) -> Proposals:
    """Boxes (S, 4) of image (S,), in order, as the proposals of a batch of `images`."""
    counts = torch.bincount(image, minlength=images)
    padded = pad_sequence(boxes.split(counts.tolist()), batch_first=True)
    return Proposals(padded, padded.new_zeros(padded.shape[:2]), counts)
