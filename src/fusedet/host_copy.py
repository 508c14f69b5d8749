"""Copies of tensors from a GPU to the host with one synchronization."""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

ValueT = TypeVar("ValueT")


def copy_to_host(value: ValueT) -> ValueT:
    """Copy every tensor of a nested value to the CPU, with one synchronization with the GPU, not one per tensor.

    The copies of CUDA tensors lie in page-locked memory, which torch keeps and uses again.

    Args:
        value: A tensor, or dicts, lists and tuples that hold tensors and other values.

    Returns:
        The same structure. Tensors on the CPU and values of other types are the same objects.
    """
    streams: dict[torch.device, Any] = {}
    copied = _copy(value, streams)
    for stream in streams.values():
        stream.synchronize()
    return copied


def _copy(value: Any, streams: dict[torch.device, Any]) -> Any:
    if isinstance(value, Tensor):
        if not value.is_cuda:
            return value.cpu()  # the same tensor where it is on the CPU; MPS has no copy to synchronize with later
        if value.device not in streams:
            streams[value.device] = torch.cuda.current_stream(value.device)
        return value.detach().to("cpu", non_blocking=True)
    if isinstance(value, Mapping):
        return {key: _copy(item, streams) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(item, streams) for item in value)
    return value
