"""Sampling: which of the assigned priors or proposals a loss looks at. Chance is torch's; all images at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.errors import InputError
from fusedet.models.ops.assigners import BACKGROUND

BINS = 3  # of overlap, Libra R-CNN, 2019, table 5


@dataclass(frozen=True)
class Sampler:
    """At most `num` of each image, at most int(num * fraction) of them positive (Faster R-CNN, 2015, 3.1.3).

    most_negatives: negatives for every positive, of which one is counted where there is none; None: as many as there is package for.
    balanced: positives evenly over the objects, negatives evenly over bins of overlap (Libra R-CNN, 2019, 3.1, as MMDetection 3.x has
    it: the bins divide the range from 0 to the image's largest overlap, and what overlaps nothing only fills up).
    Raises InputError for num below 1 and a fraction outside 0..1.
    """

    num: int = 512
    fraction: float = 0.25
    most_negatives: float | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.num < 1 or not 0 <= self.fraction <= 1:
            raise InputError(f"num={self.num} must be at least 1, fraction={self.fraction} 0 to 1")

    @torch.no_grad()
    def sample(self, owners: Tensor, overlaps: Tensor | None = None) -> Tensor:
        """(N, P) bool: who is drawn.

        owners (N, P): the object's index, -1 background, others are never drawn. overlaps (N, P) with the nearest object, which
        `balanced` needs.
        """
        positive, negative = owners >= 0, owners == BACKGROUND
        keys = torch.rand(owners.shape, device=owners.device)  # the smaller, the earlier drawn
        limit = int(self.num * self.fraction)
        if self.balanced:
            # only one in excess of its object's share waits for the others: it draws behind them
            share = (
                torch.tensor(float(limit), device=owners.device) / _objects(owners, positive).clamp(min=1)
            ).round() + 1
            keys = torch.where(positive, keys + (_places(owners, keys, positive) >= share[:, None]), keys)
        drawn = _first(keys, positive, positive.sum(dim=1), limit)
        package = self.num - drawn.sum(dim=1)
        if self.most_negatives is not None:
            package = torch.minimum(package, (drawn.sum(dim=1).clamp(min=1) * self.most_negatives).long())
        if self.balanced:
            assert overlaps is not None
            bins = _bins(overlaps)
            behind = _places(bins, keys, negative) >= (package // BINS)[:, None]
            keys = torch.where(negative, keys + behind + 2 * (overlaps <= 0), keys)
        return drawn | _first(keys, negative, package, self.num)


def _first(keys: Tensor, among: Tensor, wanted: Tensor, limit: int) -> Tensor:
    """(N, P) bool: the `wanted` (N,) smallest keys of those among (N, P), at most limit."""
    values, places = keys.masked_fill(~among, torch.inf).topk(min(limit, keys.shape[1]), dim=1, largest=False)
    taken = (torch.arange(values.shape[1], device=keys.device) < wanted[:, None]) & values.isfinite()
    return torch.zeros_like(among).scatter(1, places, taken)


def _bins(overlaps: Tensor) -> Tensor:
    """The bin (N, P) of each overlap, BINS from 0 to the image's largest."""
    largest = overlaps.amax(dim=1, keepdim=True).clamp(min=1e-6) if overlaps.shape[1] else overlaps
    return (overlaps * BINS / largest).long().clamp(0, BINS - 1)


def _objects(owners: Tensor, positive: Tensor) -> Tensor:
    """How many different objects (N,) the positives have."""
    ordered = owners.masked_fill(~positive, -1).sort(dim=1).values
    new = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered[:, 1:] >= 0)).sum(dim=1) + (ordered[:, :1] >= 0).sum(dim=1)


def _places(groups: Tensor, keys: Tensor, among: Tensor) -> Tensor:
    """The place (N, P), from 0, of each key in its group, of those among."""
    order = keys.argsort(dim=1)
    group = groups.masked_fill(~among, -1).gather(1, order)
    inner = group.argsort(dim=1, stable=True)  # by group, then by key
    order, group = order.gather(1, inner), group.gather(1, inner)
    rank = torch.arange(keys.shape[1], device=keys.device).expand_as(order)
    first = torch.ones_like(group, dtype=torch.bool)
    first[:, 1:] = group[:, 1:] != group[:, :-1]
    start = torch.where(first, rank, 0).cummax(dim=1).values
    return torch.zeros_like(order).scatter(1, order, rank - start)
