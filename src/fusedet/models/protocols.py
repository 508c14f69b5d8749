"""The contracts between the parts of a detector, as structural types.

A part satisfies a contract by its methods and attributes; it inherits from nothing here. A class from another package
("pkg.mod:Class") plugs in the same way. Every part is an `nn.Module`: `__call__` runs its `forward`.

Symbols: N images of a batch, C channels, H and W cells of a feature map, K classes, P priors, G ground-truth instances,
R proposals of an image, M regions of interest (RoIs), S sampled RoIs, D detections. Boxes are (x1, y1, x2, y2) in
pixels of the network's input.

The protocols marked runtime-checkable have methods and plain numbers only. `isinstance` does not see an `nn.Module`'s
parameters, buffers and submodules from Python 3.12 on.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from fusedet.types import (
    Batch,
    BatchDetections,
    Candidates,
    Detections,
    Features,
    Levels,
    Losses,
    Outputs,
    Priors,
    Proposals,
    Target,
)

StageOutputs = tuple[Tensor, Tensor | None]
"""Raw outputs of an RoI stage for M RoIs: logits (M, K + 1), background last, and box deltas (M, 4), class-specific
ones (M, K * 4), or None for a stage without box regression."""


class Backbone(Protocol):
    """Feature extractor: normalized images to feature maps.

    Attributes:
        levels: Channels and strides of the feature maps, known before any image is seen.
        scale: (3, 1, 1). A uint8 image times `scale` plus `shift` is what the weights were trained on.
        shift: (3, 1, 1).
    """

    levels: Levels
    scale: Tensor
    shift: Tensor

    def __call__(self, images: Tensor) -> Features:
        """Compute the feature maps.

        Shape:
            images (N, 3, H, W), normalized; result: one map (N, C_l, ceil(H / stride_l), ceil(W / stride_l)) per level
            of `levels`, finest first.
        """
        ...

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over the parameters, as `nn.Module` does."""
        ...


class Neck(Protocol):
    """Feature pyramid: the feature maps of a backbone or of another neck to the levels of a pyramid.

    The constructor takes the incoming `levels: Levels`.

    Attributes:
        levels: Channels and strides of the pyramid's levels.
    """

    levels: Levels

    def __call__(self, features: Features) -> Features:
        """Compute the pyramid.

        Shape:
            features: incoming levels (N, C_l, H_l, W_l), finest first; result: one map per level of `levels`, finest
            first.
        """
        ...


@runtime_checkable
class AuxiliaryNeck(Neck, Protocol):
    """A neck with a second pyramid for auxiliary losses in training (AugFPN's consistent supervision).

    Attributes:
        auxiliary_weight: Weight of the auxiliary losses in the total; 0 turns them off.
        lateral_levels: The auxiliary pyramid's levels that are laterals of the backbone's maps, the finest ones. RoIs
            are pooled from these only.
    """

    auxiliary_weight: float
    lateral_levels: Levels

    def with_auxiliary(self, features: Features) -> tuple[Features, Features]:
        """Compute the pyramid and the auxiliary pyramid, the second of the first neck's `levels`."""
        ...


@runtime_checkable
class BranchedBackbone(Backbone, Protocol):
    """A backbone with parallel branches (TridentNet).

    Attributes:
        branches: Number of branches. In train mode the feature maps hold the batch once per branch, (branches * N, ...)
            with all images of the first branch first; in eval mode they may hold that of one branch only.
    """

    branches: int


class BackboneStage(Protocol):
    """A backbone's last stage, taken out of it to run on the pooled features of RoIs.

    Attributes:
        inputs: Channels of its input.
        channels: Channels of its output.
        stride: Quotient of the sizes of its input and output.
    """

    inputs: int
    channels: int
    stride: int

    def __call__(self, x: Tensor) -> Tensor:
        """Compute (M, inputs, H, W) to (M, channels, H / stride, W / stride)."""
        ...


class BranchInteraction(Protocol):
    """Exchange between the classification and the regression branch of a head, shared by all levels.

    The constructor takes the branches' `channels: int`.
    """

    def __call__(self, cls: Tensor, reg: Tensor) -> tuple[Tensor, Tensor]:
        """Compute both branches' new features.

        Shape:
            cls, reg and both results (N, C, H, W).
        """
        ...


class BlockPlugin(Protocol):
    """Options of a module that goes into the blocks of a backbone."""

    @property
    def positions(self) -> tuple[str, ...] | None:
        """Positions in every block; None for the default positions of the block's type."""
        ...

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages by ResNet's layer numbers: stage 2 ends at stride 8."""
        ...

    def make(self, channels: int, stage: int, position: str) -> nn.Module:
        """Make the module for one position, (N, channels, H, W) to the same shape."""
        ...


