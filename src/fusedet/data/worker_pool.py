"""The workers that read images ahead: what they are asked for, what chance each image sees, and what stands in for a bad one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from fusedet.data.collate import Sample, collate_views, make_samples
from fusedet.data.dataset import DetectionDataset
from fusedet.data.image_decoding import read_image
from fusedet.data.transforms import EvalTransform, Transform
from fusedet.errors import InputError
from fusedet.types import MULTIPLE, Batch

_TRIES = 100  # bad images in a row, after which looking for a good one is given up


class BatchRequest(NamedTuple):
    """What a worker is asked for: its own images, and all of the joint batch that they are padded like."""

    epoch: int
    own: tuple[int, ...]
    joint: tuple[int, ...]


class LoadedBatch(NamedTuple):
    """A batch, and the images that were replaced in it: their index and what was wrong."""

    batch: Batch
    bad: list[tuple[int, str]]


def shuffle_indices(count: int, seed: int, epoch: int) -> list[int]:
    """The indices of all images in the order of an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


@contextmanager
def _chance(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Torch's CPU generator as this sample has it; restored afterwards. No device's generator is touched."""
    state = int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(state)
        yield


@dataclass(frozen=True)
class BatchReader(Dataset[Any]):
    """`reader[step]` is the step's batch with what had to be replaced in it, or the InputError that kept it from being read (an error
    raised in a worker would lose its sentence in the loader's traceback).
    """

    dataset: DetectionDataset
    transform: Transform
    seed: int
    masks: bool
    views: tuple[EvalTransform, ...] = ()
    replace: bool = False

    def __getitem__(self, step: BatchRequest) -> LoadedBatch | InputError:
        try:
            images, bad = [], []
            for index in step.own:
                try:
                    images.append(self.samples(step.epoch, index))
                except InputError as error:
                    if not self.replace:
                        raise
                    bad.append((index, str(error)))
                    images.append(self.instead(step, index, str(error)))
            # other processes know nothing of the replacement: all pad as if the image were there
            others = set(step.joint) if bad else set(step.joint) - set(step.own)
            return LoadedBatch(collate_views(images, self.views, self.canvas(step.epoch, others)), bad)
        except InputError as error:
            return error

    def instead(self, step: BatchRequest, index: int, reason: str) -> list[Sample]:
        """What stands in for an image that cannot be read: the next one in the epoch's order that can be, and that does not make the
        joint batch larger. So it depends on seed, epoch, the joint batch and the files alone. Raises InputError where none is found.
        """
        order = shuffle_indices(len(self.dataset), self.seed, step.epoch)
        at, tried = order.index(index), 0
        limit = [-(-side // MULTIPLE) * MULTIPLE for side in self.canvas(step.epoch, set(step.joint))]
        for other in order[at + 1 :] + order[:at]:
            height, width = self.size(step.epoch, other)
            if len(step.joint) > 1 and (height > limit[0] or width > limit[1]):
                continue
            try:
                return self.samples(step.epoch, other)
            except InputError:
                tried += 1
                if tried == _TRIES:
                    break
        raise InputError(f"{reason} (and nothing could stand in for it: {tried} other images cannot be read either)")

    def samples(self, epoch: int, index: int) -> list[Sample]:
        """Image `index` as it comes in an epoch, and in the further views."""
        record = self.dataset[index]
        image = read_image(record.path)
        with _chance(self.seed, epoch, index):
            return make_samples(image, record, (self.transform, *self.views), self.masks)

    def canvas(self, epoch: int, indices: Iterable[int]) -> tuple[int, int]:
        """The largest height and width among images that this process need not read, by their annotated sizes."""
        sizes = [self.size(epoch, index) for index in indices]
        return max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1)

    def size(self, epoch: int, index: int) -> tuple[int, int]:
        """An image's (height, width) for the network in an epoch."""
        with _chance(self.seed, epoch, index):
            return self.transform.network_size(*self.dataset.sizes[index].tolist())


class WorkerPool:
    """Workers that stay alive between epochs and read whatever plan they are given."""

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: Transform,
        seed: int,
        masks: bool,
        workers: int,
        pin: bool,
        start_method: str | None,
        views: Sequence[EvalTransform] = (),
        replace: bool = False,
    ) -> None:
        self.plan: list[BatchRequest] = []  # filled anew for every run
        self.loader = DataLoader(
            BatchReader(dataset, transform, seed, masks, tuple(views), replace),
            sampler=self.plan,
            batch_size=None,
            num_workers=workers,
            collate_fn=_same,
            pin_memory=pin,
            persistent_workers=workers > 0,
            multiprocessing_context=start_method if workers else None,
            generator=torch.Generator(),  # of its own: torch's global one stays untouched
            worker_init_fn=_outlive_signals,
        )

    def run(self, plan: Iterable[BatchRequest]) -> Iterator[LoadedBatch]:
        """The plan's batches in order. Raises InputError for an image that cannot be read and is not replaced."""
        self.plan[:] = plan
        for loaded in self.loader:
            if isinstance(loaded, InputError):
                raise InputError(
                    str(loaded)
                )  # a new one: `loaded` would hold this frame in a cycle, and the workers would outlive it
            yield loaded


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group: the main process ends its workers itself, once it has saved.

    Where it is killed, they end too; torch's own watch misses that where workers are started by a fork server.
    """
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _same(batch: Any) -> Any:
    return batch
