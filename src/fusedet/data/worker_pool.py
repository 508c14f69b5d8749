"""Worker processes that load batches: per-sample random state, and the replacement of bad images."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusedet.data.augmentation import AugmentedTransform
from fusedet.data.collate import Sample, collate_tta_samples, make_samples
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.dataset_images import TileReader, read_dataset_image
from fusedet.data.transforms import EvalTransform, Transform
from fusedet.errors import InputError
from fusedet.types import MULTIPLE, Batch

_MAX_ATTEMPTS = 100  # bad images in a row, after which the search for a replacement ends


class BatchRequest(NamedTuple):
    """The request for a batch.

    Attributes:
        epoch: The epoch, from 0.
        local: Indices of the images that this process loads; i + k N is the k-th repetition of image i of N.
        joint: The same of all processes, whose images are padded alike.
    """

    epoch: int
    local: tuple[int, ...]
    joint: tuple[int, ...]


class LoadedBatch(NamedTuple):
    """A batch, and the index and fault of each image that was replaced in it."""

    batch: Batch
    bad: list[tuple[int, str]]


def shuffle_indices(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order of the images in an epoch."""
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


@contextmanager
def _seed_sample(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Seed torch's CPU generator for one sample and restore it afterwards; generators of devices stay untouched."""
    state = int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(state)
        yield


@dataclass(frozen=True)
class BatchReader(Dataset[Any]):
    """Load the batch of a request, or return the InputError that prevented it.

    The error is returned because the loader would bury the message of a raised one in a worker's traceback.

    Attributes:
        dataset: The images and their annotations.
        transform: The transform of each image.
        seed: Seed of the data augmentation.
        masks: Whether targets have masks.
        tta_transforms: Further transforms of each image, for test-time augmentation.
        replace: Whether bad images are replaced.
        tile_reader: Reads the tiles of a dataset that are seen image by image; None reads each by itself.
    """

    dataset: DetectionDataset
    transform: Transform
    seed: int
    masks: bool
    tta_transforms: tuple[EvalTransform, ...] = ()
    replace: bool = False
    tile_reader: TileReader | None = None

    def __getitem__(self, request: BatchRequest) -> LoadedBatch | InputError:
        try:
            images, bad = [], []
            for index in request.local:
                try:
                    images.append(self.load_samples(request.epoch, index))
                except InputError as error:
                    if not self.replace:
                        raise
                    bad.append((index % len(self.dataset), str(error)))
                    images.append(self.load_replacement(request, index, str(error)))
            # other processes do not know of the replacement: all pad as if the bad image were in the batch
            unread = set(request.joint) if bad else set(request.joint) - set(request.local)
            return LoadedBatch(
                collate_tta_samples(images, self.tta_transforms, self.largest_size(request.epoch, unread)), bad
            )
        except InputError as error:
            return error

    def load_replacement(self, request: BatchRequest, index: int, reason: str) -> list[Sample]:
        """Load the image that replaces a bad one.

        It is the next one in the epoch's order that can be read and does not enlarge the joint batch. So it depends
        only on the seed, the epoch, the joint batch and the files.

        Raises:
            InputError: No image can replace it; the sentence begins with `reason`.
        """
        order = shuffle_indices(len(self.dataset), self.seed, request.epoch)
        position, failed = order.index(index % len(self.dataset)), 0
        limit = [-(-side // MULTIPLE) * MULTIPLE for side in self.largest_size(request.epoch, set(request.joint))]
        for candidate in order[position + 1 :] + order[:position]:
            height, width = self.network_size(request.epoch, candidate)
            if len(request.joint) > 1 and (height > limit[0] or width > limit[1]):
                continue
            try:
                return self.load_samples(request.epoch, candidate)
            except InputError:
                failed += 1
                if failed == _MAX_ATTEMPTS:
                    break
        raise InputError(f"{reason} (and nothing can replace it: {failed} other images cannot be read either)")

    def load_samples(self, epoch: int, index: int) -> list[Sample]:
        """Load an image as it is in an epoch, and its copies of test-time augmentation."""
        image: Any
        if self.tile_reader is None:
            image, annotations = self.read(index % len(self.dataset))
        else:
            annotations = self.dataset[index]
            image = self.tile_reader.read(self.dataset, annotations)
        with _seed_sample(self.seed, epoch, index):
            return make_samples(image, annotations, (self.transform_in(epoch, index), *self.tta_transforms), self.masks)

    def read(self, index: int) -> tuple[Tensor, ImageAnnotations]:
        """Decode an image or a tile, and return its annotations."""
        annotations = self.dataset[index]
        return read_dataset_image(self.dataset, annotations), annotations

    def read_other(self, index: int) -> tuple[Tensor, ImageAnnotations]:
        """Read a random image other than `index`, drawn from torch's global generator.

        Where bad images are replaced, the next one that can be read stands in for it.
        """
        count = len(self.dataset)
        drawn = (index + 1 + int(torch.randint(max(1, count - 1), ()))) % count
        for step in range(min(_MAX_ATTEMPTS, count) if self.replace else 0):
            with suppress(InputError):
                return self.read((drawn + step) % count)
        return self.read(drawn)

    def transform_in(self, epoch: int, index: int) -> Transform:
        """Return the transform of an image in an epoch."""
        if isinstance(self.transform, AugmentedTransform):
            return self.transform.in_epoch(epoch, partial(self.read_other, index))
        return self.transform

    def largest_size(self, epoch: int, indices: Iterable[int]) -> tuple[int, int]:
        """Return the largest height and width of images in an epoch, by their annotated sizes, without reading them."""
        sizes = [self.network_size(epoch, index) for index in indices]
        return max((h for h, _ in sizes), default=1), max((w for _, w in sizes), default=1)

    def network_size(self, epoch: int, index: int) -> tuple[int, int]:
        """Return an image's (height, width) for the network in an epoch."""
        size = self.dataset.sizes[index % len(self.dataset)].tolist()
        with _seed_sample(self.seed, epoch, index):
            return self.transform_in(epoch, index).network_size(*size)


class WorkerPool:
    """Worker processes that stay alive between epochs and load the batches of any plan.

    Args:
        dataset: The images and their annotations.
        transform: The transform of each image.
        seed: Seed of the data augmentation.
        masks: Whether targets have masks.
        workers: Number of worker processes; 0 loads in this process.
        pin: Whether batches are put into pinned memory.
        start_method: The start method of `multiprocessing`; None takes the system's default.
        tta_transforms: Further transforms of each image, for test-time augmentation.
        replace: Whether bad images are replaced.
        tile_reader: As in `BatchReader`.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: Transform,
        seed: int,
        masks: bool,
        workers: int,
        pin: bool,
        start_method: str | None,
        tta_transforms: Sequence[EvalTransform] = (),
        replace: bool = False,
        tile_reader: TileReader | None = None,
    ) -> None:
        self.plan: list[BatchRequest] = []  # refilled for every run
        self.loader = DataLoader(
            BatchReader(dataset, transform, seed, masks, tuple(tta_transforms), replace, tile_reader),
            sampler=self.plan,
            batch_size=None,
            num_workers=workers,
            collate_fn=_return_unchanged,
            pin_memory=pin,
            persistent_workers=workers > 0,
            multiprocessing_context=start_method if workers else None,
            generator=torch.Generator(),  # its own, so that torch's global generator stays untouched
            worker_init_fn=_init_worker,
        )

    def run(self, plan: Iterable[BatchRequest]) -> Iterator[LoadedBatch]:
        """Yield the plan's batches in order; raises InputError for a bad image that is not replaced."""
        self.plan[:] = plan
        for loaded in self.loader:
            if isinstance(loaded, InputError):
                # a copy: raising `loaded` would make a reference cycle with this frame, and keep the workers alive
                raise InputError(str(loaded))
            yield loaded


def _init_worker(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM, which reach the whole process group, and end together with the main process.

    The main process ends its workers itself, after it has saved. Torch's own watch misses a killed main process where
    a fork server started the workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_after, args=(multiprocessing.parent_process(),), daemon=True).start()


def _exit_after(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _return_unchanged(batch: Any) -> Any:
    return batch
