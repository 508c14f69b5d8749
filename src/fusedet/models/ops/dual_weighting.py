"""DW's label assignment.

References:
    "A Dual Weighting Label Assignment Scheme for Object Detection", Li et al., 2022.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fusedet.errors import InputError, require_choice
from fusedet.models.ops.argument_checks import check_length, check_weight
from fusedet.models.ops.boxes import aligned_iou
from fusedet.models.ops.inside_pairs import Pairs, extremes_of_instance

LOW_IOU, HIGH_IOU = 0.5, 0.95  # where P_neg leaves 1 and reaches 0 (section 3.3)
CODE_SHARPNESS = 3.0  # of the exponential in the divisor of the authors' code
EPS = 1e-12

Weighting = Literal["paper", "code"]


@dataclass(frozen=True)
class DualWeighting:
    """Assignment of two weights to every pair of an instance and a point inside its box.

    With s the score of the instance's class and IoU that of the predicted box:

    - w_pos = e^(mu t) * t times the center prior, over its sum over the instance's points. t = s * IoU^beta, and the
      center prior is a Gaussian of the distance from the box's center (section 3.2).
    - P_neg = b - k * IoU^gamma falls from 1 at an IoU of 0.5 to 0 at 0.95 (section 3.3).

    In the authors' code ("code") exp(-beta * GIoU loss) stands for IoU^beta, the sum that divides w_pos has an
    exponential of 3 t, and P_neg reaches 0 at the instance's largest IoU, and 1 at its least one if above 0.5.

    Args:
        weighting: "paper" or "code".
        beta: Exponent of the IoU in the consistency t of score and box.
        mu: Sharpness of the positive weight.
        gamma: Exponent of the IoU in P_neg (gamma_1).
        sigma: Standard deviation of the center prior, in strides.

    Raises:
        InputError: An option is unknown or out of its range.
    """

    weighting: Weighting = "paper"
    beta: float = 5.0
    mu: float = 5.0
    gamma: float = 2.0
    sigma: float = 1.11

    def __post_init__(self) -> None:
        require_choice("weighting", self.weighting, Weighting)
        check_weight("beta", self.beta)
        check_weight("mu", self.mu)
        check_length("sigma", self.sigma)
        if not self.gamma > 0:
            raise InputError(f"gamma_iou={self.gamma} must be above 0")

    @torch.no_grad()
    def weigh(
        self, pairs: Pairs, rows: int, scores: Tensor, boxes: Tensor, box_losses: Tensor, away: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute w_pos and P_neg, both (M,), without gradient.

        Args:
            pairs: The M pairs.
            rows: Number of instances that `pairs.row` counts.
            scores: Predicted score of the instance's class.
            boxes: Predicted box of the point.
            box_losses: GIoU loss of that box.
            away: The point's distance from the box's center along x and y, in strides.

        Shape:
            scores and box_losses (M,); boxes (M, 4); away (M, 2).
        """
        iou, is_code = aligned_iou(boxes, pairs.boxes), self.weighting == "code"
        center = (-away.square().sum(dim=1) / (2 * self.sigma**2)).exp()
        t = scores * ((-self.beta * box_losses).exp() if is_code else iou**self.beta)
        mass = t * center
        summands = ((CODE_SHARPNESS if is_code else self.mu) * t).exp() * mass
        total = mass.new_zeros(rows).index_add(0, pairs.row, summands).clamp(min=torch.finfo(mass.dtype).tiny)
        return (self.mu * t).exp() * mass / total[pairs.row], self._negative_probability(iou, pairs, rows)

    def _negative_probability(self, iou: Tensor, pairs: Pairs, rows: int) -> Tensor:
        """Compute P_neg (M,)."""
        falling = -(iou**self.gamma)
        if self.weighting == "paper":
            low, high = -(HIGH_IOU**self.gamma), -(LOW_IOU**self.gamma)
            return ((falling - low) / (high - low)).clamp(0, 1)
        least, largest = extremes_of_instance(pairs, falling, rows)
        largest = largest.clamp(max=-(LOW_IOU**self.gamma))
        return torch.where(iou < LOW_IOU, 1.0, (falling - least + EPS) / (largest - least + EPS))
