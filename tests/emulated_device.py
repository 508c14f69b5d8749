"""An emulated CUDA device for machines without a GPU.

Tensors on it report the device cuda:0 and hold their values in CPU tensors. It raises an error where CUDA would refuse
an operator, and counts the places where the host would wait for the device.

    with EmulatedDevice(root=package_directory) as device:
        losses = detector.to("cuda").loss(batch.to("cuda"))
    device.waits()  # how often the host waited, and in which line

A wrapper subclass of Tensor stands for each tensor on the device. A dispatch mode runs every operator on the CPU
tensors inside and wraps the results. For C++ the tensors are on torch's Python-only backend, because autograd asks CUDA
itself for streams. It changes torch for the rest of the process, and so needs a process of its own: see
emulated_cases.py.

It does not model numerics, memory, time, several streams, NCCL or compilation.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

CUDA, CPU, BACKEND = torch.device("cuda:0"), torch.device("cpu"), "emulated"

INDEXING = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
FILLING = {"masked_fill", "masked_fill_", "index_fill", "index_fill_"}
"""With a value on the device, the host reads that value."""
SCALAR_OPERATORS = INDEXING | FILLING | {"where", "fill_"}
"""These take a scalar tensor on the CPU, as pointwise operators do."""
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot", "convolution"}
"""CUDA computes these for floating-point numbers only."""
WAITING = dict.fromkeys(
    ("nonzero", "masked_select", "equal", "allclose", "_unique2", "unique_dim", "unique_consecutive", "nms"), 1
) | {"bincount": 2, "_local_scalar_dense": 1}
"""How often the host waits in an operator whose output's size or value it needs."""

AUTOCAST_KEY = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
AUTOCAST_LISTS = {
    "LOWER_PRECISION_FP": "lower",
    "FP32": "float32",
    "FP32_SET_OPT_DTYPE": "float32",
    "PROMOTE": "widest",
}
"""The lists of operators in torch's header, and the precision in which autocast runs them."""


def reason_absent() -> str:
    """Return why the device cannot be emulated here, or an empty text."""
    if torch.cuda.is_available():
        return "a GPU is present: emulation would replace it"
    needed = {
        "torch.utils.backend_registration._setup_privateuseone_for_python_backend": _python_backend(),
        "torch._C._set_only_lift_cpu_tensors": getattr(torch._C, "_set_only_lift_cpu_tensors", None),
        "torch._C._ensureCUDADeviceGuardSet": getattr(torch._C, "_ensureCUDADeviceGuardSet", None),
        "torch._C._current_autograd_node": getattr(torch._C, "_current_autograd_node", None),
        "torch/include/ATen/autocast_mode.h": _autocast_header().exists(),
    }
    absent = [name for name, value in needed.items() if not value]
    return f"torch {torch.__version__} has no {', '.join(absent)}" if absent else ""


class EmulatedTensor(Tensor):
    """A tensor on the emulated device.

    Attributes:
        inner: The CPU tensor with its values.
    """

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)
    data = property(lambda self: self.detach(), lambda self, value: self._set_data(value))

    @staticmethod
    def __new__(cls, inner: Tensor) -> EmulatedTensor:
        layout = (inner.shape, inner.stride(), inner.storage_offset())
        options: dict[str, Any] = {"dtype": inner.dtype, "device": f"{BACKEND}:0", "_extra_dispatch_keys": AUTOCAST_KEY}
        wrapper = Tensor._make_wrapper_subclass(cls, *layout, **options)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of an emulated tensor outside of its EmulatedDevice")

    def _set_data(self, value: EmulatedTensor) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner

    # torch refuses the following methods to subclasses, or runs them in another way than for CUDA.

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value if isinstance(value, Tensor) else torch.tensor(value, dtype=self.dtype))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)

    def __repr__(self, **options: Any) -> str:
        return f"EmulatedTensor({self.inner!r})"


class Occurrence(NamedTuple):
    """What the host did with the device.

    Attributes:
        kind: "wait" (for everything queued), "event" (a wait for one event), "copy" (without a wait) or "note".
        what: The operator or the copy.
        where: File, line and function of the package.
    """

    kind: str
    what: str
    where: str


