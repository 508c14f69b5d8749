"""The sizes of a stranger's weights, asked for by name."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fusedet.errors import InputError


def axis_size(state: Mapping[str, Tensor], key: str, number: int = 0) -> int:
    """The size of a weight along one of its axes. Raises InputError where the weight is absent, has no such axis, or is empty."""
    if key not in state:
        raise InputError(f"the weights lack {key}, which tells the size of the detector: give a whole checkpoint")
    shape = tuple(state[key].shape)
    if len(shape) <= number or 0 in shape:
        raise InputError(
            f"the weights' {key} has the shape {shape}: it should have {number + 1} axes or more, none of them empty"
        )
    return shape[number]