class Assigner(Protocol):
    """Label assignment: which prior is a positive for which ground-truth instance."""

    def assign(self, priors: Priors, target: Target, valid: Tensor | None = None) -> Tensor:
        """Assign the priors of one image.

        Args:
            priors: P priors of all levels.
            target: The image's ground truth.
            valid: Which priors take part; None for all. The others are ignored and influence nothing.

        Shape:
            valid (P,) bool; result (P,) int64: the index of the instance, -1 background, -2 ignored.
        """
        ...


class ScoreDecay(Protocol):
    """A suppression that lowers scores instead of dropping boxes (Soft-NMS)."""

    def select(self, boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, max_det: int) -> tuple[Tensor, Tensor]:
        """Select the detections of every image.

        Args:
            boxes: Candidates, xyxy in pixels.
            scores: Of the candidates.
            labels: Of the candidates.
            iou: IoU threshold of the suppression.
            max_det: Number of selected boxes.

        Shape:
            boxes (N, M, 4); scores (N, M), negative for boxes that do not count; labels (N, M); result: decayed scores
            (N, max_det), -1 where no box is left, and indices (N, max_det).
        """
        ...


class DenseHead(Protocol):
    """Dense prediction head: a pyramid to raw outputs, their losses, and their boxes and scores.

    The constructor takes `levels: Levels`, `num_classes: int` and `interact`, a function from channels to a
    `BranchInteraction`, or None.

    Attributes:
        num_classes: K.
        loss_weights: Weight in the total of every term of `loss`.
    """

    num_classes: int
    loss_weights: dict[str, float]

    def __call__(self, features: Features) -> Outputs:
        """Compute raw output maps per level, and the priors of their cells.

        Shape:
            features: levels (N, C, H_l, W_l), finest first; result: maps (N, ?, H_l, W_l) by name.
        """
        ...

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the unweighted loss terms.

        Shape:
            sizes (N, 2), height and width of every image inside the padding, None for no padding; result: scalars.
        """
        ...

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes and scores of all priors, before non-maximum suppression.

        Shape:
            result: boxes (N, P, 4) or (N, P, K, 4), scores (N, P, K).
        """
        ...


@runtime_checkable
class SelectingHead(DenseHead, Protocol):
    """A dense head with a selection of its own, such as PAA's score voting."""

    def select(
        self, candidates: Candidates, sizes: Tensor, level_counts: Sequence[int], **options: Any
    ) -> BatchDetections:
        """Select the final detections in place of `ops.boxes.select_detections`, with its arguments and options."""
        ...


@runtime_checkable
class EpochDependent(Protocol):
    """A part whose losses depend on the epoch (TOOD's assignment)."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the training, counted from 0; called before its first step, also after a resumption."""
        ...


@runtime_checkable
class ProposalHead(DenseHead, Protocol):
    """A dense head that proposes regions of interest (RPN).

    Both methods take the valid range of every image for a branch of TridentNet, a least and a largest size in pixels.
    """

    def loss(
        self,
        outputs: Outputs,
        targets: Sequence[Target],
        sizes: Tensor | None = None,
        ranges: Sequence[tuple[float, float | None]] | None = None,
    ) -> Losses:
        """Compute the unweighted loss terms, without the priors at instances outside the ranges."""
        ...

    def propose(
        self,
        outputs: Outputs,
        sizes: Tensor,
        pre_nms: int = 1000,
        to_train: bool = False,
        ranges: Sequence[tuple[float, float | None]] | None = None,
    ) -> Proposals:
        """Select each image's proposals, without gradient.

        Args:
            outputs: Raw outputs of the head.
            sizes: Height and width of every image inside the padding.
            pre_nms: Proposals per level that enter non-maximum suppression.
            to_train: Use the head's limits for training instead of `pre_nms`.
            ranges: Valid range of every image, outside which nothing is proposed; None for no limits.

        Shape:
            sizes (N, 2); result: boxes (N, R, 4) inside the images, scores (N, R), counts (N,).
        """
        ...


class RoIPooling(Protocol):
    """Pooling of RoIs to features of one size.

    The constructor takes `levels: Levels` and `size: int`, in cells.
    """

    def __call__(self, features: Features, rois: Tensor, sized_by: Tensor | None = None) -> Tensor:
        """Pool the features of every RoI.

        Args:
            features: Levels (N, C, H_l, W_l), finest first.
            rois: (M, 5), index of the image in the batch, then a box.
            sized_by: (M, 5), RoIs whose sizes choose the levels instead; a pooling from all levels needs none.

        Returns:
            (M, C, size, size).
        """
        ...


class StageSamples(Protocol):
    """RoIs of a batch that a stage is trained on, ordered by image."""

    @property
    def rois(self) -> Tensor:
        """(S, 5): index of the image in the batch, then a box."""
        ...

    @property
    def image(self) -> Tensor:
        """(S,) int64: index of the image in the batch."""
        ...

    @property
    def is_ground_truth(self) -> Tensor | None:
        """(S,) bool: whether the box is that of an instance itself, which the next stage adds again."""
        ...

    @property
    def positive(self) -> Tensor:
        """(S+,) int64: indices of the positive samples."""
        ...


