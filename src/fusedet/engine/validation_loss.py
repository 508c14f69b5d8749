"""The detector's loss on the validation split, computed while its batches go to the evaluation."""

from collections.abc import Iterable, Iterator

import torch

from fusedet.collectives import gather_objects
from fusedet.engine import rng
from fusedet.engine.buffers import preserved_buffers
from fusedet.models.detectors import DetectorModule
from fusedet.models.ops.losses import normalizing_locally, sum_losses
from fusedet.types import Batch

PREFIX = "val_"
"""Begins the name of a validation loss: val_loss, val_loss_cls, ..."""


class ValidationLoss:
    """The mean losses over the images of a split.

    Each batch leaves the detector as it was: modules that count batches or draw samples, as Dynamic R-CNN and two-stage
    detectors do, get their buffers back, and the random generators their states. A checkpoint that an interrupt saves
    in the middle of a validation depends on that. Every validation draws the same samples.

    Args:
        detector: In eval mode, with `loss` and `loss_weights`.
        device: Where the images go.
    """

    def __init__(self, detector: DetectorModule, device: torch.device) -> None:
        self.detector, self.device = detector, device
        self.names: list[str] = []
        self.sums = torch.zeros(0, device=device, dtype=torch.float64)  # of the terms, the total and the images

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches with targets, on the device, after adding the losses of each."""
        for number, batch in enumerate(batches):
            own = batch.to(self.device, non_blocking=True)
            self._add(own, number)
            yield own

    @torch.no_grad()
    def _add(self, batch: Batch, number: int) -> None:
        with rng.preserve_states(), preserved_buffers(self.detector), normalizing_locally():
            torch.manual_seed(number)
            terms = self.detector.loss(batch)
        total = sum_losses(terms, self.detector.loss_weights, torch.float64)
        values = torch.stack([*(value.double() for value in terms.values()), total, torch.ones_like(total)])
        self.names = [*terms, "loss"]
        self.sums = self.sums + len(batch) * values if len(self.sums) else len(batch) * values

    def means(self) -> dict[str, float]:
        """Return the mean of each term and of the total over the images of all processes, as val_NAME.

        Every process calls it.
        """
        own = dict(zip([*self.names, "images"], self.sums.tolist(), strict=False))
        sums: dict[str, float] = {}
        for of_rank in gather_objects(own):  # empty for a process without an image
            for name, value in of_rank.items():
                sums[name] = sums.get(name, 0.0) + value
        images = sums.pop("images")
        return {f"{PREFIX}{name}": value / images for name, value in sums.items()}
