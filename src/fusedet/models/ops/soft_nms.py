"""Soft-NMS, an alternative to the suppression of `boxes.select_detections`.

References:
    "Soft-NMS: Improving Object Detection With One Line of Code", Bodla et al., 2017.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusedet.errors import InputError, require_choice
from fusedet.models.ops.boxes import aligned_iou

SoftNMSMethod = Literal["linear", "gaussian"]


@dataclass(frozen=True)
class SoftNMS:
    """Options of Soft-NMS; details as in MMDetection 3.x.

    Args:
        method: "linear", a factor of 1 - IoU from the IoU threshold on (eq. 2), or "gaussian", exp(-IoU^2 / sigma)
            (eq. 3), which has no threshold.
        sigma: Width of "gaussian".
        min_score: Boxes whose decayed score is lower are dropped.

    Raises:
        InputError: An option is unknown or out of its range.
    """

    method: SoftNMSMethod = "linear"
    sigma: float = 0.5
    min_score: float = 0.001

    def __post_init__(self) -> None:
        require_choice("method", self.method, SoftNMSMethod)
        if not self.sigma > 0 or not 0 <= self.min_score <= 1:
            raise InputError(f"sigma={self.sigma} must be above 0 and min_score={self.min_score} 0 to 1")

    @torch.no_grad()
    def select(self, boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, max_det: int) -> tuple[Tensor, Tensor]:
        """Select the box of the highest score and decay those of its class, `max_det` times.

        Scores only decrease, so the selected ones are sorted. No step depends on the data, so that it exports, one
        step after the other.

        Args:
            boxes: Candidates, xyxy in pixels.
            scores: Of the candidates.
            labels: Of the candidates.
            iou: From this IoU on the linear method decays a score.
            max_det: Number of selected boxes.

        Shape:
            boxes (N, M, 4); scores (N, M), negative for boxes that do not count; labels (N, M); result: decayed scores
            (N, max_det), -1 where no box is left, and indices (N, max_det).
        """
        values, indices = [], []
        for _ in range(max_det):
            index = scores.argmax(dim=1, keepdim=True)  # (N, 1), the first of equal ones
            values.append(scores.gather(1, index))
            indices.append(index)
            overlap = aligned_iou(boxes, boxes.gather(1, index[..., None].expand(-1, -1, 4)))  # (N, M)
            if self.method == "linear":
                factor = torch.where(overlap >= iou, 1 - overlap, 1.0)
            else:
                factor = (-overlap.square() / self.sigma).exp()
            scores = torch.where(labels == labels.gather(1, index), scores * factor, scores)
            scores = torch.where(scores < self.min_score, -1.0, scores).scatter(1, index, -1.0)
        return torch.cat(values, dim=1), torch.cat(indices, dim=1)
