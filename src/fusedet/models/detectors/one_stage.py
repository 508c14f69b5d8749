"""One-stage detectors: body, neck and dense head in one row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fusedet.models.ops.boxes import select
from fusedet.models.ops.image_normalization import normalise
from fusedet.types import Batch, BatchDetections, Detections, Losses, Outputs


class OneStage(nn.Module):
    """Body, neck and dense head: RetinaNet and all that is built like it.

    selection: options of `ops.boxes.select` (score, iou, pre_nms, max_det), its defaults where there are none.
    """

    def __init__(self, backbone: Any, neck: Any, head: Any, selection: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head
        self.selection = dict(selection or {})
        self.to(memory_format=torch.channels_last)

    @property
    def num_classes(self) -> int:
        """K, the number of classes that it tells apart."""
        return self.head.num_classes

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> Outputs:
        """Images uint8 (N, 3, H, W), of sizes (N, 2) inside their padding (all of it by default), to raw outputs."""
        return self.head(self.neck(self.backbone(self.normalise(images, sizes))))

    def normalise(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """uint8 images to what the body was trained on, in channels_last; the padding is 0 after it."""
        return normalise(
            images, self.backbone.scale, self.backbone.shift, sizes, next(self.backbone.parameters()).dtype
        )

    @property
    def loss_weights(self) -> dict[str, float]:
        """What each term of `loss` counts in the total."""
        weights: dict[str, float] = self.head.loss_weights
        extra = getattr(self.neck, "auxiliary_weight", 0.0)
        return weights | ({f"auxiliary_{name}": extra * weight for name, weight in weights.items()} if extra else {})

    def loss(self, batch: Batch) -> Losses:
        """The head's losses on a batch with targets, unweighted; on the neck's auxiliary pyramid too, where it has one."""
        if not getattr(self.neck, "auxiliary_weight", 0.0):
            return self.head.loss(self(batch.images, batch.sizes), batch.targets, batch.sizes)
        features = self.backbone(self.normalise(batch.images, batch.sizes))
        pyramid, unfused = self.neck.with_auxiliary(features)
        losses = self.head.loss(self.head(pyramid), batch.targets, batch.sizes)
        extra = self.head.loss(self.head(unfused), batch.targets, batch.sizes)
        return losses | {f"auxiliary_{name}": value for name, value in extra.items()}

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        """Final detections as tensors, in pixels of the network's input: padded to max_det, the form that exports, or to the most."""
        outputs = self(images, sizes)
        found = select(self.head.decode(outputs), sizes, outputs.priors.counts, **self.selection)
        return found if padded else found.trimmed()

    @torch.no_grad()
    def predict(self, batch: Batch) -> list[Detections]:
        """What is in each image of a batch, in pixels of the network's input, best first."""
        found = self.detect(batch.images, batch.sizes, padded=False)
        return [
            Detections(b[:n], s[:n], k[:n])
            for b, s, k, n in zip(found.boxes, found.scores, found.labels, found.counts.tolist())
        ]
