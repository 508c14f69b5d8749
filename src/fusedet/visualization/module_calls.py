"""Inputs and outputs of modules during a forward pass, recorded by hooks, in the autograd graph."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from fusedet.types import Features


class Call(NamedTuple):
    """Input and output tensors of one call of a module, lists flattened."""

    inputs: Features
    outputs: Features


Calls = Mapping[object, list[Call]]
"""The calls of modules. The keys are modules; parts, which are typed by their protocols, are looked up too."""


@contextmanager
def record_calls(modules: Sequence[nn.Module]) -> Iterator[Calls]:
    """Record the calls of modules within the context, in order.

    Each recorded tensor is in the autograd graph and is not overwritten later. A call's inputs are copies for this
    module only, so that their gradient has passed through this module.
    """
    calls: dict[object, list[Call]] = defaultdict(list)
    entered: dict[nn.Module, Features] = {}

    def before(module: nn.Module, args: Any) -> Any:
        inputs = _map_tensors(args, lambda x: _in_graph(x.clone()))
        entered[module] = _flatten(inputs)
        return _map_tensors(inputs, Tensor.clone)  # in-place operations change the second copy

    def after(module: nn.Module, args: Any, outputs: Any) -> Any:
        outputs = _map_tensors(outputs, _in_graph)
        calls[module].append(Call(entered.pop(module), _flatten(outputs)))
        return _map_tensors(outputs, Tensor.clone)

    hooks = [hook for m in modules for hook in (m.register_forward_pre_hook(before), m.register_forward_hook(after))]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply `change` to every tensor in tuples and lists."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_map_tensors(x, change) for x in value)
    return value


def _flatten(value: Any) -> Features:
    if isinstance(value, Tensor):
        return [value]
    return [x for part in value for x in _flatten(part)] if isinstance(value, (list, tuple)) else []


def _in_graph(x: Tensor) -> Tensor:
    """Return the tensor, or a leaf that requires a gradient if no parameter before it does."""
    return x if x.requires_grad or not x.is_floating_point() else x.detach().requires_grad_()
