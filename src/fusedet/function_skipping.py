"""Contexts in which functions whose result does not matter are skipped."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.overrides import TorchFunctionMode

_DRAWS = (
    init.kaiming_normal_,
    init.kaiming_uniform_,
    init.normal_,
    init.uniform_,
    Tensor.normal_,
    Tensor.uniform_,
)
"""Functions that draw random weights. They are skipped for parameters only: a buffer may not be in the checkpoint."""
_NORMALIZATIONS = (F.batch_norm, F.group_norm)
"""Functions that keep the shape; torch takes a millisecond for each on the meta device."""


class _Skipping(TorchFunctionMode):
    """Skip some functions: their first argument is the result, unchanged."""

    def __init__(self, *functions: Callable[..., Tensor]) -> None:
        super().__init__()
        self.functions = frozenset(functions)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Skip the function, or run it."""
        options = kwargs or {}
        if func in self.functions:
            first = args[0] if args else next(iter(options.values()))
            if func in _NORMALIZATIONS or isinstance(first, nn.Parameter):
                return first
        return func(*args, **options)


def uninitialized() -> TorchFunctionMode:
    """Build models whose weights are all loaded afterwards: no random weights are drawn, which is most of the time."""
    return _Skipping(*_DRAWS)


def shapes_only() -> TorchFunctionMode:
    """Build and run models on the meta device, where tensors have shapes but no values."""
    return _Skipping(*_DRAWS, *_NORMALIZATIONS)
