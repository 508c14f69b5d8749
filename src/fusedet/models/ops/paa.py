"""PAA's label assignment.

References:
    "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", Kim and Lee, 2020, section 3.2.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedet.models.ops.assigners import BACKGROUND, INSTANCES_AT_ONCE
from fusedet.types import Priors, Target

STEPS = 100  # most steps of the expectation maximization (scikit-learn's default, as in the authors' code)
CHECK_EVERY = 10  # steps between two checks of whether all mixtures have converged
TOLERANCE = 1e-3  # change of the mean log-likelihood below which a mixture has converged
LEAST_VARIANCE = 1e-6  # added to each variance


@torch.no_grad()
def separate_positives(
    assigned: Tensor, costs: Tensor, priors: Priors, targets: Sequence[Target], topk: int = 9
) -> Tensor:
    """Keep those of an assignment's positives that belong to the good part of a mixture of two Gaussians.

    The candidates of an instance are its positives of the `topk` lowest costs per level. A mixture of two Gaussians is
    fitted to their costs. Positive are the candidates that more likely belong to the first component, up to the most
    likely one in the order of the costs (figure 3c). All other positives become background, those of an instance with a
    single candidate too.

    Args:
        assigned: Assignment of every image, as of `protocols.Assigner`.
        costs: Cost of every positive prior.
        priors: P priors of all levels.
        targets: The ground truth of every image.
        topk: Candidates per level.

    Shape:
        assigned (N, P) int64; costs (N, P); result (N, P) int64.
    """
    candidates = [
        _lowest_costs(own, own_costs, priors.counts, len(target), topk)
        for own, own_costs, target in zip(assigned, costs, targets, strict=True)
    ]
    values, order = torch.cat([v for v, _ in candidates]).sort(dim=1, stable=True)  # (G, M)
    # on the CPU, to synchronize with a GPU once, and not in every check of the mixtures
    kept = select_low_costs(values.cpu().double()).to(values.device, non_blocking=True)
    image = torch.cat([assigned.new_full((len(v),), i) for i, (v, _) in enumerate(candidates)])[:, None]
    rows = torch.cat([index for _, index in candidates]).gather(1, order) + image * assigned.shape[1]
    last = assigned.numel()  # where what is not kept is written
    mask = assigned.new_zeros(last + 1, dtype=torch.bool).index_fill(0, torch.where(kept, rows, last).flatten(), True)
    return torch.where((assigned >= 0) & ~mask[:last].view_as(assigned), BACKGROUND, assigned)


def _lowest_costs(
    assigned: Tensor, costs: Tensor, counts: Sequence[int], instances: int, topk: int
) -> tuple[Tensor, Tensor]:
    """Return the `topk` lowest costs (G, M) of every level among each instance's priors, and the priors (G, M).

    The costs are infinite where an instance has fewer priors on a level.
    """
    values, indices, start = [], [], 0
    for own, own_costs in zip(assigned.split(list(counts)), costs.split(list(counts))):
        k = min(topk, len(own))
        # in parts, which bounds the matrix of instances and priors
        parts = [
            torch.where(own == instance[:, None], own_costs, math.inf).topk(k, dim=1, largest=False)
            for instance in torch.arange(instances, device=own.device).split(INSTANCES_AT_ONCE)
        ]
        values.append(torch.cat([p.values for p in parts]) if parts else own_costs.new_zeros(0, k))
        indices.append(torch.cat([p.indices for p in parts]) + start if parts else own.new_zeros(0, k))
        start += len(own)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def select_low_costs(costs: Tensor) -> Tensor:
    """Select the good candidates of every instance by a mixture of two Gaussians, as `separate_positives` says.

    Shape:
        costs (G, M) float64, ascending, infinite for no candidate; result (G, M) bool.
    """
    real = costs.isfinite()
    costs = costs.masked_fill(~real, 0)
    joint = fit_mixture(costs, real)
    first = (joint[..., 0] >= joint[..., 1]) & real
    density = joint.logsumexp(dim=2).masked_fill(~first, -math.inf)
    peak = density.argmax(dim=1, keepdim=True)  # the first of equal ones
    index = torch.arange(costs.shape[1], device=costs.device)
    return first & (index <= peak) & (real.sum(dim=1, keepdim=True) > 1)


def fit_mixture(values: Tensor, real: Tensor) -> Tensor:
    """Fit a mixture of two Gaussians to every row by expectation maximization.

    The components start at the row's lowest and highest value with variance 1. A row stays as it is when its mean
    log-likelihood has changed by less than `TOLERANCE`.

    Args:
        values: Numbers of every row, ascending; any finite number where not real.
        real: Which values count.

    Returns:
        Log of the joint density of each value and component.

    Shape:
        values (G, M) float64; real (G, M) bool; result (G, M, 2).
    """
    count = real.sum(dim=1)  # (G,)
    if not values.numel():
        return values.new_zeros(*values.shape, 2)
    highest = values.gather(1, (count - 1).clamp(min=0)[:, None]).squeeze(1)
    means, variances = torch.stack([values[:, 0], highest], dim=1), values.new_ones(len(values), 2)
    weights = torch.full_like(means, 0.5)
    number = count.clamp(min=1).to(values.dtype)
    likelihood = values.new_full((len(values),), -math.inf)
    open_ = count > 1
    for step in range(STEPS):
        joint = _joint_density(values, means, variances, weights)
        total = joint.logsumexp(dim=2)  # (G, M)
        share = (joint - total[..., None]).exp() * real[..., None]  # (G, M, 2)
        sums = share.sum(dim=1) + 10 * torch.finfo(values.dtype).eps  # (G, 2)
        new_means = (share * values[..., None]).sum(dim=1) / sums
        moments = (share * values[..., None].square()).sum(dim=1) / sums
        new_variances = moments - new_means.square() + LEAST_VARIANCE
        mean = (total * real).sum(dim=1) / number
        row = open_[:, None]
        means, variances = torch.where(row, new_means, means), torch.where(row, new_variances, variances)
        weights = torch.where(row, sums / sums.sum(dim=1, keepdim=True), weights)
        open_ = open_ & ((mean - likelihood).abs() >= TOLERANCE)
        likelihood = mean
        if step % CHECK_EVERY == CHECK_EVERY - 1 and not open_.any():
            break
    return _joint_density(values, means, variances, weights)


def _joint_density(values: Tensor, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """Compute log(weight * density) (G, M, 2) of values (G, M) and components (G, 2)."""
    deviations = (values[..., None] - means[:, None]).square() / variances[:, None]
    return (weights.log() - 0.5 * (2 * math.pi * variances).log())[:, None] - 0.5 * deviations
