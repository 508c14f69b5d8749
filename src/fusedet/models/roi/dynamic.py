"""Dynamic R-CNN: "Dynamic R-CNN: Towards High Quality Object Detection via Dynamic Training", Zhang et al., 2020."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.ops.regression_losses import smooth_l1
from fusedet.models.roi.box import BoxStage, RoIOutputs
from fusedet.models.roi.pooling import PoolingFactory
from fusedet.models.roi.sampling import RoISamples, match_proposals, sample_rois
from fusedet.types import Candidates, Features, Levels, Losses, Proposals, Target

LEAST = 1e-15  # a median below would make the loss of codes infinite


class DynamicStage(nn.Module):
    """A box stage whose positive overlap and whose smooth L1's beta follow the proposals as they become better (algorithm 1).

    In every loss it notes the iou_topk-th largest overlap of an image's candidates, the objects themselves included, the mean over
    images (3.2), and the size of the (beta_topk * images)-th smallest wanted shift (3.3); after every `interval` of them the
    positive overlap becomes their mean, at least initial_iou, and beta their median, at most initial_beta. The notes are means over
    ranks, and all of this is in the state dict. Without gradients nothing is noted.
    levels, num_classes, pooling, size, channels, class_agnostic, stds, positive, num, fraction, weight: of `BoxStage`.
    """

    threshold: Tensor
    beta: Tensor
    overlaps: Tensor
    shifts: Tensor
    steps: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        pooling: PoolingFactory | None = None,
        size: int = 7,
        channels: int = 1024,
        class_agnostic: bool = False,
        stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
        positive: float = 0.5,
        num: int = 512,
        fraction: float = 0.25,
        iou_topk: int = 75,
        beta_topk: int = 10,
        interval: int = 100,
        initial_iou: float = 0.4,
        initial_beta: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        if min(iou_topk, beta_topk, interval) < 1:
            raise InputError(f"iou_topk={iou_topk}, beta_topk={beta_topk}, interval={interval} must be at least 1")
        options = {
            "size": size,
            "channels": channels,
            "class_agnostic": class_agnostic,
            "stds": stds,
            "positive": positive,
        }
        self.box = BoxStage(levels, num_classes, pooling, num=num, fraction=fraction, weight=weight, **options)  # type: ignore[arg-type]
        self.num_classes, self.weight, self.loss_weights = num_classes, weight, self.box.loss_weights
        self.iou_topk, self.beta_topk, self.initial_iou, self.initial_beta = (
            iou_topk,
            beta_topk,
            initial_iou,
            initial_beta,
        )
        self.register_buffer("threshold", torch.tensor(positive))
        self.register_buffer("beta", torch.tensor(initial_beta))
        self.register_buffer("overlaps", torch.zeros(interval))
        self.register_buffer("shifts", torch.full((interval,), -1.0))  # -1: no sample was positive
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Features, rois: Tensor) -> RoIOutputs:
        """As `BoxStage`."""
        return self.box(features, rois)

    def decode(self, raw: RoIOutputs, rois: Tensor, counts: Tensor) -> Candidates:
        """As `BoxStage`."""
        return self.box.decode(raw, rois, counts)

    def refine(self, raw: RoIOutputs, rois: Tensor, sizes: Tensor, classes: Tensor | None = None) -> Tensor:
        """As `BoxStage`."""
        return self.box.refine(raw, rois, sizes, classes)

    def classes(self, samples: RoISamples, targets: Sequence[Target]) -> Tensor:
        """As `BoxStage`."""
        return self.box.classes(samples, targets)

    def sample(self, proposals: Proposals, targets: Sequence[Target]) -> RoISamples:
        """The regions to learn from, positive from the present threshold on; notes the overlaps."""
        matched = match_proposals(proposals, targets, self.threshold.to(proposals.boxes.dtype))
        if torch.is_grad_enabled():
            self._note(self.overlaps, self.usual_overlap(matched.overlaps))
        return sample_rois(matched, self.box.sampler)

    def loss(self, raw: RoIOutputs, samples: RoISamples, targets: Sequence[Target]) -> Losses:
        """The box stage's losses with the present beta; then notes the shifts, and where it is time, both values change."""
        losses = self.box.loss(raw, samples, targets, partial(smooth_l1, beta=self.beta.clone()))
        if torch.is_grad_enabled():
            self._note(self.shifts, self.usual_shift(self.box.regression(raw, samples, targets)[1], len(targets)))
            self._advance()
        return losses

    def usual_overlap(self, overlaps: Tensor) -> Tensor:
        """The mean over images of the iou_topk-th largest of overlaps (N, P), -1 for padding, of the last where there are fewer."""
        ordered = overlaps.sort(dim=1, descending=True).values
        place = (overlaps >= 0).sum(dim=1).clamp(max=self.iou_topk) - 1
        return mean_over_ranks(ordered.gather(1, place.clamp(min=0)[:, None]).clamp(min=0).mean(), least=0.0)

    def usual_shift(self, wanted: Tensor, images: int) -> Tensor:
        """The (beta_topk * images)-th smallest mean shift in x and y of wanted codes (R, 4), or the largest; -1 of none."""
        there = len(wanted) > 0
        shifts = wanted[:, :2].abs().mean(dim=1).sort().values
        shift = shifts[min(self.beta_topk * images, len(shifts)) - 1] if there else wanted.new_zeros(())
        total, ranks = mean_over_ranks(torch.stack([shift, torch.full_like(shift, there)]), least=0.0)
        return torch.where(ranks > 0, total / ranks, -1)

    @torch.no_grad()
    def _note(self, history: Tensor, value: Tensor) -> None:
        history.index_copy_(0, (self.steps % len(history))[None], value.to(history.dtype)[None])

    @torch.no_grad()
    def _advance(self) -> None:
        self.steps += 1
        due = self.steps % len(self.shifts) == 0
        median = self.shifts.masked_fill(self.shifts < 0, torch.nan).nanquantile(0.5)
        beta = torch.where(
            median >= LEAST, median.clamp(max=self.initial_beta), self.beta
        )  # a median of nothing changes nothing
        self.threshold.copy_(torch.where(due, self.overlaps.mean().clamp(min=self.initial_iou), self.threshold))
        self.beta.copy_(torch.where(due, beta, self.beta))
