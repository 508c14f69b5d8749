"""Sampling of positives and negatives for a loss, all images at once, with torch's random numbers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.assigners import BACKGROUND

BINS = 3  # of IoU, Libra R-CNN, 2019, table 5


@dataclass(frozen=True)
class Sampler:
    """Random sampler of positives and negatives.

    Args:
        num: Samples of an image at most.
        fraction: At most int(num * fraction) of them are positive.
        most_negatives: Negatives per positive at most; an image without positives counts as one positive. None:
            negatives fill up to `num`.
        balanced: Sample positives evenly over the instances and negatives evenly over bins of IoU. As in MMDetection
            3.x the bins divide the range from 0 to the image's largest IoU; priors of IoU 0 only fill up.

    Raises:
        InputError: `num` is below 1 or `fraction` outside 0..1.

    References:
        "Faster R-CNN", Ren et al., 2015, section 3.1.3; "Libra R-CNN", Pang et al., 2019, section 3.1 (balanced).
    """

    num: int = 512
    fraction: float = 0.25
    most_negatives: float | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.num < 1 or not 0 <= self.fraction <= 1:
            raise InputError(f"num={self.num} must be at least 1, fraction={self.fraction} 0 to 1")

    @torch.no_grad()
    def sample(self, assigned: Tensor, ious: Tensor | None = None) -> Tensor:
        """Sample priors or proposals.

        Args:
            assigned: Index of the ground-truth instance, -1 background; other values are never sampled.
            ious: Largest IoU with an instance, needed by `balanced`.

        Shape:
            assigned and ious (N, P); result (N, P) bool.
        """
        positive, negative = assigned >= 0, assigned == BACKGROUND
        keys = torch.rand(assigned.shape, device=assigned.device)  # smaller keys are sampled first
        limit = int(self.num * self.fraction)
        if self.balanced:
            # a positive in excess of its instance's share is sampled after all others
            share = (
                torch.full((), float(limit), device=assigned.device) / _count_instances(assigned, positive).clamp(min=1)
            ).round() + 1
            keys = torch.where(positive, keys + (_group_ranks(assigned, keys, positive) >= share[:, None]), keys)
        sampled = _take_smallest(keys, positive, positive.sum(dim=1), limit)
        quota = self.num - sampled.sum(dim=1)
        if self.most_negatives is not None:
            quota = torch.minimum(quota, (sampled.sum(dim=1).clamp(min=1) * self.most_negatives).long())
        if self.balanced:
            assert ious is not None
            bins = _bin_indices(ious)
            excess = _group_ranks(bins, keys, negative) >= (quota // BINS)[:, None]
            keys = torch.where(negative, keys + excess + 2 * (ious <= 0), keys)
        return sampled | _take_smallest(keys, negative, quota, self.num)


def _take_smallest(keys: Tensor, among: Tensor, wanted: Tensor, limit: int) -> Tensor:
    """Mark (N, P) the `wanted` (N,) smallest keys where `among` (N, P), at most `limit`."""
    values, indices = keys.masked_fill(~among, torch.inf).topk(min(limit, keys.shape[1]), dim=1, largest=False)
    taken = (torch.arange(values.shape[1], device=keys.device) < wanted[:, None]) & values.isfinite()
    return torch.zeros_like(among).scatter(1, indices, taken)


def _bin_indices(ious: Tensor) -> Tensor:
    """Return the bin (N, P) of each IoU; BINS bins from 0 to the image's largest."""
    largest = ious.amax(dim=1, keepdim=True).clamp(min=1e-6) if ious.shape[1] else ious
    return (ious * BINS / largest).long().clamp(0, BINS - 1)


def _count_instances(assigned: Tensor, positive: Tensor) -> Tensor:
    """Count the different instances (N,) of the positives."""
    ordered = assigned.masked_fill(~positive, -1).sort(dim=1).values
    new = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered[:, 1:] >= 0)).sum(dim=1) + (ordered[:, :1] >= 0).sum(dim=1)


def _group_ranks(groups: Tensor, keys: Tensor, among: Tensor) -> Tensor:
    """Return each key's rank (N, P), from 0, within its group, where `among`."""
    order = keys.argsort(dim=1)
    group = groups.masked_fill(~among, -1).gather(1, order)
    inner = group.argsort(dim=1, stable=True)  # by group, then by key
    order, group = order.gather(1, inner), group.gather(1, inner)
    rank = torch.arange(keys.shape[1], device=keys.device).expand_as(order)
    first = torch.ones_like(group, dtype=torch.bool)
    first[:, 1:] = group[:, 1:] != group[:, :-1]
    start = torch.where(first, rank, 0).cummax(dim=1).values
    return torch.zeros_like(order).scatter(1, order, rank - start)
