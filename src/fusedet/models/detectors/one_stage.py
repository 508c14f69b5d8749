"""One-stage detectors: backbone, neck and dense head."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusedet.models.detectors.neck_chain import auxiliary_weight, compute_pyramids
from fusedet.models.ops.boxes import select_detections
from fusedet.models.ops.image_normalization import normalize_images
from fusedet.models.protocols import Backbone, DenseHead, Neck, SelectingHead
from fusedet.types import Batch, BatchDetections, Detections, Losses, Outputs


class OneStage(nn.Module):
    """One-stage detector, such as RetinaNet, FCOS, VFNet and RepPoints.

    Args:
        backbone: Feature extractor.
        neck: Feature pyramid on the backbone's levels.
        head: Dense head on the neck's levels.
        selection: Options of `ops.boxes.select_detections` (score, iou, pre_nms, max_det, soft); its defaults where
            missing.
    """

    backbone: Backbone
    neck: Neck
    head: DenseHead

    def __init__(
        self, backbone: Backbone, neck: Neck, head: DenseHead, selection: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.selection = dict(selection or {})
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return self.head.num_classes

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight in the total of every term of `loss`."""
        weights = self.head.loss_weights
        extra = auxiliary_weight(self.neck)
        return weights | ({f"auxiliary_{name}": extra * weight for name, weight in weights.items()} if extra else {})

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Outputs:
        """Compute the head's raw outputs.

        Shape:
            images uint8 (N, 3, H, W); sizes (N, 2), height and width of every image inside the padding, None for no
            padding.
        """
        return self.head(self.neck(self.backbone(self.normalize(images, sizes))))

    def normalize(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Normalize images for the backbone, in channels_last; the padding becomes 0.

        Shape:
            images (N, C, H, W) uint8; sizes (N, 2), height and width inside the padding, None for no padding; result
            (N, C, H, W) of the type of the backbone's weights.
        """
        return normalize_images(
            images, self.backbone.scale, self.backbone.shift, sizes, next(self.backbone.parameters()).dtype
        )

    def loss(self, batch: Batch) -> Losses:
        """Compute the head's unweighted losses, and those on the neck's auxiliary pyramid where it has one."""
        assert batch.targets is not None
        if not auxiliary_weight(self.neck):  # through `forward`, which may be compiled
            return self.head.loss(self(batch.images, batch.sizes), batch.targets, batch.sizes)
        features = self.backbone(self.normalize(batch.images, batch.sizes))
        pyramid, auxiliary = compute_pyramids(self.neck, features)
        assert auxiliary is not None
        losses = self.head.loss(self.head(pyramid), batch.targets, batch.sizes)
        extra = self.head.loss(self.head(auxiliary), batch.targets, batch.sizes)
        return losses | {f"auxiliary_{name}": value for name, value in extra.items()}

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        """Detect instances in pixels of the network's input, as padded tensors.

        Args:
            images: uint8 (N, 3, H, W).
            sizes: (N, 2), height and width of every image inside the padding.
            padded: Pad to max_det, which exports; otherwise to the largest count in the batch.
        """
        outputs = self(images, sizes)
        select = self.head.select if isinstance(self.head, SelectingHead) else select_detections
        detections = select(self.head.decode(outputs), sizes, outputs.priors.counts, **self.selection)
        return detections if padded else detections.trimmed()

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """Detect instances in every image in pixels of the network's input, highest score first."""
        padded = self.detect(batch.images, batch.sizes, padded=False)
        return [
            Detections(b[:n], s[:n], k[:n])
            for b, s, k, n in zip(padded.boxes, padded.scores, padded.labels, padded.counts.tolist())
        ]
