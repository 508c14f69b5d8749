"""A stage's box head: "Fast R-CNN", Girshick, 2015, two shared layers as in FPN, 2017, with the semantics of MMDetection 3.x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusedet.errors import InputError, one_of
from fusedet.models.ops.boxes import clip, decode, encode
from fusedet.models.ops.layers import conv, kaiming
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.models.ops.regression_losses import balanced_l1, l1, smooth_l1
from fusedet.models.ops.samplers import Sampler
from fusedet.models.roi.pooling import LevelPooling, PoolingFactory
from fusedet.models.roi.sampling import RoISamples, match_proposals, sample_rois
from fusedet.types import Candidates, Features, Levels, Losses, Proposals, Target

RoIOutputs = tuple[Tensor, Tensor | None]
"""What a stage gives for M regions: logits (M, K + 1), background last, and codes (M, 4), or (M, K * 4) class by class, or None."""

Cost = Callable[[Tensor, Tensor], Tensor]


Sampling = Literal["random", "balanced"]
CodeLoss = Literal["l1", "smooth_l1", "balanced_l1"]


class BoxStage(nn.Module):
    """Fully connected layers over a region's features, then its class or background and a box code.

    levels: of the pyramid. num_classes: K. pooling: makes the pooling of a size, `LevelPooling` by default.
    size: of the pooled features, in cells a side. layers, channels: how many fully connected layers, and how wide; convs: 3x3 convolutions
    before them (4 before one layer in MMDetection's Shared4Conv1FC and torchvision's v2). class_agnostic: one code for all (Cascade).
    regress: with codes; without, boxes stay as they were proposed (Grid R-CNN). stds: of the codes, which are divided by them.
    positive: the overlap with an object from which a region is positive. num, fraction: of `ops.sample.Sampler`; sampling: "random", or
    Libra R-CNN's "balanced". loss: of the codes; beta: of "smooth_l1".
    weight: of the losses of this stage and of its branches in the total (Cascade R-CNN).
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
        loss: CodeLoss = "l1",
        beta: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        one_of("sampling", sampling, Sampling)
        one_of("loss", loss, CodeLoss)
        if size < 1 or channels < 1 or layers < 1 or convs < 0:
            raise InputError(
                f"size={size}, channels={channels}, layers={layers} must be at least 1 and convs={convs} at least 0"
            )
        if min(stds) <= 0 or not beta > 0:
            raise InputError(f"stds={list(stds)}, beta={beta} must be above 0")
        self.num_classes, self.class_agnostic, self.positive, self.weight = (
            num_classes,
            class_agnostic,
            positive,
            weight,
        )
        costs: dict[str, Cost] = {"l1": l1, "smooth_l1": partial(smooth_l1, beta=beta), "balanced_l1": balanced_l1}
        self.cost = costs[loss]
        self.loss_weights = {"loss_cls": weight} | ({"loss_box": weight} if regress else {})
        self.sampler = Sampler(num, fraction, balanced=sampling == "balanced")
        self.register_buffer("stds", torch.tensor(stds), persistent=False)
        self.pooling = pooling(size) if pooling else LevelPooling(levels, size)
        width = levels.channels[0]
        self.convs = nn.ModuleList(conv(width, width, 3) for _ in range(convs))
        shared = [nn.Linear(channels if i else width * size * size, channels) for i in range(layers)]
        self.shared = nn.ModuleList(shared)
        kaiming(self.convs)
        self.cls = nn.Linear(channels, num_classes + 1)
        self.reg = nn.Linear(channels, 4 if class_agnostic else 4 * num_classes) if regress else None
        for layer in shared:
            nn.init.xavier_uniform_(layer.weight)
        nn.init.normal_(self.cls.weight, std=0.01)
        if self.reg is not None:
            nn.init.normal_(self.reg.weight, std=0.001)
        for layer in [*shared, self.cls, *([self.reg] if self.reg is not None else [])]:
            nn.init.zeros_(layer.bias)

    def forward(self, features: Features, rois: Tensor) -> RoIOutputs:
        """Levels (N, C, H, W) and rois (M, 5), each the image's number and a box in pixels, to logits and codes."""
        x = self.pooling(features, rois)
        for layer in self.convs:
            x = F.relu(layer(x))
        x = x.flatten(1)
        for layer in self.shared:
            x = F.relu(layer(x))
        return self.cls(x), self.reg(x) if self.reg is not None else None

    def sample(self, proposals: Proposals, targets: Sequence[Target]) -> RoISamples:
        """The regions to learn from; the objects' own boxes are among the candidates."""
        return sample_rois(match_proposals(proposals, targets, self.positive), self.sampler)

    def loss(self, raw: RoIOutputs, samples: RoISamples, targets: Sequence[Target], cost: Cost | None = None) -> Losses:
        """Cross-entropy of all samples and the loss of the positive ones' codes, both divided by the number of samples.

        cost: takes the place of the constructor's loss of codes.
        """
        logits = raw[0].float()
        count = mean_over_ranks(logits.new_tensor(len(logits)))
        losses = {"loss_cls": F.cross_entropy(logits, self.classes(samples, targets), reduction="sum") / count}
        if raw[1] is not None:
            losses["loss_box"] = (cost or self.cost)(*self.regression(raw, samples, targets)).sum() / count
        return losses

    def classes(self, samples: RoISamples, targets: Sequence[Target]) -> Tensor:
        """The class (S,) of each sample, K for background."""
        _, labels = samples.objects(targets)
        return torch.full_like(samples.owners, self.num_classes).index_copy(0, samples.positive, labels)

    def regression(self, raw: RoIOutputs, samples: RoISamples, targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
        """The codes (R, 4) of the positive samples, found and wanted."""
        assert raw[1] is not None
        boxes, labels = samples.objects(targets)
        codes = raw[1][samples.positive]
        if not self.class_agnostic:
            codes = _of_class(codes, labels)
        return codes.float(), encode(samples.rois[samples.positive, 1:], boxes) / self.stds

    def decode(self, raw: RoIOutputs, rois: Tensor, counts: Tensor) -> Candidates:
        """Rois (N * R, 5), of each image the first counts (N,) real, to boxes (N, R, 4), or (N, R, K, 4) class by class, and scores
        (N, R, K), 0 for the others."""
        scores = raw[0].float().softmax(dim=1)[:, :-1].unflatten(0, (len(counts), -1))  # (N, R, K)
        boxes = rois[:, 1:]
        if raw[1] is not None:
            codes = raw[1].float().unflatten(1, (-1, 4)) * self.stds  # (N * R, 1 or K, 4)
            boxes = decode(boxes[:, None], codes)
            boxes = boxes.squeeze(1) if self.class_agnostic else boxes
        real = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
        return Candidates(boxes.unflatten(0, (len(counts), -1)), scores * real[..., None])

    def refine(self, raw: RoIOutputs, rois: Tensor, sizes: Tensor, classes: Tensor | None = None) -> Tensor:
        """The better boxes (M, 4) of rois (M, 5), inside images of sizes (N, 2), for the next stage; without gradient.

        Of class-wise boxes that of classes (M,), where it is not background, else of the likeliest class.
        """
        assert raw[1] is not None
        codes = raw[1].detach().float()
        if not self.class_agnostic:
            likeliest = raw[0][:, :-1].argmax(dim=1)
            codes = _of_class(
                codes, likeliest if classes is None else torch.where(classes < self.num_classes, classes, likeliest)
            )
        boxes = decode(rois[:, 1:], codes * self.stds)
        return clip(boxes[:, None], sizes[rois[:, 0].long()]).squeeze(1)


def _of_class(codes: Tensor, classes: Tensor) -> Tensor:
    """Of codes (M, K * 4) those of classes (M,): (M, 4)."""
    return codes.unflatten(1, (-1, 4))[torch.arange(len(codes), device=codes.device), classes]
