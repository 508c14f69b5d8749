"""Stops a training whose losses or gradients are no longer finite, without a needless GPU synchronization."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, distributed

from fusedet.collectives import gather_objects
from fusedet.errors import DivergenceError

_ADVICE = (
    "lower the learning rate, clip the gradients, or look at these images' boxes; what was saved before is still whole"
)


class NanGuard:
    """Checks every batch's losses before the weights take them.

    `check_losses` starts copying the result to the host right after the forward pass, and `wait` waits for that copy
    only. The backward pass is queued in between, so the GPU never idles. A non-finite gradient norm is detected before
    the update on the CPU. On a GPU, where waiting for it would cost time, it is detected with the next batch, or by
    `check_weights` before anything is saved. All processes share one result, so that they stop at the same step.
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

    def check_losses(
        self, names: Sequence[str], values: Tensor, step: int, ids: tuple[int, ...], stop: int, save: bool
    ) -> None:
        """Begin to check one batch.

        Args:
            names: The loss terms.
            values: Their values (T,).
            step: The step's number, from 1.
            ids: The batch's image ids, for the message.
            stop: The signal that asked this process to end; 0: none.
            save: Whether a checkpoint is due by this process's clock.
        """
        self.step, self.ids, self._names, self._values = step, ids, names, values
        bad = ~(values.isfinite().all() & self._norm[0].isfinite())
        flags = torch.stack([bad.float(), *(torch.full((), float(flag), device=self.device) for flag in (stop, save))])
        if distributed.is_initialized():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        self._flags = flags.to("cpu", non_blocking=self.device.type == "cuda")
        if self.device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> tuple[int, bool]:
        """Wait for the result of `check_losses`.

        Returns:
            The signal that asked any process to stop (0: none), and whether a checkpoint is due in any.

        Raises:
            DivergenceError: In all processes, if a value is not finite in any of them.
        """
        if self._event is not None:
            self._event.synchronize()
        bad, stop, wanted = self._flags.tolist()
        if bad:
            raise DivergenceError(next(text for text in gather_objects(self._complaint()) if text is not None))
        return int(stop), bool(wanted)

    def check_gradient(self, norm: Tensor, ids: tuple[int, ...]) -> None:
        """Note the gradient norm of a step and, on the CPU, check it before the weights take it.

        Args:
            norm: Norm of all gradients, a scalar tensor ().
            ids: Image ids of the step's batches, for the message.

        Raises:
            DivergenceError: The norm is not finite, on the CPU; on a GPU `wait` or `check_weights` raises it later.
        """
        self._norm = (norm.detach(), self.step, ids)
        if self.device.type == "cpu" and not math.isfinite(norm):
            raise DivergenceError(self._gradient_complaint())

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Raise DivergenceError unless all weights and buffers are finite; called before they are saved."""
        finite = [tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point()]
        if finite and not torch.stack(finite).all():
            raise DivergenceError(f"the weights are no longer finite after step {self.step}: {_ADVICE}")

    def _complaint(self) -> str | None:
        for name, value in zip(self._names, self._values.tolist()):
            if not math.isfinite(value):
                return f"the loss term '{name}' is {value} at step {self.step}, images {_listed(self.ids)}: {_ADVICE}"
        return None if math.isfinite(self._norm[0].item()) else self._gradient_complaint()

    def _gradient_complaint(self) -> str:
        norm, step, ids = self._norm
        return f"the gradient norm is {norm.item()} at step {step}, images {_listed(ids)}: {_ADVICE}"


def _listed(ids: tuple[int, ...]) -> str:
    return ", ".join(map(str, ids))
