"""Two-stage detectors: proposals and RoI stages (Faster, Mask, Cascade, Dynamic, Grid, Libra R-CNN, TridentNet)."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.detectors.neck_chain import auxiliary_weight, compute_pyramids
from fusedet.models.ops.boxes import select_detections
from fusedet.models.ops.image_normalization import normalize_images
from fusedet.models.ops.scale_ranges import ScaleRange, check_ranges, keep_in_range, merge_branches
from fusedet.models.protocols import (
    AuxiliaryNeck,
    Backbone,
    BoxRefiner,
    BranchedBackbone,
    MaskPredictor,
    Neck,
    ProposalHead,
    RoIBranch,
    RoIStage,
    StageOutputs,
    StageSamples,
)
from fusedet.models.roi.mask import paste_masks
from fusedet.models.roi.pooling import boxes_to_rois
from fusedet.models.roi.sampling import pad_to_proposals
from fusedet.types import Batch, BatchDetections, Detections, Features, Losses, Outputs, Proposals, Target


class TwoStageOutputs(NamedTuple):
    """Raw outputs of a two-stage detector for N images, or N copies of all branches, with R proposals each.

    Attributes:
        features: The pyramid.
        outputs: Raw outputs of the proposal head.
        rois: (N * R, 5), the RoIs of the last stage.
        counts: (N,), how many RoIs of an image are real.
        raw: Logits (N * R, K + 1), the mean over all stages, and the last stage's box deltas.
    """

    features: Features
    outputs: Outputs
    rois: Tensor
    counts: Tensor
    raw: StageOutputs


class TwoStage(nn.Module):
    """Two-stage detector: backbone, neck, proposal head, RoI stages and RoI branches.

    One stage is Faster R-CNN. Three stages are Cascade R-CNN: each refines the boxes for the next, and the scores come
    from the mean of all stages' logits.

    TridentNet's backbone gives maps of several branches in train mode. Each branch then is an image of its own with the
    same ground truth, or with the instances of its valid range; predictions of several branches are merged by NMS.

    Args:
        backbone: Feature extractor.
        neck: Feature pyramid on the backbone's levels.
        head: Proposal head (RPN) on the neck's levels.
        stages: RoI stages in order.
        branches: For each kind of branch one per stage, trained on that stage's samples. At inference, masks are means
            over the stages; boxes are those of the last stage. Boxes are refined before masks are predicted, whatever
            the order of the kinds.
        selection: Options of `ops.boxes.select_detections` (score, iou, max_det), and pre_nms, the proposals of a level
            that enter NMS.
        auxiliary_stages: For a neck with auxiliary losses one per stage, on `roi.AllLevelPooling` of the neck's
            laterals. They take part in training only.
        valid_ranges: For each branch of a TridentNet, the least and the largest size of its instances, sqrt(width *
            height) in pixels of the network's input; empty for all instances in all branches.

    Raises:
        InputError: The neck's auxiliary losses need auxiliary stages that are missing, or there are too many; there is
            not one valid range per branch, or there are branches of the backbone and of the RoI head.

    References:
        "Scale-Aware Trident Networks for Object Detection", Li et al., 2019, sections 3.3 and 3.4 (valid_ranges).
    """

    backbone: Backbone
    neck: Neck
    head: ProposalHead
    stages: Sequence[RoIStage]
    branches: Sequence[Sequence[RoIBranch]]
    auxiliary_stages: Sequence[RoIStage]

    def __init__(
        self,
        backbone: Backbone,
        neck: Neck,
        head: ProposalHead,
        stages: Sequence[RoIStage],
        branches: Sequence[Sequence[RoIBranch]] = (),
        selection: Mapping[str, Any] | None = None,
        auxiliary_stages: Sequence[RoIStage] = (),
        valid_ranges: Sequence[ScaleRange] = (),
    ) -> None:
        super().__init__()
        self.branched = isinstance(backbone, BranchedBackbone) and backbone.branches > 1
        if valid_ranges:
            check_ranges(valid_ranges, backbone.branches if isinstance(backbone, BranchedBackbone) else 1)
        if self.branched and branches:
            raise InputError("model.roi.branches: a backbone with trident_stages takes stages only, leave them out")
        self.valid_ranges = tuple((low, high) for low, high in valid_ranges)
        needed = len(stages) if auxiliary_weight(neck) else 0
        if len(auxiliary_stages) != needed:
            raise InputError(
                f"{len(auxiliary_stages)} auxiliary stages for {len(stages)} stages: the neck needs {needed}, one per "
                "stage where its auxiliary_weight is above 0"
            )
        self.backbone, self.neck, self.head = backbone, neck, head
        self.stages = cast("Sequence[RoIStage]", _module_list(stages))
        self.branches = cast("Sequence[Sequence[RoIBranch]]", _module_list([_module_list(kind) for kind in branches]))
        self.auxiliary_stages = cast("Sequence[RoIStage]", _module_list(auxiliary_stages))
        self.selection = dict(selection or {})
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.stages[-1].num_classes

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight in the total of every term of `loss`."""
        extra = auxiliary_weight(self.neck)
        weights = dict(self.head.loss_weights)
        for i, stage in enumerate(self.stages):
            weights |= {self.term_name(i, name): weight for name, weight in stage.loss_weights.items()}
            for kind in self.branches:
                terms = kind[i].loss_weights.items()
                weights |= {self.term_name(i, name): weight * stage.weight for name, weight in terms}
        if isinstance(self.neck, AuxiliaryNeck):
            for i, stage in enumerate(self.auxiliary_stages):
                for level in range(len(self.neck.lateral_levels)):
                    terms = stage.loss_weights.items()
                    weights |= {self.term_name(i, name, level): extra * weight for name, weight in terms}
        return weights

    def term_name(self, stage: int, name: str, level: int | None = None) -> str:
        """Name a stage's loss term: s0_loss_cls for the first of several stages, loss_cls for the only one.

        Those of an auxiliary stage have the index of the lateral, such as auxiliary_level0_loss_cls.
        """
        name = name if level is None else f"auxiliary_level{level}_{name}"
        return f"s{stage}_{name}" if len(self.stages) > 1 else name

    def normalize(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Normalize images for the backbone, in channels_last; the padding becomes 0.

        Shape:
            images (N, C, H, W) uint8; sizes (N, 2), height and width inside the padding, None for no padding; result
            (N, C, H, W) of the type of the backbone's weights.
        """
        return normalize_images(
            images, self.backbone.scale, self.backbone.shift, sizes, next(self.backbone.parameters()).dtype
        )

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> TwoStageOutputs:
        """Compute the raw outputs of the proposal head and of all stages.

        Shape:
            images uint8 (N, 3, H, W); sizes (N, 2), height and width of every image inside the padding, None for no
            padding.
        """
        features = self.neck(self.backbone(self.normalize(images, sizes)))
        if sizes is None:
            sizes = torch.tensor(images.shape[2:], device=images.device).expand(len(images), 2)
        sizes = sizes.repeat(self.count_copies(features, images), 1)
        outputs = self.head(features)
        proposals = self.head.propose(outputs, sizes, self.selection.get("pre_nms", 1000))
        rois, raw = self.run_stages(features, proposals, sizes)
        return TwoStageOutputs(features, outputs, rois, proposals.counts, raw)

    def count_copies(self, features: Features, images: Tensor) -> int:
        """Count the branches that the feature maps of images (N, ...) hold."""
        # `len` would fix the number of images of a traced program
        return features[0].shape[0] // images.shape[0] if self.branched else 1

    def run_stages(self, features: Features, proposals: Proposals, sizes: Tensor) -> tuple[Tensor, StageOutputs]:
        """Run all stages on proposals.

        Returns:
            The last stage's RoIs (N * R, 5), and its outputs with the mean of all stages' logits.
        """
        rois = boxes_to_rois(proposals.boxes)
        raw = self.stages[0](features, rois)
        logits = raw[0]
        for previous, stage in zip(self.stages, self.stages[1:]):
            rois = torch.cat([rois[:, :1], previous.refine(raw, rois, sizes)], dim=1)
            raw = stage(features, rois)
            logits = logits + raw[0]
        return rois, (logits / len(self.stages), raw[1])

    def loss(self, batch: Batch) -> Losses:
        """Compute the unweighted losses of the proposal head, of each stage and of its branches.

        Where the neck has an auxiliary pyramid, each stage's auxiliary stage is trained on the same samples there.
        """
        assert batch.targets is not None
        features = self.backbone(self.normalize(batch.images, batch.sizes))
        features, auxiliary = compute_pyramids(self.neck, features)
        copies = self.count_copies(features, batch.images)
        targets, sizes = batch.targets * copies, batch.sizes.repeat(copies, 1)
        # one branch by itself, as in eval mode, takes all instances
        ranges = [own for own in self.valid_ranges for _ in range(len(batch))] if copies > 1 else []
        outputs = self.head(features)
        losses = self.head.loss(outputs, targets, sizes, ranges or None)
        proposals = self.head.propose(outputs, sizes, to_train=True, ranges=ranges or None)
        if ranges:
            targets = tuple(keep_in_range(target, own) for target, own in zip(targets, ranges, strict=True))
        for i, stage in enumerate(self.stages):
            samples = stage.sample(proposals, targets)
            raw = stage(features, samples.rois)
            terms = stage.loss(raw, samples, targets)
            for kind in self.branches:
                terms |= kind[i].loss(features, samples, targets, sizes)
            losses |= {self.term_name(i, name): value for name, value in terms.items()}
            if auxiliary is not None:
                losses |= self.auxiliary_loss(i, auxiliary, samples, targets)
            if i + 1 < len(self.stages):
                assert samples.is_ground_truth is not None
                boxes = stage.refine(raw, samples.rois, sizes, stage.classes(samples, targets))
                # the next stage adds the ground-truth boxes by itself
                proposed = (~samples.is_ground_truth).nonzero().squeeze(1)
                proposals = pad_to_proposals(boxes[proposed], samples.image[proposed], len(targets))
        return losses

    def auxiliary_loss(
        self, stage: int, auxiliary: Features, samples: StageSamples, targets: Sequence[Target]
    ) -> Losses:
        """Compute the losses of a stage's auxiliary stage, for every lateral those of all samples.

        Args:
            stage: Index of the stage.
            auxiliary: The neck's maps for the auxiliary stages.
            samples: S RoIs that the stage was trained on.
            targets: Of each image.

        References:
            "AugFPN: Improving Multi-Scale Feature Learning for Object Detection", Guo et al., 2020, section 3.2:
            consistent supervision.
        """
        head = self.auxiliary_stages[stage]
        logits, deltas = head(auxiliary, samples.rois)  # (L * S, ...): all samples of the finest lateral first
        assert isinstance(self.neck, AuxiliaryNeck)
        shape = (len(self.neck.lateral_levels), len(samples.rois))
        losses: Losses = {}
        for level, own in enumerate(logits.unflatten(0, shape)):
            raw = own, None if deltas is None else deltas.unflatten(0, shape)[level]
            terms = head.loss(raw, samples, targets)
            losses |= {self.term_name(stage, name, level): value for name, value in terms.items()}
        return losses

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        """Detect instances in pixels of the network's input, as padded tensors, with masks from a mask branch.

        Args:
            images: uint8 (N, 3, H, W).
            sizes: (N, 2), height and width of every image inside the padding.
            padded: Pad to max_det, which exports; otherwise to the largest count in the batch, so that branches compute
                less.
        """
        outputs = self(images, sizes)
        detections = self.select(outputs, sizes)
        return self.run_branches(outputs.features, detections if padded else detections.trimmed())

    def select(self, outputs: TwoStageOutputs, sizes: Tensor) -> BatchDetections:
        """Select the final detections of the last stage by NMS."""
        candidates = self.stages[-1].decode(outputs.raw, outputs.rois, outputs.counts)
        count, classes = candidates.scores.shape[1:]
        options = {k: v for k, v in self.selection.items() if k != "pre_nms"}
        copies = self.count_copies(outputs.features, sizes)
        detections = select_detections(candidates, sizes.repeat(copies, 1), [count], pre_nms=count * classes, **options)
        if copies == 1:
            return detections
        merged = merge_branches(detections, copies, self.num_classes, self.valid_ranges)
        count = merged.boxes.shape[1]
        return select_detections(merged, sizes, [count], pre_nms=count, **options)

    def run_branches(self, features: Features, detections: BatchDetections) -> BatchDetections:
        """Refine the boxes of detections and add the masks inside the refined boxes, as the branches do."""
        masks = None
        for kind in sorted(self.branches, key=lambda kind: not isinstance(kind[-1], BoxRefiner)):
            if isinstance(kind[-1], BoxRefiner):
                detections = kind[-1].refine(features, detections)
            else:
                predicted = [branch.predict(features, detections) for branch in cast("Sequence[MaskPredictor]", kind)]
                masks = torch.stack(predicted).mean(dim=0)
        return detections._replace(masks=masks)

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """Detect instances in every image in pixels of the network's input, highest score first.

        Masks (D, H, W) have the image's size, inside the padding.
        """
        padded = self.detect(batch.images, batch.sizes, padded=False)
        boxes, scores, labels = (
            [x[:n] for x, n in zip(column, padded.counts.tolist())]
            for column in (padded.boxes, padded.scores, padded.labels)
        )
        masks: list[Tensor | None] = [None] * len(boxes)
        if padded.masks is not None:
            masks = [
                paste_masks(m[: len(b)], b, (height, width))
                for m, b, (height, width) in zip(padded.masks, boxes, batch.sizes.tolist())
            ]
        return [Detections(*image) for image in zip(boxes, scores, labels, masks)]


def _module_list(parts: Sequence[Any]) -> nn.ModuleList:
    return nn.ModuleList(parts)
