"""Two-stage detectors: proposals, then a second look at each: Faster, Mask, Cascade, Dynamic, Grid and Libra R-CNN."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusedet.models.ops.boxes import select
from fusedet.models.ops.image_normalization import normalise
from fusedet.models.roi.box import RoIOutputs
from fusedet.models.roi.mask import paste_masks
from fusedet.models.roi.pooling import boxes_to_rois
from fusedet.models.roi.sampling import pad_to_proposals
from fusedet.types import Batch, BatchDetections, Detections, Features, Losses, Outputs, Proposals


class TwoStageOutputs(NamedTuple):
    """What a two-stage detector's forward gives: the pyramid, the raw outputs of its proposals' head, and of N images' R regions the
    last stage's rois (N * R, 5), how many are real (N,), and raw outputs, the logits being means over stages."""

    features: Features
    outputs: Outputs
    rois: Tensor
    counts: Tensor
    raw: RoIOutputs


class SelectedWithMasks(NamedTuple):
    """`BatchDetections` with masks (N, D, m, m): probabilities inside the boxes."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor
    masks: Tensor


class TwoStage(nn.Module):
    """Body, neck, a head that proposes, stages one after the other, and branches that look at what the last stage found.

    One stage is Faster R-CNN; three are Cascade R-CNN, where each bettered the boxes for the next and scores are of the mean of logits.
    branches: of each kind one per stage, which learns from that stage's samples; masks are means over stages, boxes the last one's.
    selection: options of `ops.boxes.select` (score, iou, max_det), and pre_nms, the proposals of a level that reach suppression.
    """

    stages: Any  # ModuleLists of parts, whose methods are their contract's
    branches: Any

    def __init__(
        self,
        backbone: Any,
        neck: Any,
        head: Any,
        stages: Sequence[nn.Module],
        branches: Sequence[Sequence[nn.Module]] = (),
        selection: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.stages = nn.ModuleList(stages)
        self.branches = nn.ModuleList(nn.ModuleList(kind) for kind in branches)
        self.selection = dict(selection or {})
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """K, the number of classes that it tells apart."""
        return self.stages[-1].num_classes

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each term of `loss` counts in the total."""
        extra = getattr(self.neck, "auxiliary_weight", 0.0)
        weights: dict[str, float] = dict(self.head.loss_weights)
        for i, stage in enumerate(self.stages):
            weights |= {self.term(i, name): weight for name, weight in stage.loss_weights.items()}
            branches = [kind[i].loss_weights for kind in self.branches]
            weights |= {
                self.term(i, name): weight * stage.weight for terms in branches for name, weight in terms.items()
            }
            if extra:
                weights |= {
                    f"auxiliary_{self.term(i, name)}": extra * weight for name, weight in stage.loss_weights.items()
                }
        return weights

    def term(self, stage: int, name: str) -> str:
        """A loss term's name: s0_loss_cls for the first of several stages, loss_cls for the only one."""
        return f"s{stage}_{name}" if len(self.stages) > 1 else name

    def normalise(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """uint8 images to what the body was trained on, in channels_last; the padding is 0 after it."""
        return normalise(
            images, self.backbone.scale, self.backbone.shift, sizes, next(self.backbone.parameters()).dtype
        )

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> TwoStageOutputs:
        """Images uint8 (N, 3, H, W), of sizes (N, 2) inside their padding (all of it by default), to raw outputs."""
        features = self.neck(self.backbone(self.normalise(images, sizes)))
        if sizes is None:
            sizes = torch.tensor(images.shape[2:], device=images.device).expand(len(images), 2)
        outputs = self.head(features)
        proposals = self.head.propose(outputs, sizes, self.selection.get("pre_nms", 1000))
        rois, raw = self.look(features, proposals, sizes)
        return TwoStageOutputs(features, outputs, rois, proposals.counts, raw)

    def look(self, features: Features, proposals: Proposals, sizes: Tensor) -> tuple[Tensor, RoIOutputs]:
        """All stages on proposals: the last one's rois (N * R, 5), and its raw outputs with the mean of all stages' logits."""
        rois = boxes_to_rois(proposals.boxes)
        raw = self.stages[0](features, rois)
        logits = raw[0]
        for before, stage in zip(self.stages, self.stages[1:]):
            rois = torch.cat([rois[:, :1], before.refine(raw, rois, sizes)], dim=1)
            raw = stage(features, rois)
            logits = logits + raw[0]
        return rois, (logits / len(self.stages), raw[1])

    def loss(self, batch: Batch) -> Losses:
        """All losses on a batch with targets, unweighted: of the proposals, of each stage and its branches, and, where the neck has an
        auxiliary pyramid, of each stage's samples there (AugFPN, 2020, 3.2)."""
        assert batch.targets is not None
        maps = self.backbone(self.normalise(batch.images, batch.sizes))
        auxiliary: Features | None = None
        if getattr(self.neck, "auxiliary_weight", 0.0):
            features, auxiliary = self.neck.with_auxiliary(maps)
        else:
            features = self.neck(maps)
        outputs = self.head(features)
        losses: Losses = self.head.loss(outputs, batch.targets, batch.sizes)
        proposals = self.head.propose(outputs, batch.sizes, to_train=True)
        for i, stage in enumerate(self.stages):
            samples = stage.sample(proposals, batch.targets)
            raw = stage(features, samples.rois)
            found = stage.loss(raw, samples, batch.targets)
            for kind in self.branches:
                found |= kind[i].loss(features, samples, batch.targets, batch.sizes)
            losses |= {self.term(i, name): value for name, value in found.items()}
            if auxiliary is not None:
                again = stage.loss(stage(auxiliary, samples.rois), samples, batch.targets)
                losses |= {f"auxiliary_{self.term(i, name)}": value for name, value in again.items()}
            if i + 1 < len(self.stages):
                boxes = stage.refine(raw, samples.rois, batch.sizes, stage.classes(samples, batch.targets))
                others = ~samples.added
                proposals = pad_to_proposals(boxes[others], samples.image[others], len(batch))
        return losses

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections | SelectedWithMasks:
        """Final detections as tensors, in pixels of the network's input, with masks where a branch has them.

        padded to max_det, the form that exports, or to the most that an image has, so that branches look at nothing in vain.
        """
        regions = self(images, sizes)
        found = self.choose(regions, sizes)
        return self.branch(regions.features, found if padded else found.trimmed())

    def choose(self, regions: TwoStageOutputs, sizes: Tensor) -> BatchDetections:
        """What the last stage found, after suppression."""
        candidates = self.stages[-1].decode(regions.raw, regions.rois, regions.counts)
        count, classes = candidates.scores.shape[1:]
        options = {k: v for k, v in self.selection.items() if k != "pre_nms"}
        return select(candidates, sizes, [count], pre_nms=count * classes, **options)

    def branch(self, features: Features, found: BatchDetections) -> BatchDetections | SelectedWithMasks:
        """The same with what all branches add."""
        masks = None
        for kind in self.branches:
            if hasattr(kind[-1], "refine"):
                found = kind[-1].refine(features, found)
            else:
                masks = torch.stack([branch.predict(features, found) for branch in kind]).mean(dim=0)
        return found if masks is None else SelectedWithMasks(*found, masks)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """What is in each image of a batch, in pixels of the network's input, best first; masks (D, H, W) of the image's size."""
        found = self.detect(batch.images, batch.sizes, padded=False)
        results = []
        for i, (n, (height, width)) in enumerate(zip(found.counts.tolist(), batch.sizes.tolist())):
            boxes = found.boxes[i, :n]
            masks = (
                paste_masks(found.masks[i, :n], boxes, (height, width))
                if isinstance(found, SelectedWithMasks)
                else None
            )
            results.append(Detections(boxes, found.scores[i, :n], found.labels[i, :n], masks))
        return results
