"""Box stage: the RoI head of Fast R-CNN with the semantics of MMDetection 3.x.

References:
    "Fast R-CNN", Girshick, 2015; the two shared layers are those of FPN, 2017.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, require_choice
from fusedet.models.ops.boxes import clip_boxes, decode_boxes, encode_boxes
from fusedet.models.ops.layers import Norm, conv_norm, init_kaiming
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.ops.regression_losses import balanced_l1_loss, l1_loss, smooth_l1_loss
from fusedet.models.ops.samplers import Sampler
from fusedet.models.protocols import StageOutputs
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory
from fusedet.models.roi.sampling import RoISamples, match_proposals, sample_rois
from fusedet.types import Candidates, Features, Levels, Losses, Proposals, Target

RegressionLoss = Callable[[Tensor, Tensor], Tensor]
"""Function of predicted and target deltas (R, 4) to losses (R, 4)."""

Sampling = Literal["random", "balanced"]
RegressionLossName = Literal["l1", "smooth_l1", "balanced_l1"]


class BoxStage(nn.Module):
    """Fully connected layers on the pooled features of an RoI, then class logits and box deltas.

    Args:
        levels: Levels of the pyramid.
        num_classes: K.
        pooling: Makes the pooling of a size; `LevelPooling` by default.
        size: Size of the pooled features, in cells per side.
        channels: Width of the fully connected layers.
        layers: Number of fully connected layers; without any, the mean of the pooled features is classified.
        convs: Number of 3x3 convolutions before them (4 before one layer in MMDetection's Shared4Conv1FC and
            torchvision's v2).
        norm: Norm after each of these convolutions, which have no bias then: "gn", GroupNorm of 32 groups, or "bn".
        class_agnostic: Predict one box for all classes (Cascade R-CNN).
        regress: Predict box deltas; without, boxes stay as they were proposed (Grid R-CNN).
        stds: Standard deviations that normalize the deltas.
        positive: IoU with an instance from which a proposal is positive.
        num: Samples per image, as in `ops.samplers.Sampler`.
        fraction: Share of positives among them.
        sampling: "random", or Libra R-CNN's "balanced".
        loss: Loss of the deltas: "l1", "smooth_l1", or Libra R-CNN's "balanced_l1".
        beta: Transition point of "smooth_l1".
        weight: Weight in the total of the losses of this stage and of its branches (Cascade R-CNN).
        ground_truth: Add the ground-truth boxes to the proposals before sampling.

    Raises:
        InputError: An option is unknown or out of its range.
    """

    stds: Tensor

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        pooling: PoolingFactory | None = None,
        size: int = 7,
        channels: int = 1024,
        layers: int = 2,
        convs: int = 0,
        class_agnostic: bool = False,
        regress: bool = True,
        stds: tuple[float, float, float, float] = (0.1, 0.1, 0.2, 0.2),
        positive: float = 0.5,
        num: int = 512,
        fraction: float = 0.25,
        sampling: Sampling = "random",
        loss: RegressionLossName = "l1",
        beta: float = 1.0,
        weight: float = 1.0,
        norm: Norm | None = None,
        ground_truth: bool = True,
    ) -> None:
        super().__init__()
        require_choice("sampling", sampling, Sampling)
        require_choice("loss", loss, RegressionLossName)
        if size < 1 or channels < 1 or layers < 0 or convs < 0:
            raise InputError(
                f"size={size}, channels={channels} must be at least 1, layers={layers} and convs={convs} at least 0"
            )
        if min(stds) <= 0 or not beta > 0:
            raise InputError(f"stds={list(stds)}, beta={beta} must be above 0")
        self.num_classes, self.class_agnostic = num_classes, class_agnostic
        self.positive, self.weight, self.ground_truth = positive, weight, ground_truth
        losses: dict[str, RegressionLoss] = {
            "l1": l1_loss,
            "smooth_l1": partial(smooth_l1_loss, beta=beta),
            "balanced_l1": balanced_l1_loss,
        }
        self.regression_loss = losses[loss]
        self.loss_weights = {"loss_cls": weight} | ({"loss_box": weight} if regress else {})
        self.sampler = Sampler(num, fraction, balanced=sampling == "balanced")
        self.register_buffer("stds", torch.tensor(stds), persistent=False)
        self.pooling = pooling(size) if pooling else LevelPooling(levels, size)
        width = levels.channels[0]
        self.convs = nn.ModuleList(conv_norm(width, width, 3, norm) for _ in range(convs))
        shared = [nn.Linear(channels if i else width * size * size, channels) for i in range(layers)]
        self.shared = nn.ModuleList(shared)
        init_kaiming(self.convs)
        channels = channels if layers else width
        self.cls = nn.Linear(channels, num_classes + 1)
        self.reg = nn.Linear(channels, 4 if class_agnostic else 4 * num_classes) if regress else None
        for layer in shared:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls.weight, std=0.01)
        if self.reg is not None:
            nn.init.normal_(self.reg.weight, std=0.001)
        for layer in [*shared, self.cls, *([self.reg] if self.reg is not None else [])]:
            nn.init.zeros_(layer.bias)

    def forward(self, features: Features, rois: Tensor) -> StageOutputs:
        """Compute logits and box deltas of every RoI.

        Shape:
            features: levels (N, C, H, W); rois (M, 5), index of the image in the batch, then a box in pixels; logits
            (M, K + 1), background last; deltas (M, 4), class-specific ones (M, K * 4), or None.
        """
        x = self.pooling(features, rois)
        for layer in self.convs:
            x = F.relu(layer(x))
        x = x.flatten(1) if self.shared else x.mean(dim=(2, 3))
        for layer in self.shared:
            x = F.relu(layer(x))
        return self.cls(x), self.reg(x) if self.reg is not None else None

    def sample(self, proposals: Proposals, targets: Sequence[Target]) -> RoISamples:
        """Assign the proposals and sample the RoIs to train on, ground-truth boxes among them."""
        return sample_rois(match_proposals(proposals, targets, self.positive, self.ground_truth), self.sampler)

    def loss(
        self,
        raw: StageOutputs,
        samples: RoISamples,
        targets: Sequence[Target],
        regression_loss: RegressionLoss | None = None,
    ) -> Losses:
        """Compute the cross-entropy of all samples and the deltas' loss of the positive ones.

        Both are divided by the number of samples, averaged over ranks.

        Args:
            raw: Logits (S, K + 1) and deltas of the samples.
            samples: RoIs of `sample`.
            targets: Ground truth of each image.
            regression_loss: Replaces the constructor's loss of deltas.
        """
        logits = raw[0].float()
        count = mean_over_ranks(logits.new_full((), len(logits)))
        losses = {"loss_cls": F.cross_entropy(logits, self.classes(samples, targets), reduction="sum") / count}
        if raw[1] is not None:
            compute_loss = regression_loss or self.regression_loss
            losses["loss_box"] = compute_loss(*self.regression(raw, samples, targets)).sum() / count
        return losses

    def classes(self, samples: RoISamples, targets: Sequence[Target]) -> Tensor:
        """Look up the class (S,) of each sample; K for background."""
        _, labels = samples.gather(targets)
        return torch.full_like(samples.instances, self.num_classes).index_copy(0, samples.positive, labels)

    def regression(self, raw: StageOutputs, samples: RoISamples, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """Compute predicted and target deltas, (R, 4) each, of the positive samples."""
        assert raw[1] is not None
        boxes, labels = samples.gather(targets)
        deltas = raw[1][samples.positive]
        if not self.class_agnostic:
            deltas = _select_class(deltas, labels)
        return deltas.float(), encode_boxes(samples.rois[samples.positive, 1:], boxes) / self.stds

    def decode(self, raw: StageOutputs, rois: Tensor, counts: Tensor) -> Candidates:
        """Decode boxes and scores.

        Shape:
            rois (N * R, 5), of each image the first counts (N,) real; result: boxes (N, R, 4), or class-specific ones
            (N, R, K, 4), and scores (N, R, K), 0 for padding.
        """
        scores = raw[0].float().softmax(dim=1)[:, :-1].unflatten(0, (counts.shape[0], -1))  # (N, R, K)
        boxes = rois[:, 1:]
        if raw[1] is not None:
            deltas = raw[1].float().unflatten(1, (-1, 4)) * self.stds  # (N * R, 1 or K, 4)
            boxes = decode_boxes(boxes[:, None], deltas)
            boxes = boxes.squeeze(1) if self.class_agnostic else boxes
        real = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
        return Candidates(boxes.unflatten(0, (counts.shape[0], -1)), scores * real[..., None])

    def refine(self, raw: StageOutputs, rois: Tensor, sizes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Refine the boxes for the next stage, without gradient; without deltas they are only clipped.

        Of class-specific boxes, that of the given class counts, and that of the most likely class for background.

        Shape:
            rois (M, 5); sizes (N, 2), height and width of the images; classes (M,); result (M, 4), inside the images.
        """
        boxes = rois[:, 1:]
        if raw[1] is not None:
            deltas = raw[1].detach().float()
            if not self.class_agnostic:
                likeliest = raw[0][:, :-1].argmax(dim=1)
                chosen = likeliest if classes is None else torch.where(classes < self.num_classes, classes, likeliest)
                deltas = _select_class(deltas, chosen)
            boxes = decode_boxes(boxes, deltas * self.stds)
        return clip_boxes(boxes[:, None], sizes[rois[:, 0].long()]).squeeze(1)


def _select_class(deltas: Tensor, classes: Tensor) -> Tensor:
    """Select from class-specific deltas (M, K * 4) those of classes (M,): (M, 4)."""
    return deltas.unflatten(1, (-1, 4))[torch.arange(deltas.shape[0], device=deltas.device), classes]
