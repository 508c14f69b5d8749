"""Stops a training whose losses or gradients are no longer finite, without making the device wait."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fusedet.errors import DivergenceError


class NonFinite(DivergenceError):  # noqa: N818
    """A loss, a gradient or a weight became infinite or not a number; the last checkpoint is from before."""


class Watch:
    """Looks at every batch's losses before the weights take them.

    `look` starts copying the verdict to the host right after the forward pass, `verdict` waits for that copy only: the backward
    pass is queued in between, so a GPU never runs dry. A non-finite gradient norm is found before the update on the CPU; on a
    GPU, where waiting for it would cost time, together with the next batch, or by `healthy` before anything is saved.
    Several processes share one verdict, so that all stop at the same step.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.step = 0
        self.ids: tuple[int, ...] = ()
        self._names: Sequence[str] = ()
        self._values = torch.zeros(0, device=device)
        self._flags = torch.zeros(3)
        self._event: torch.cuda.Event | None = None
        self._norm: tuple[Tensor, int, tuple[int, ...]] = (torch.zeros((), device=device), 0, ())

    def look(
        self, names: Sequence[str], values: Tensor, step: int, ids: tuple[int, ...], stop: int = 0, save: bool = False
    ) -> None:
        """Begin to check one batch: values (T,) of the named loss terms.

        stop: the signal that asked this process to end, 0 where none did; save: by its clock a checkpoint is due.
        """
        self.step, self.ids, self._names, self._values = step, ids, names, values
        bad = ~(values.isfinite().all() & self._norm[0].isfinite())
        flags = torch.stack([bad.float(), *(torch.full((), float(flag), device=self.device) for flag in (stop, save))])
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        self._flags = flags.to("cpu", non_blocking=self.device.type == "cuda")
        if self.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def verdict(self) -> tuple[int, bool]:
        """The signal by which any process was asked to stop, or 0, and whether any wants to save.

        Raises NonFinite, in all processes, for what `look` saw in any of them.
        """
        if self._event is not None:
            self._event.synchronize()
        bad, stop, wanted = self._flags.tolist()
        if bad:
            raise NonFinite(_agreed(self._complaint()))
        return int(stop), bool(wanted)

    def gradient(self, norm: Tensor, ids: tuple[int, ...]) -> None:
        """Note the gradient norm of the step of these images, which the weights take next."""
        self._norm = (norm.detach(), self.step, ids)
        if self.device.type == "cpu" and not math.isfinite(norm):
            raise NonFinite(self._gradient())

    def healthy(self, weights: Mapping[str, Tensor]) -> None:
        """Raise NonFinite unless all weights and buffers are finite: asked before they are saved."""
        finite = [tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point()]
        if finite and not torch.stack(finite).all():
            raise NonFinite(f"the weights are no longer finite after step {self.step}: {_ADVICE}")

    def _complaint(self) -> str | None:
        for name, value in zip(self._names, self._values.tolist()):
            if not math.isfinite(value):
                return f"the loss term '{name}' is {value} at step {self.step}, images {_listed(self.ids)}: {_ADVICE}"
        return None if math.isfinite(self._norm[0].item()) else self._gradient()

    def _gradient(self) -> str:
        norm, step, ids = self._norm
        return f"the gradient norm is {norm.item()} at step {step}, images {_listed(ids)}: {_ADVICE}"


_ADVICE = (
    "lower the learning rate, clip the gradients, or look at these images' boxes; what was saved before is still whole"
)


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(str(one) for one in ids)


def _agreed(complaint: str | None) -> str:
    """The first complaint of all processes."""
    if not torch.distributed.is_initialized():
        return str(complaint)
    complaints: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(complaints, complaint)
    return next(text for text in complaints if text is not None)
