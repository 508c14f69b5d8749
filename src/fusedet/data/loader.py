"""Batches of a dataset for training and evaluation, in every epoch and for every process."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from fusedet.config.schema import PredictionTiles
from fusedet.data.augmentation import AugmentedTransform
from fusedet.data.bad_images import BadImageLog, ReplacedImage
from fusedet.data.class_balance import compute_repeat_factors, count_entries, draw_entries
from fusedet.data.dataset import DetectionDataset
from fusedet.data.dataset_images import TileReader
from fusedet.data.tiling import count_windows, view_dataset
from fusedet.data.transforms import EvalTransform, Transform
from fusedet.data.worker_pool import BatchRequest, WorkerPool, shuffle_indices
from fusedet.errors import InputError
from fusedet.types import Batch


class TrainLoader:
    """The batches of any epoch, see `build_train_loader`."""

    def __init__(
        self,
        dataset: DetectionDataset,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        workers: WorkerPool,
        bad_image_log: BadImageLog | None,
        repeat_factors: np.ndarray | None = None,
    ) -> None:
        self.dataset, self.batch, self.seed = dataset, batch, seed
        self.rank, self.world = rank, world
        self.workers, self.bad_image_log = workers, bad_image_log
        height, width = dataset.sizes.numpy().T
        self.portrait, self.repeat_factors = height > width, repeat_factors

    def __len__(self) -> int:
        images = len(self.dataset) if self.repeat_factors is None else count_entries(self.repeat_factors)
        return -(-images // self.batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield this rank's batches of an epoch from step `start` on; earlier steps are not read."""
        own = slice(self.rank * self.batch // self.world, (self.rank + 1) * self.batch // self.world)
        plan = plan_epoch(self.portrait, self.batch, self.seed, epoch, self.repeat_factors)[start:]
        if self.bad_image_log:
            self.bad_image_log.begin(epoch, start)
        requests = [BatchRequest(epoch, joint[own], joint) for joint in plan]
        for number, (batch, bad) in enumerate(self.workers.run(requests), start):
            for index, reason in bad:
                assert self.bad_image_log
                path = str(self.dataset.path(index))
                self.bad_image_log.add(
                    ReplacedImage(epoch + 1, number + 1, int(self.dataset.image_ids[index]), path, reason)
                )
            yield batch
        if self.bad_image_log:
            self.bad_image_log.end()


class EvalLoader:
    """Every image of this rank once, see `build_eval_loader`; it can be iterated again."""

    def __init__(
        self,
        workers: WorkerPool,
        plan: list[BatchRequest],
        windows: Tensor | None = None,
        is_last: Sequence[bool] = (),
    ) -> None:
        self.workers, self.plan, self.windows, self.is_last = workers, plan, windows, is_last

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        for request, (batch, _) in zip(self.plan, self.workers.run(self.plan), strict=True):
            if self.windows is None:
                yield batch
            else:
                is_last = tuple(self.is_last[i] for i in request.local)
                yield replace(batch, windows=self.windows[list(request.local)], is_last=is_last)


def build_train_loader(
    dataset: DetectionDataset,
    transform: Transform,
    *,
    batch: int,
    seed: int = 0,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    masks: bool = False,
    pin: bool = False,
    start_method: str | None = None,
    bad_image_log: BadImageLog | None = None,
    balance: float | None = None,
) -> TrainLoader:
    """Build the training loader: shuffled batches of images of similar orientation.

    Every epoch has ceil(N / batch) full steps, see `plan_epoch`. The data augmentation of an image (size, flip,
    colors) is a function of the seed, the epoch, the image's index and how often the epoch has seen it. So the number
    of workers and a resume change nothing.

    Args:
        dataset: The training images and their annotations.
        transform: The data augmentation.
        batch: Images per step over all processes.
        seed: Seed of the order and the data augmentation.
        workers: Number of worker processes; 0 loads in this process.
        rank: Rank of this process; it loads its slice of the joint batch and pads it like the whole.
        world: Number of processes.
        masks: Whether targets have masks.
        pin: Whether batches are put into pinned memory.
        start_method: The start method of `multiprocessing`; None takes the system's default.
        bad_image_log: Where given, bad images are replaced, see `BatchReader.load_replacement`, and logged when their
            batch is taken.
        balance: The threshold of `compute_repeat_factors`; None sees each image once per epoch.

    Raises:
        InputError: The dataset is empty or lacks masks that the transform needs, or `batch` is no multiple of `world`;
            while iterating, an image is bad.
    """
    _check_arguments(dataset, batch, workers, rank, world)
    if isinstance(transform, AugmentedTransform):
        transform.check_dataset(dataset)
    pool = WorkerPool(dataset, transform, seed, masks, workers, pin, start_method, replace=bad_image_log is not None)
    factors = None if balance is None else compute_repeat_factors(dataset, balance)
    return TrainLoader(dataset, batch, seed, rank, world, pool, bad_image_log, factors)


def build_eval_loader(
    dataset: DetectionDataset,
    transform: Transform,
    *,
    batch: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    masks: bool = False,
    pin: bool = False,
    start_method: str | None = None,
    tta_transforms: Sequence[EvalTransform] = (),
    tiles: PredictionTiles | None = None,
    min_visible: float = 0.0,
) -> EvalLoader:
    """Build the evaluation loader: each image once, sorted by aspect ratio to save padding.

    Batches of batch / world images go to the processes in turn; the last one may be smaller.

    With `tiles`, the images of a batch are windows of the dataset's images: first the whole image, then its tiles, all
    in one process, see `Batch.windows`.

    Args:
        dataset: The images and their annotations.
        transform: The preprocessing.
        batch: Images at once over all processes.
        workers: Number of worker processes; 0 loads in this process.
        rank: Rank of this process.
        world: Number of processes.
        masks: Whether targets have masks.
        pin: Whether batches are put into pinned memory.
        start_method: The start method of `multiprocessing`; None takes the system's default.
        tta_transforms: Transforms of further copies, ordered as `Batch.tta_batches`; each image is read once for all.
        tiles: The tiles of each image; None for whole images.
        min_visible: An object of which less than this share, in 0..1, lies in a window is ignored there.

    Raises:
        InputError: The dataset is empty, or `batch` is no multiple of `world`; while iterating, an image is bad.
    """
    _check_arguments(dataset, batch, workers, rank, world)
    height, width = dataset.sizes.numpy().T
    order = np.argsort(width / np.maximum(height, 1), kind="stable").tolist()
    size = batch // world
    own_batches = _split(order, size)[rank::world]
    if tiles is None or tiles.size is None:
        pool = WorkerPool(dataset, transform, 0, masks, workers, pin, start_method, tta_transforms)
        return EvalLoader(pool, [BatchRequest(0, own, own) for own in own_batches])
    tiled, counts = view_dataset(dataset, tiles, min_visible), count_windows(dataset, tiles)
    ends = np.cumsum(counts).tolist()
    own_windows = [w for own in own_batches for i in own for w in range(ends[i] - counts[i], ends[i])]
    pool = WorkerPool(tiled, transform, 0, masks, workers, pin, start_method, tta_transforms, tile_reader=TileReader())
    plan = [BatchRequest(0, own, own) for own in _split(own_windows, size)]
    last = {end - 1 for end in ends}
    return EvalLoader(pool, plan, tiled.windows, [i in last for i in range(len(tiled))])


def _split(indices: list[int], size: int) -> list[tuple[int, ...]]:
    """Split indices into batches; the last one may be smaller."""
    return [tuple(indices[i : i + size]) for i in range(0, len(indices), size)]


def plan_epoch(
    portrait: np.ndarray, batch: int, seed: int, epoch: int, repeat_factors: np.ndarray | None = None
) -> list[tuple[int, ...]]:
    """Plan the joint batches of an epoch: ceil(N / batch) full batches of image indices.

    In shuffled order, the portrait and the other images each form batches. The remaining images of both groups form
    mixed batches at the end. The last batch is filled from the start of the shuffled order, repeatedly where there are
    fewer images than `batch`.

    Args:
        portrait: (N,) bool, true for images that are higher than wide.
        batch: Images per joint batch.
        seed: Seed of the order.
        epoch: The epoch, from 0.
        repeat_factors: (N,) how often each image is seen on average; the indices are then those of `draw_entries`, and
            N is their number.
    """
    count = len(portrait)
    order = shuffle_indices(count, seed, epoch) if repeat_factors is None else draw_entries(repeat_factors, seed, epoch)
    groups: tuple[list[int], list[int]] = ([], [])
    plan = []
    for i in order:
        group = groups[int(portrait[i % count])]
        group.append(i)
        if len(group) == batch:
            plan.append(tuple(group))
            group.clear()
    rest = groups[0] + groups[1]
    missing = -len(rest) % batch
    rest += [order[i % len(order)] for i in range(missing)]
    return plan + [tuple(rest[i : i + batch]) for i in range(0, len(rest), batch)]


def _check_arguments(dataset: DetectionDataset, batch: int, workers: int, rank: int, world: int) -> None:
    if not len(dataset):
        raise InputError(f"{dataset.source} has no images to load")
    if batch < 1 or batch % world:
        raise InputError(
            f"batch counts the images of all processes: {batch} must be a multiple of the {world} processes"
        )
    if not 0 <= rank < world:
        raise InputError(f"rank must be in 0..{world - 1}, got {rank}")
    if workers < 0:
        raise InputError(f"workers must be 0 or more, got {workers}")