Samples = TypeVar("Samples", bound=StageSamples)
TakenSamples = TypeVar("TakenSamples", bound=StageSamples, contravariant=True)


class RoIStage(Protocol[Samples]):
    """One stage of a two-stage detector: it classifies RoIs and refines their boxes.

    A stage trains on the samples that its own `sample` returns.

    The constructor takes `levels: Levels`, `num_classes: int` and `pooling`, a function from a size in cells to a
    module (features, rois (M, 5)) -> (M, C, size, size).

    Attributes:
        num_classes: K.
        loss_weights: Weight in the total of every term of `loss`.
        weight: Weight in the total of the stage's and its branches' losses.
    """

    num_classes: int
    loss_weights: dict[str, float]
    weight: float

    def __call__(self, features: Features, rois: Tensor) -> StageOutputs:
        """Compute logits and box deltas.

        Shape:
            rois (M, 5): index of the image in the batch, then a box.
        """
        ...

    def sample(self, proposals: Proposals, targets: Sequence[Target]) -> Samples:
        """Assign the proposals and sample the RoIs to train on, ground-truth boxes among them."""
        ...

    def loss(self, raw: StageOutputs, samples: Samples, targets: Sequence[Target]) -> Losses:
        """Compute the unweighted loss terms on samples of `sample`."""
        ...

    def classes(self, samples: Samples, targets: Sequence[Target]) -> Tensor:
        """Look up each sample's class (S,) int64; K for background."""
        ...

    def decode(self, raw: StageOutputs, rois: Tensor, counts: Tensor) -> Candidates:
        """Decode boxes and scores.

        Shape:
            rois (N * R, 5), of each image the first counts (N,) real; result: boxes (N, R, 4) or (N, R, K, 4), scores
            (N, R, K), 0 for padding.
        """
        ...

    def refine(self, raw: StageOutputs, rois: Tensor, sizes: Tensor, classes: Tensor | None = None) -> Tensor:
        """Refine the boxes for the next stage, without gradient.

        Args:
            raw: Outputs of the stage for `rois`.
            rois: The boxes to refine.
            sizes: Height and width of every image inside the padding.
            classes: Class of every RoI for class-specific deltas; None for the most likely one.

        Shape:
            rois (M, 5); sizes (N, 2); classes (M,); result (M, 4), inside the images.
        """
        ...


class RoIBranch(Protocol[TakenSamples]):
    """A branch beside a stage: it trains on the stage's samples and adds to the final detections.

    What it adds is the contract of `MaskPredictor` or `BoxRefiner`.

    Attributes:
        loss_weights: Weight of every term of `loss`, relative to the stage's `weight`.
    """

    loss_weights: dict[str, float]

    def loss(self, features: Features, samples: TakenSamples, targets: Sequence[Target], sizes: Tensor) -> Losses:
        """Compute the unweighted loss terms on the stage's `StageSamples`.

        Shape:
            sizes (N, 2), height and width of every image inside the padding; result: scalars.
        """
        ...


class MaskPredictor(RoIBranch[TakenSamples], Protocol[TakenSamples]):
    """An RoI branch that predicts masks."""

    def predict(self, features: Features, detections: BatchDetections) -> Tensor:
        """Predict a mask (N, D, size, size) of probabilities inside every detection's box."""
        ...


@runtime_checkable
class BoxRefiner(RoIBranch[TakenSamples], Protocol[TakenSamples]):
    """An RoI branch that refines the final boxes."""

    def refine(self, features: Features, detections: BatchDetections) -> BatchDetections:
        """Refine the boxes of detections; scores and order stay."""
        ...


class InferenceDetector(Protocol):
    """What inference needs of a detector, in PyTorch or exported: uint8 images to detections.

    Attributes:
        selection: Options of the final selection (score, iou, pre_nms, max_det).
    """

    selection: dict[str, Any]

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        """Detect instances, as padded tensors; exportable where `padded`.

        Shape:
            images uint8 (N, 3, H, W); sizes (N, 2); result: D = max_det where `padded`, else the most of an image.
        """
        ...


class Detector(InferenceDetector, Protocol):
    """A complete detector: uint8 images to losses in training and to detections in inference.

    Attributes:
        backbone: Its feature extractor.
    """

    backbone: Backbone

    @property
    def num_classes(self) -> int:
        """K."""
        ...

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight in the total of every term of `loss`."""
        ...

    def __call__(self, images: Tensor, sizes: Tensor | None = None) -> Any:
        """Compute raw outputs.

        Shape:
            images uint8 (N, 3, H, W); sizes (N, 2), height and width of every image inside the padding, None for no
            padding.
        """
        ...

    def loss(self, batch: Batch) -> Losses:
        """Compute the unweighted loss terms of a batch with targets, scalars."""
        ...

    def predict(self, batch: Batch) -> list[Detections]:
        """Detect instances in every image of a batch, highest score first."""
        ...
