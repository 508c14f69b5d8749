"""Training samples of an RoI stage: proposals and ground-truth boxes, assigned by IoU, then sampled.

References:
    "Fast R-CNN", Girshick, 2015, section 2.3.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fusedet.models.ops.assigners import IGNORED, MaxIoUAssigner, gather_instances
from fusedet.models.ops.samplers import Sampler
from fusedet.types import Proposals, Target


@dataclass(frozen=True)
class RoISamples:
    """RoIs of a batch that a stage is trained on, ordered by image.

    Attributes:
        rois: (S, 5), index of the image in the batch, then a box.
        instances: (S,) int64, index of the ground-truth instance within its image, -1 for background.
        image: (S,) int64, index of the image in the batch.
        is_ground_truth: (S,) bool, whether the box is that of an instance itself.
    """

    rois: Tensor
    instances: Tensor
    image: Tensor
    is_ground_truth: Tensor | None = None

    @cached_property
    def positive(self) -> Tensor:
        """(R,) int64: indices of the positive samples. The first access synchronizes with the GPU."""
        return (self.instances >= 0).nonzero().squeeze(1)

    def gather(self, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """Gather the positive samples' instances: their boxes (R, 4) and labels (R,)."""
        return gather_instances(targets, self.image[self.positive], self.instances[self.positive])


class MatchedProposals(NamedTuple):
    """The ground-truth boxes of every image, then its proposals, padded to P.

    Attributes:
        boxes: (N, P, 4).
        instances: (N, P), index of the assigned instance, -1 for background, -2 for padding.
        overlaps: (N, P), largest IoU with an instance, -1 for padding.
        num_ground_truth: How many of the P boxes are ground truth.
    """

    boxes: Tensor
    instances: Tensor
    overlaps: Tensor
    num_ground_truth: int


@torch.no_grad()
def match_proposals(
    proposals: Proposals, targets: Sequence[Target], positive: float | Tensor, ground_truth: bool = True
) -> MatchedProposals:
    """Assign each proposal to the instance of its largest IoU.

    Args:
        proposals: Of the images.
        targets: Of each image.
        positive: Least IoU of a positive, in 0..1, a number or a tensor ().
        ground_truth: Whether the ground-truth boxes are put before the proposals.
    """
    assigner = MaxIoUAssigner(positive, positive, low_quality=False)
    matches = [
        assigner.match_boxes(boxes, target) for boxes, target in zip(proposals.boxes.unbind(), targets, strict=True)
    ]
    instances, overlaps = (torch.stack(column) for column in zip(*matches))  # (N, R)
    real = torch.arange(instances.shape[1], device=instances.device) < proposals.counts[:, None]
    instances, overlaps = torch.where(real, instances, IGNORED), torch.where(real, overlaps, -1)
    if not ground_truth:
        return MatchedProposals(proposals.boxes, instances, overlaps, 0)
    gt_boxes = pad_sequence([t.boxes.to(proposals.boxes.dtype) for t in targets], batch_first=True)  # (N, G, 4)
    gt_index = torch.arange(gt_boxes.shape[1], device=instances.device)
    gt_real = pad_sequence([torch.ones_like(t.labels, dtype=torch.bool) for t in targets], batch_first=True)  # (N, G)
    return MatchedProposals(
        torch.cat([gt_boxes, proposals.boxes], dim=1),
        torch.cat([torch.where(gt_real, gt_index, IGNORED), instances], dim=1),
        torch.cat([2.0 * gt_real - 1, overlaps], dim=1),
        gt_boxes.shape[1],
    )


@torch.no_grad()
def sample_rois(matched: MatchedProposals, sampler: Sampler) -> RoISamples:
    """Draw a random sample of the matched boxes; synchronizes with the GPU."""
    image, column = sampler.sample(matched.instances, matched.overlaps).nonzero(as_tuple=True)  # (S,)
    boxes = matched.boxes[image, column]
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    return RoISamples(rois, matched.instances[image, column], image, column < matched.num_ground_truth)


def pad_to_proposals(boxes: Tensor, image: Tensor, images: int) -> Proposals:
    """Pad boxes (S, 4), ordered by their image (S,), to the proposals of a batch of `images`."""
    counts = (image == torch.arange(images, device=image.device)[:, None]).sum(dim=1)
    padded = pad_sequence(boxes.split(counts.tolist()), batch_first=True)
    return Proposals(padded, padded.new_zeros(padded.shape[:2]), counts)
