"""A model shared out among processes: each keeps a part of the weights, gradients and optimiser state (torch's FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning_fabric.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def strategy(world: int) -> ModelParallelStrategy:
    """Fabric's strategy for it, over `world` processes."""
    return ModelParallelStrategy(
        _share, data_parallel_size=world, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _share(module: nn.Module, mesh: DeviceMesh) -> nn.Module:
    # one group: a detector's losses use parts outside their own forward pass, where a group of their own would not be gathered
    module.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    fully_shard(module, mesh=mesh["data_parallel"])
    module.register_forward_pre_hook(equal_buffers)
    return module


def equal_buffers(module: nn.Module, _: Any = None) -> None:
    """Give a module's buffers, in all processes, the values of the first one's: one broadcast per kind of number. All processes call it."""
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for buffer in module.buffers():
        kinds.setdefault(buffer.dtype, []).append(buffer)
    for buffers in kinds.values():
        together = torch.cat([buffer.reshape(-1) for buffer in buffers])
        distributed.broadcast(together, 0)
        for buffer, part in zip(buffers, together.split([buffer.numel() for buffer in buffers])):
            buffer.data.copy_(part.view_as(buffer))


def is_shared(module: nn.Module) -> bool:
    """Whether a module's weights are shared out among the processes."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The whole weights in every process inside, to be read only; nothing where they are not shared out. All processes call it."""
    groups = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for group in groups:
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()


def whole(value: Any, device: str | None = None) -> Any:
    """Nested dicts and lists with every shared tensor as the whole one, on a device if one is named. All processes call it."""
    if isinstance(value, Mapping):
        return {key: whole(one, device) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(one, device) for one in value)
    return value.full_tensor().to(device) if isinstance(value, DTensor) else value


def weights(module: nn.Module, optimizer: Any) -> dict[str, Any]:
    """A checkpoint's "model" and "optimizer"; where they are shared out, whole copies on the CPU. All processes call it."""
    inner = getattr(optimizer, "optimizer", optimizer)  # Fabric gives the state to the first process alone
    state: dict[str, Any] = whole({"model": module.state_dict(), "optimizer": inner.state_dict()}, "cpu")
    return state


def share_weights(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Whole weights as this process's part of them, where the module has parts; those of another shape as they are."""
    own = module.state_dict()
    return {key: _like(value, own.get(key)) for key, value in weights.items()}


def share_optimizer(state: Mapping[str, Any], optimizer: Any) -> dict[str, Any]:
    """A whole optimiser's state as this process's part of it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shared = {i: {key: _like(value, parameters[i]) for key, value in one.items()} for i, one in state["state"].items()}
    return {**state, "state": shared}


def _like(value: Any, own: Tensor | None) -> Any:
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
