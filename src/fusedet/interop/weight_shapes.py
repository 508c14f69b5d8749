"""Sizes of weights in an untrusted checkpoint, by name."""

from collections.abc import Mapping

from torch import Tensor

from fusedet.errors import InputError


def axis_size(state: Mapping[str, Tensor], key: str, number: int = 0) -> int:
    """Return the size of a weight along an axis.

    Raises:
        InputError: The weight is absent, has no such axis, or is empty.
    """
    if key not in state:
        raise InputError(f"the weights lack {key}, which gives the size of the detector: use a complete checkpoint")
    shape = tuple(state[key].shape)
    if len(shape) <= number or 0 in shape:
        raise InputError(
            f"the weights' {key} has the shape {shape}: it must have at least {number + 1} axes, none of them empty"
        )
    return shape[number]
