"""Checks of the options that several heads and assigners share."""

import math
from collections.abc import Mapping, Sequence

from fusedet.errors import InputError


def check_focal(alpha: float, gamma: float, prior: float) -> None:
    """Check the weight and exponent of a focal loss, and the initial score.

    Raises:
        InputError: A value is out of its range.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha} must be 0 to 1")
    check_weight("gamma", gamma)
    check_prior(prior)


def check_prior(prior: float) -> None:
    """Check the initial score.

    Raises:
        InputError: It is out of its range.
    """
    if not 0 < prior < 1:
        raise InputError(f"prior={prior} must be above 0 and below 1")


def check_iou_thresholds(positive: float, negative: float) -> None:
    """Check the IoU thresholds of an assignment.

    Raises:
        InputError: A value is out of its range.
    """
    if not 0 <= negative <= positive <= 1:
        raise InputError(
            f"negative={negative}, positive={positive} must be IoU thresholds, 0 <= negative <= positive <= 1"
        )


def check_anchors(scale_name: str, scale: float | Sequence[float], ratios: Sequence[float]) -> None:
    """Check the sides of anchors in strides, an option of the given name, and their height / width.

    Raises:
        InputError: A value is out of its range.
    """
    scales = [scale] if isinstance(scale, (int, float)) else scale
    if not scales:
        raise InputError(f"{scale_name}=[] must be one or more lengths in strides")
    for value in scales:
        check_length(scale_name, value)
    if not ratios or not all(0 < ratio < math.inf for ratio in ratios):
        raise InputError(f"ratios={list(ratios)} must be one or more numbers above 0")


def check_length(name: str, strides: float) -> None:
    """Check a length in strides.

    Raises:
        InputError: It is not above 0.
    """
    if not 0 < strides < math.inf:
        raise InputError(f"{name}={strides} must be above 0, in strides")


def check_weight(name: str, weight: float) -> None:
    """Check the weight or the exponent of a loss.

    Raises:
        InputError: It is negative or not finite.
    """
    if not 0 <= weight < math.inf:
        raise InputError(f"{name}={weight} must be 0 or more")


def check_loss_weights(weights: Mapping[str, float]) -> None:
    """Check the losses' weights in the total; that of "loss_box" is the option "box_weight".

    Raises:
        InputError: A weight is negative or not finite.
    """
    for name, weight in weights.items():
        check_weight(name.removeprefix("loss_") + "_weight", weight)