class EmulatedEvent:
    """Copies that began before the event was recorded have arrived once it has been waited for."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device
        self.copies: list[tuple[Tensor, Tensor]] = []

    def record(self, stream: Any = None) -> None:
        self.copies = list(self.device._pending)

    def synchronize(self) -> None:
        self.device._note("event", "Event.synchronize")
        self.device._arrive(self.copies)


class EmulatedStream:
    """The device's only stream."""

    def __init__(self, device: EmulatedDevice) -> None:
        self.device = device

    def synchronize(self) -> None:
        self.device._wait("Stream.synchronize")


class EmulatedDevice(TorchDispatchMode):
    """A context inside which "cuda" is a device.

    Args:
        root: The directory of the package whose lines are named.
        strict: Raise RuntimeError where CUDA would; otherwise count it in `faults`.
        trace: Name the line of the forward pass for what happens in the backward pass; slower.
    """

    def __init__(self, root: str | Path, *, strict: bool = True, trace: bool = False) -> None:
        super().__init__()
        self.root, self.strict, self.trace = str(root), strict, trace
        self.occurrences: list[Occurrence] = []
        self.faults: Counter[str] = Counter()
        self._pending: list[tuple[Tensor, Tensor]] = []  # copies to the host that have not arrived
        self._pinned: Any = WeakIdKeyDictionary()
        self._stack = contextlib.ExitStack()

    def waits(self, *kinds: str) -> Counter[tuple[str, str]]:
        """Count (what, where) of the occurrences of these kinds, by default "wait" and "event"."""
        chosen = kinds or ("wait", "event")
        return Counter((entry.what, entry.where) for entry in self.occurrences if entry.kind in chosen)

    def __enter__(self) -> EmulatedDevice:
        _register_backend()
        enter, future = self._stack.enter_context, torch.__future__
        values: dict[str, Any] = {"is_available": True, "is_initialized": True, "is_bf16_supported": True}
        values |= {"device_count": 1, "current_device": 0, "get_device_capability": (9, 0), "get_device_name": BACKEND}
        values |= dict.fromkeys(
            ("_lazy_init", "set_device", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state")
        )
        replaced: dict[str, Any] = {name: lambda *_, value=value, **__: value for name, value in values.items()}
        replaced["Event"] = lambda *_, **__: EmulatedEvent(self)
        replaced["current_stream"] = lambda *_: EmulatedStream(self)
        replaced["synchronize"] = lambda *_: self._wait("cuda.synchronize")
        replaced["get_rng_state"] = lambda *_, **__: torch.get_rng_state()
        replaced["get_rng_state_all"] = lambda *_, **__: [torch.get_rng_state()]
        replaced["set_rng_state_all"] = lambda *_, **__: None
        enter(mock.patch.multiple(torch.cuda, **replaced))
        enter(_notice_cpu_autocast(lambda: self._note("note", "autocast of the cpu")))
        # else optimizers and gradient clipping take the tensors one by one
        for module in (sys.modules[torch.optim.Optimizer.__module__], _foreach_utils):
            supported = [*module._foreach_supported_types, EmulatedTensor]
            enter(mock.patch.object(module, "_foreach_supported_types", supported))
        self._stack.callback(future.set_swap_module_params_on_conversion, future.get_swap_module_params_on_conversion())
        future.set_swap_module_params_on_conversion(True)  # so that Module.to keeps its parameters
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor(..., device="cuda") is dispatched here
        enter(torch.autograd.set_multithreading_enabled(False))
        if self.trace:
            enter(torch.autograd.set_detect_anomaly(True, check_nan=False))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def where(self) -> str:
        """Return the innermost line of the package; in the backward pass, the node or, traced, its line."""
        node, frame = torch._C._current_autograd_node(), inspect.currentframe()
        if node is not None:
            lines = [line for line in node.metadata.get("traceback_", ()) if self.root in line]
            match = re.search(r'File "(.+?)", line (\d+), in (\S+)', lines[-1]) if lines else None
            return (
                f"{self._relative(match[1])}:{match[2]} {match[3]}, backward" if match else f"{node.name()}, backward"
            )
        while frame and self.root not in frame.f_code.co_filename:
            frame = frame.f_back
        return (
            f"{self._relative(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"
            if frame
            else "outside"
        )

    def _relative(self, file: str) -> str:
        return file.partition(self.root)[2][1:]

    def _note(self, kind: str, what: str) -> None:
        self.occurrences.append(Occurrence(kind, what, self.where()))

    def _wait(self, what: str, times: int = 1) -> None:
        self.occurrences += [Occurrence("wait", what, self.where())] * times
        self._arrive(list(self._pending))

    def _arrive(self, copies: list[tuple[Tensor, Tensor]]) -> None:
        for target, source in copies:
            target.copy_(source)
        self._pending = [copy for copy in self._pending if all(copy is not arrived for arrived in copies)]

    def _fault(self, text: str) -> None:
        if self.strict:
            raise RuntimeError(f"{text} ({self.where()})")
        self.faults[f"{self.where()}: {text}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.partition("::")[2], dict(kwargs or {})
        flat, spec = tree_flatten((args, kwargs))
        tensors = [value for value in flat if isinstance(value, Tensor)]
        own = {id(tensor.inner): tensor for tensor in tensors if isinstance(tensor, EmulatedTensor)}
        requested = kwargs.get("device") and torch.device(kwargs["device"]).type
        result_on = "cuda" if requested == BACKEND or (own and not requested) else requested
        if name == "_pin_memory":
            self._pinned[pinned := args[0].clone()] = True
        if name in ("_pin_memory", "is_pinned"):
            return pinned if name == "_pin_memory" else args[0] in self._pinned
        if not own and result_on != "cuda":
            return func(*args, **kwargs)
        is_move = name == "_to_copy" and own and requested == "cuda"
        is_same_format = kwargs.get("memory_format") in (None, torch.preserve_format)
        if is_move and is_same_format and kwargs.get("dtype") in (None, args[0].dtype):
            return EmulatedTensor(args[0].inner)  # it is there already; C++ takes cuda for another device
        host = {
            id(tensor): tensor for tensor in tensors if not isinstance(tensor, EmulatedTensor) and tensor.device == CPU
        }
        if name in ("copy_", "_to_copy", "_foreach_copy_"):
            is_late = self._copy(name, args, kwargs, tensors, result_on)
        else:
            is_late = False
            self._check(name, func, args, kwargs, host)
        inner, options = tree_unflatten(
            [value.inner if isinstance(value, EmulatedTensor) else value for value in flat], spec
        )
        out = func(*inner, **(options | {"device": CPU} if requested and result_on == "cuda" else options))
        if is_late:  # until the copy arrives, the host would read these wrong values
            unset = torch.full_like(out, float("nan") if out.is_floating_point() else 77)
            self._pending.append((unset, out))
            return unset

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor) or result_on != "cuda" or value.device != CPU or id(value) in host:
                return value
            if (known := own.get(id(value))) is not None and torch.Tag.inplace_view in func.tags:
                with torch._C._DisableTorchDispatch():
                    func(*args, **kwargs)  # the wrapper's shape changes too, as in squeeze_
            return EmulatedTensor(value) if known is None else known

        return tree_map(wrap, out)

    def _copy(self, name: str, args: Any, options: dict[str, Any], tensors: list[Tensor], result_on: Any) -> bool:
        """Note a copy between host and device; return whether it arrives later."""
        source = tensors[-1]
        is_upload = result_on == "cuda" if name == "_to_copy" else isinstance(tensors[0], EmulatedTensor)
        if isinstance(source, EmulatedTensor) == is_upload or result_on == "meta":
            return False
        text = f"{'upload' if is_upload else 'download'} {tuple(source.shape)}"
        if options.get("non_blocking") or args[2:] == (True,):
            self._note("copy", text + (", pageable" if is_upload and source not in self._pinned else ""))
            return not is_upload and name == "_to_copy"
        self._wait(text)
        return False

    def _check(self, name: str, func: Any, args: Any, options: dict[str, Any], host: dict[int, Tensor]) -> None:
        """Find what CUDA would refuse of an operator on the device, and where the host would wait for it."""
        times, mixed = WAITING.get(name, 0), dict(host)
        if name in INDEXING:
            is_fill = len(args) > 2 and id(args[2]) in host and args[2].numel() == 1  # done as masked_fill
            for index in (index for index in args[1] if index is not None):
                times += not is_fill and index.dtype in (torch.bool, torch.uint8)
                if isinstance(args[0], EmulatedTensor) and mixed.pop(id(index), None) is not None:
                    self._wait(f"upload of an index {tuple(index.shape)}")
        times += str(func) == "aten.repeat_interleave.Tensor" and options.get("output_size") is None
        times += name in FILLING and isinstance(args[-1], EmulatedTensor)
        if times:
            self._wait(name, times)
        takes_scalars = torch.Tag.pointwise in func.tags or name in SCALAR_OPERATORS or name.startswith("_foreach")
        if any(tensor.dim() or not takes_scalars for tensor in mixed.values()):
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in mixed.values())
            self._fault(
                f"{name}: expected all tensors to be on the same device, those of shapes {shapes} are on the cpu"
            )
        elif mixed and name == "where":
            self._wait("upload ()", len(mixed))
        if (generator := options.get("generator")) is not None and generator.device == CPU:
            self._fault(f"{name}: expected a generator of cuda, got one of the cpu")
        dtypes = {value.dtype for value in tree_flatten(args)[0] if isinstance(value, EmulatedTensor)}
        if name in PRODUCTS and not all(dtype.is_floating_point for dtype in dtypes):
            self._fault(f"{name}: not implemented on cuda for integers")
        if torch.float64 in dtypes:
            self._note("note", f"{name} in float64")


