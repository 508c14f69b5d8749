"""OTA's head.

References:
    "OTA: Optimal Transport Assignment for Object Detection", Ge et al., 2021.
"""

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor
from torch.nn import functional as F

from fusedet.models.heads.fcos import FCOSHead
from fusedet.models.heads.scores import fuse_quality
from fusedet.models.heads.towers import InteractionFactory, TowerOptions
from fusedet.models.ops.argument_checks import check_loss_weights, check_weight
from fusedet.models.ops.assigners import gather_positives
from fusedet.models.ops.boxes import aligned_iou
from fusedet.models.ops.layers import flatten_maps
from fusedet.models.ops.losses import assigned_focal_loss, giou_loss, mean_over_ranks
from fusedet.models.ops.optimal_transport import OptimalTransportAssigner
from fusedet.types import Candidates, Levels, Losses, Outputs, Target


class OTAHead(FCOSHead):
    """FCOS's head with OTA's assignment, and a predicted IoU in place of the centerness (section 4.1).

    The parameters are those of FCOS, 32,072,026 of `ota_r50` with 80 classes. The map "centerness" holds the logit of
    the predicted IoU, from the box tower. Boxes are in strides, and points lie at the upper left corners of cells, both
    as in the authors' code.

    Args:
        levels: As in `FCOSHead`.
        num_classes: As in `FCOSHead`.
        interact: As in `FCOSHead`.
        radius: As in `OptimalTransportAssigner`.
        topk: As in `OptimalTransportAssigner`.
        cost_weight: `box_weight` of `OptimalTransportAssigner`.
        regularization: As in `OptimalTransportAssigner`.
        steps: As in `OptimalTransportAssigner`.
        alpha: Weight of the positives in the focal loss and in the cost.
        gamma: Exponent of the focal loss and of the cost.
        prior: Initial score of every point.
        box_weight: Weight of the GIoU loss.
        iou_weight: Weight of the predicted IoU's loss.
        **towers: As in `FCOSHead`.

    Raises:
        InputError: An option is out of its range.
    """

    def __init__(
        self,
        levels: Levels,
        num_classes: int,
        interact: InteractionFactory | None = None,
        radius: float = 2.5,
        topk: int = 20,
        cost_weight: float = 1.5,
        regularization: float = 0.1,
        steps: int = 50,
        alpha: float = 0.25,
        gamma: float = 2.0,
        prior: float = 0.01,
        box_weight: float = 2.0,
        iou_weight: float = 0.5,
        **towers: Unpack[TowerOptions],
    ) -> None:
        super().__init__(
            levels,
            num_classes,
            interact,
            normalize_boxes=True,
            centerness_on_box=True,
            alpha=alpha,
            gamma=gamma,
            prior=prior,
            offset=0.0,
            **towers,
        )
        check_weight("cost_weight", cost_weight)
        self.loss_weights = {"loss_cls": 1.0, "loss_box": box_weight, "loss_iou": iou_weight}
        check_loss_weights(self.loss_weights)
        self.transport = OptimalTransportAssigner(radius, topk, cost_weight, regularization, steps, alpha, gamma)

    def loss(self, outputs: Outputs, targets: Sequence[Target], sizes: Tensor | None = None) -> Losses:
        """Compute the focal loss, the GIoU loss and the predicted IoU's binary cross-entropy.

        All are divided by the positives of the batch, at least 1. `sizes` is unused: points beyond an image's edge
        count as background, as in FCOS.
        """
        logits = flatten_maps(outputs.maps["cls"], self.num_classes)  # (N, P, K)
        boxes = self.decode_all(outputs)  # (N, P, 4)
        assigned = self.transport.assign_predictions(logits, boxes, outputs.priors, targets)  # (N, P)
        positives = gather_positives(assigned, targets)
        predicted = boxes[positives.image, positives.prior]  # (R, 4)
        iou = aligned_iou(predicted.detach(), positives.boxes)
        quality = flatten_maps(outputs.maps["centerness"], 1)[positives.image, positives.prior, 0].float()
        count = mean_over_ranks((assigned >= 0).sum())
        return {
            "loss_cls": assigned_focal_loss(logits, assigned, positives, self.alpha, self.gamma) / count,
            "loss_box": giou_loss(predicted, positives.boxes).sum() / count,
            "loss_iou": F.binary_cross_entropy_with_logits(quality, iou, reduction="sum") / count,
        }

    def decode(self, outputs: Outputs) -> Candidates:
        """Decode boxes (N, P, 4) and scores (N, P, K), the roots of class scores times predicted IoU."""
        return fuse_quality(super().decode(outputs))
