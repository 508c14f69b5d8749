"""Dynamic R-CNN's RoI stage.

References:
    "Dynamic R-CNN: Towards High Quality Object Detection via Dynamic Training", Zhang et al., 2020.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.ops.regression_losses import smooth_l1_loss
from fusedet.models.protocols import StageOutputs
from fusedet.models.roi.box import BoxStage
from fusedet.models.roi.pooling import PoolingFactory
from fusedet.models.roi.sampling import RoISamples, match_proposals, sample_rois
from fusedet.types import Candidates, Features, Levels, Losses, Proposals, Target

MIN_MEDIAN = 1e-15  # a smaller beta would make the regression loss infinite


class DynamicStage(nn.Module):
    """A box stage whose IoU threshold and smooth L1 beta follow the quality of the proposals (algorithm 1).

    Every training step records two statistics, averaged over ranks: the iou_topk-th largest IoU of an image's
    candidates, ground truth included, as the mean over images (section 3.2), and the (beta_topk * images)-th smallest
    target shift (section 3.3). Every `interval` steps the IoU threshold becomes the mean of the recorded IoUs, and beta
    the median of the recorded shifts. The state dict holds all of it. Without gradients nothing is recorded.

    Args:
        levels: As in `BoxStage`.
        num_classes: As in `BoxStage`.
        pooling: As in `BoxStage`.
        size: As in `BoxStage`.
        channels: As in `BoxStage`.
        class_agnostic: As in `BoxStage`.
        stds: As in `BoxStage`.
        positive: First IoU threshold.
        num: As in `BoxStage`.
        fraction: As in `BoxStage`.
        iou_topk: K_I of the paper.
        beta_topk: K_beta of the paper, per image.
        interval: Steps between updates.
        initial_iou: Minimum IoU threshold after an update.
        initial_beta: First beta, and its maximum.
        weight: As in `BoxStage`.

    Raises:
        InputError: An option is out of its range.
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
        self.box = BoxStage(
            levels,
            num_classes,
            pooling,
            size=size,
            channels=channels,
            class_agnostic=class_agnostic,
            stds=stds,
            positive=positive,
            num=num,
            fraction=fraction,
            weight=weight,
        )
        self.num_classes, self.weight, self.loss_weights = num_classes, weight, self.box.loss_weights
        self.iou_topk, self.beta_topk = iou_topk, beta_topk
        self.initial_iou, self.initial_beta = initial_iou, initial_beta
        self.register_buffer("threshold", torch.tensor(positive))
        self.register_buffer("beta", torch.tensor(initial_beta))
        self.register_buffer("overlaps", torch.zeros(interval))
        self.register_buffer("shifts", torch.full((interval,), -1.0))  # -1: no sample was positive
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, features: Features, rois: Tensor) -> StageOutputs:
        """Compute logits and box deltas, as `BoxStage` does."""
        return self.box(features, rois)

    def decode(self, raw: StageOutputs, rois: Tensor, counts: Tensor) -> Candidates:
        """Decode boxes and scores, as `BoxStage` does."""
        return self.box.decode(raw, rois, counts)

    def refine(self, raw: StageOutputs, rois: Tensor, sizes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Refine the boxes, as `BoxStage` does."""
        return self.box.refine(raw, rois, sizes, classes)

    def classes(self, samples: RoISamples, targets: Sequence[Target]) -> Tensor:
        """Look up the class of each sample, as `BoxStage` does."""
        return self.box.classes(samples, targets)

    def sample(self, proposals: Proposals, targets: Sequence[Target]) -> RoISamples:
        """Sample the RoIs to train on, positive from the current threshold on, and record the IoUs."""
        matched = match_proposals(proposals, targets, self.threshold.to(proposals.boxes.dtype))
        if torch.is_grad_enabled():
            self._record(self.overlaps, self.topk_iou(matched.overlaps))
        return sample_rois(matched, self.box.sampler)

    def loss(self, raw: StageOutputs, samples: RoISamples, targets: Sequence[Target]) -> Losses:
        """Compute the box stage's losses with the current beta, record the shifts, and update threshold and beta."""
        losses = self.box.loss(raw, samples, targets, partial(smooth_l1_loss, beta=self.beta.clone()))
        if torch.is_grad_enabled():
            self._record(self.shifts, self.topk_shift(self.box.regression(raw, samples, targets)[1], len(targets)))
            self._advance()
        return losses

    def topk_iou(self, overlaps: Tensor) -> Tensor:
        """Compute the mean over images of the iou_topk-th largest IoU, or the smallest where there are fewer.

        Shape:
            overlaps (N, P), -1 for padding; result: scalar.
        """
        ordered = overlaps.sort(dim=1, descending=True).values
        last = (overlaps >= 0).sum(dim=1).clamp(max=self.iou_topk) - 1
        return mean_over_ranks(ordered.gather(1, last.clamp(min=0)[:, None]).clamp(min=0).mean(), least=0.0)

    def topk_shift(self, deltas: Tensor, images: int) -> Tensor:
        """Compute the (beta_topk * images)-th smallest mean shift in x and y, or the largest where there are fewer.

        Shape:
            deltas (R, 4), the targets; result: scalar, -1 without positives.
        """
        present = len(deltas) > 0
        shifts = deltas[:, :2].abs().mean(dim=1).sort().values
        shift = shifts[min(self.beta_topk * images, len(shifts)) - 1] if present else deltas.new_zeros(())
        total, ranks = mean_over_ranks(torch.stack([shift, torch.full_like(shift, present)]), least=0.0)
        return torch.where(ranks > 0, total / ranks, -1)

    @torch.no_grad()
    def _record(self, history: Tensor, value: Tensor) -> None:
        history.index_copy_(0, (self.steps % len(history))[None], value.to(history.dtype)[None])

    @torch.no_grad()
    def _advance(self) -> None:
        self.steps += 1
        due = self.steps % len(self.shifts) == 0
        median = self.shifts.masked_fill(self.shifts < 0, torch.nan).nanquantile(0.5)
        # the median of no shifts is NaN and changes nothing
        beta = torch.where(median >= MIN_MEDIAN, median.clamp(max=self.initial_beta), self.beta)
        self.threshold.copy_(torch.where(due, self.overlaps.mean().clamp(min=self.initial_iou), self.threshold))
        self.beta.copy_(torch.where(due, beta, self.beta))
