"""DetectionDataset to batches: which images make a step, in every epoch and for every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fusedet.data.bad_images import BadImageLog, ReplacedImage
from fusedet.data.dataset import DetectionDataset
from fusedet.data.transforms import EvalTransform, Transform
from fusedet.data.worker_pool import BatchRequest, WorkerPool, shuffle_indices
from fusedet.errors import InputError
from fusedet.types import Batch


class TrainLoader:
    """The batches of any epoch, see `train_loader`."""

    def __init__(
        self,
        dataset: DetectionDataset,
        batch: int,
        seed: int,
        rank: int,
        world: int,
        steps: WorkerPool,
        bad_image_log: BadImageLog | None,
    ) -> None:
        self.dataset, self.batch, self.seed, self.rank, self.world, self.steps = (
            dataset,
            batch,
            seed,
            rank,
            world,
            steps,
        )
        self.bad_image_log = bad_image_log
        height, width = dataset.sizes.numpy().T
        self.portrait = height > width

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches for this rank from step `start` on; the steps before it are not read."""
        own = slice(self.rank * self.batch // self.world, (self.rank + 1) * self.batch // self.world)
        plan = plan_epoch(self.portrait, self.batch, self.seed, epoch)[start:]
        if self.bad_image_log:
            self.bad_image_log.begin(epoch, start)
        for number, (batch, bad) in enumerate(
            self.steps.run([BatchRequest(epoch, joint[own], joint) for joint in plan]), start
        ):
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
    """Every image of this rank once, see `eval_loader`; it can be iterated again."""

    def __init__(self, steps: WorkerPool, plan: list[BatchRequest]) -> None:
        self.steps, self.plan = steps, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for batch, _ in self.steps.run(self.plan))


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
) -> TrainLoader:
    """Shuffled batches of images of like orientation.

    batch, the images of one step over all `world` processes; process `rank` takes its slice and pads it like the joint
    batch, so that the processes together see what one would. Every epoch has ceil(N / batch) steps, all full, see
    `plan_epoch`. An image's chance (size, flip, colours) is a function of seed, epoch and its index alone: `workers`
    (processes that read ahead; 0 reads here) and restarts change nothing. start_method is multiprocessing's.
    With a bad_image_log, an image that cannot be read is replaced, see `Reader.instead`, and written down there when its batch is taken.
    Raises InputError for an empty dataset or sizes that do not divide, and, while iterating, for an image that cannot
    be read.
    """
    _check(dataset, batch, workers, rank, world)
    steps = WorkerPool(dataset, transform, seed, masks, workers, pin, start_method, replace=bad_image_log is not None)
    return TrainLoader(dataset, batch, seed, rank, world, steps, bad_image_log)


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
    views: Sequence[EvalTransform] = (),
) -> EvalLoader:
    """Each image once, in order of aspect ratio so that there is little padding; the last batch may be smaller.

    Batches of batch / world images go to the processes in turn. views: in which other ways each image is seen, in the order of
    `Batch.views`; it is read once. Otherwise as `train_loader`.
    """
    _check(dataset, batch, workers, rank, world)
    height, width = dataset.sizes.numpy().T
    order = np.argsort(width / np.maximum(height, 1), kind="stable").tolist()
    each = batch // world
    batches = [tuple(order[i : i + each]) for i in range(0, len(order), each)]
    steps = WorkerPool(dataset, transform, 0, masks, workers, pin, start_method, views)
    return EvalLoader(steps, [BatchRequest(0, own, own) for own in batches[rank::world]])


def plan_epoch(portrait: np.ndarray, batch: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The indices of every joint batch of an epoch, a function of its arguments alone: ceil(N / batch) full batches.

    portrait (N,) bool splits the images in two groups. In shuffled order each group's images form batches as they
    come. What is left of both groups forms mixed batches at the end, and the last of them is filled up from the start of
    the shuffled order (around and around, if there are fewer images than `batch`).
    """
    order = shuffle_indices(len(portrait), seed, epoch)
    waiting: tuple[list[int], list[int]] = ([], [])
    plan = []
    for i in order:
        group = waiting[int(portrait[i])]
        group.append(i)
        if len(group) == batch:
            plan.append(tuple(group))
            group.clear()
    rest = waiting[0] + waiting[1]
    missing = -len(rest) % batch
    rest += [order[i % len(order)] for i in range(missing)]
    return plan + [tuple(rest[i : i + batch]) for i in range(0, len(rest), batch)]


def _check(dataset: DetectionDataset, batch: int, workers: int, rank: int, world: int) -> None:
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