# -- autocast for CUDA


def _cast(op: Any, policy: str, *args: Any, **kwargs: Any) -> Any:
    """Run an operator as autocast for CUDA would."""
    with torch._C._ExcludeDispatchKeyGuard(AUTOCAST_KEY):
        flat, spec = tree_flatten((args, kwargs))
        eligible = [
            isinstance(value, EmulatedTensor) and value.is_floating_point() and value.dtype != torch.float64
            for value in flat
        ]
        dtypes = {value.dtype for value, ok in zip(flat, eligible) if ok}
        is_full = policy == "float32" or (policy == "widest" and torch.float32 in dtypes)
        dtype = torch.float32 if is_full else torch.get_autocast_dtype("cuda")
        args, kwargs = tree_unflatten([value.to(dtype) if ok else value for value, ok in zip(flat, eligible)], spec)
        return op(*args, **kwargs)


def _cast_as_cuda() -> torch.library.Library:
    """Register autocast for emulated tensors, by the installed torch's own lists of operators."""
    library, header = torch.library.Library("aten", "IMPL"), _autocast_header().read_text()
    for macro, policy in AUTOCAST_LISTS.items():
        block = re.search(rf"#define AT_FORALL_{macro}\(_\)((?:.*\\\n)+.*)", header)
        assert block is not None, f"torch {torch.__version__} has no list {macro}"
        operators = re.findall(r"_\((\w+)(?:, (\w+))?\)", block[1])
        if macro == "FP32":  # torch lists them apart
            operators += [("norm", "Scalar"), ("norm", "ScalarOpt_dim")]
        for packet, overload in operators:
            if op := getattr(getattr(torch.ops.aten, packet, None), overload or "default", None):
                library.impl(op, functools.partial(_cast, op, policy), "AutocastCUDA", allow_override=True)
    return library


@contextlib.contextmanager
def _notice_cpu_autocast(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` whenever autocast for the CPU is entered, whether it switches it on or off."""
    original = torch.autocast.__enter__

    def enter(context: Any) -> Any:
        if context.device == "cpu":
            note()
        return original(context)

    with mock.patch.object(torch.autocast, "__enter__", enter):
        yield


# -- registration


def _autocast_header() -> Path:
    return Path(torch.__file__).parent / "include/ATen/autocast_mode.h"


def _python_backend() -> Any:
    from torch.utils import backend_registration

    return getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)


@functools.cache
def _register_backend() -> torch.library.Library:
    """Register what cannot be undone: a Python-only backend, a device guard for CUDA that does nothing, autocast."""
    if reason := reason_absent():
        raise RuntimeError(reason)
    _python_backend()(BACKEND)
    torch._C._ensureCUDADeviceGuardSet()
    return _cast_as_cuda()
