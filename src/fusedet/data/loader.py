"""Records to batches: which pictures make a step, what chance each one sees, and the workers that read them."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusedet.data.images import read_image
from fusedet.data.records import Record, Records
from fusedet.data.transforms import Eval, Transform
from fusedet.errors import InputError
from fusedet.types import MULTIPLE, Batch, Target


class Sample(NamedTuple):
    """A picture ready for the network: image (3, H, W) uint8, scale (x, y), its id and its target."""

    image: Tensor
    scale: tuple[float, float]
    image_id: int
    target: Target | None = None


class Step(NamedTuple):
    """What a worker is asked for: its own pictures, and all of the joint batch that they are padded like."""

    epoch: int
    own: tuple[int, ...]
    joint: tuple[int, ...]


def collate(samples: Sequence[Sample], canvas: tuple[int, int] = (1, 1)) -> Batch:
    """One batch, channels-last in memory, padded with zeros to multiples of 32 of the largest height and width.

    canvas (height, width) that the batch has at least, before rounding. Masks are padded like the pictures.
    """
    sizes = [tuple(s.image.shape[1:]) for s in samples]
    height, width = (-(-max(side) // MULTIPLE) * MULTIPLE for side in zip(canvas, *sizes))
    images = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    for into, sample in zip(images, samples):
        h, w = sample.image.shape[1:]
        into[:, :h, :w] = sample.image
    return Batch(
        images=images,
        sizes=torch.tensor(sizes, dtype=torch.int64).reshape(-1, 2),
        ids=tuple(s.image_id for s in samples),
        scales=torch.tensor([s.scale for s in samples], dtype=torch.float32).reshape(-1, 2),
        targets=_joined([s.target for s in samples], height, width),
    )


def see(image: Tensor, record: Record, transforms: Iterable[Transform], masks: bool = False) -> list[Sample]:
    """A picture (3, H, W) uint8 as each of the transforms gives it."""
    seen = [transform(image, record, masks) for transform in transforms]
    return [Sample(changed, scale, record.image_id, target) for changed, scale, target in seen]


def collate_views(pictures: Sequence[Sequence[Sample]], views: Sequence[Eval] = (), canvas: tuple[int, int] = (1, 1)) -> Batch:
    """One batch of pictures, each given by its samples: the first ones, and in `Batch.views` those of the further `views`."""
    first, *others = zip(*pictures, strict=True)
    seen = (replace(collate(samples), flipped=view.flip) for samples, view in zip(others, views, strict=True))
    return replace(collate(first, canvas), views=tuple(seen))


def _joined(targets: Sequence[Target | None], height: int, width: int) -> tuple[Target, ...] | None:
    """The targets as slices of one tensor per field, so that a worker sends few of them; masks padded to the canvas."""
    known = [target for target in targets if target is not None]
    if not known:
        return None
    masks: Sequence[Tensor | None] = [None] * len(known)
    own = [t.masks for t in known if t.masks is not None]
    if len(own) == len(known):
        padded = torch.zeros(sum(map(len, own)), height, width, dtype=torch.bool).split([len(m) for m in own])
        for canvas, mask in zip(padded, own):
            canvas[:, : mask.shape[1], : mask.shape[2]] = mask
        masks = padded
    boxes, labels = _slices([t.boxes for t in known]), _slices([t.labels for t in known])
    ignore = _slices([t.boxes[:0] if t.ignore is None else t.ignore for t in known])
    return tuple(Target(*fields) for fields in zip(boxes, labels, masks, ignore))


def _slices(parts: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.cat(parts).split([len(part) for part in parts])


class TrainLoader:
    """The batches of any epoch, see `train_loader`."""

    def __init__(self, records: Records, batch: int, seed: int, rank: int, world: int, steps: _Steps) -> None:
        self.records, self.batch, self.seed, self.rank, self.world, self.steps = records, batch, seed, rank, world, steps
        height, width = records.sizes.numpy().T
        self.portrait = height > width

    def __len__(self) -> int:
        return -(-len(self.records) // self.batch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches for this rank from step `start` on; the skipped ones are not read."""
        own = slice(self.rank * self.batch // self.world, (self.rank + 1) * self.batch // self.world)
        plan = plan_epoch(self.portrait, self.batch, self.seed, epoch)[start:]
        return self.steps.run([Step(epoch, joint[own], joint) for joint in plan])


class EvalLoader:
    """Every picture of this rank once, see `eval_loader`; it can be iterated again."""

    def __init__(self, steps: _Steps, plan: list[Step]) -> None:
        self.steps, self.plan = steps, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[Batch]:
        return self.steps.run(self.plan)


def train_loader(
    records: Records,
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
) -> TrainLoader:
    """Shuffled batches of pictures of like orientation.

    batch, the pictures of one step over all `world` processes; process `rank` takes its slice and pads it like the joint
    batch, so that the processes together see what one would. Every epoch has ceil(N / batch) steps, all full, see
    `plan_epoch`. A picture's chance (size, flip, colours) is a function of seed, epoch and its index alone: `workers`
    (processes that read ahead; 0 reads here) and restarts change nothing. start_method is multiprocessing's.
    Raises InputError for an empty data set or sizes that do not divide, and, while iterating, for a picture that cannot
    be read.
    """
    _check(records, batch, workers, rank, world)
    return TrainLoader(records, batch, seed, rank, world, _Steps(records, transform, seed, masks, workers, pin, start_method))


def eval_loader(
    records: Records,
    transform: Transform,
    *,
    batch: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    masks: bool = False,
    pin: bool = False,
    start_method: str | None = None,
    views: Sequence[Eval] = (),
) -> EvalLoader:
    """Each picture once, in order of aspect ratio so that there is little padding; the last batch may be smaller.

    Batches of batch / world pictures go to the processes in turn. views: in which other ways each picture is seen, in the order of
    `Batch.views`; it is read once. Otherwise as `train_loader`.
    """
    _check(records, batch, workers, rank, world)
    height, width = records.sizes.numpy().T
    order = np.argsort(width / np.maximum(height, 1), kind="stable").tolist()
    each = batch // world
    batches = [tuple(order[i : i + each]) for i in range(0, len(order), each)]
    steps = _Steps(records, transform, 0, masks, workers, pin, start_method, views)
    return EvalLoader(steps, [Step(0, own, own) for own in batches[rank::world]])


def plan_epoch(portrait: np.ndarray, batch: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """The indices of every joint batch of an epoch, a function of its arguments alone: ceil(N / batch) full batches.

    portrait (N,) bool splits the pictures in two groups. In shuffled order each group's pictures form batches as they
    come. What is left of both groups forms mixed batches at the end, and the last of them is filled up from the start of
    the shuffled order (around and around, if there are fewer pictures than `batch`).
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(portrait)).tolist()
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


def _check(records: Records, batch: int, workers: int, rank: int, world: int) -> None:
    if not len(records):
        raise InputError(f"{records.source} has no pictures to load")
    if batch < 1 or batch % world:
        raise InputError(f"batch counts the pictures of all processes: {batch} must be a multiple of the {world} processes")
    if not 0 <= rank < world:
        raise InputError(f"rank must be in 0..{world - 1}, got {rank}")
    if workers < 0:
        raise InputError(f"workers must be 0 or more, got {workers}")


@contextmanager
def _chance(seed: int, epoch: int, index: int) -> Iterator[None]:
    """Torch's CPU generator as this sample has it; restored afterwards. No device's generator is touched."""
    state = int(np.random.SeedSequence([seed, epoch, index]).generate_state(1)[0])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(state)
        yield


@dataclass(frozen=True)
class Reader(Dataset[Any]):
    """`reader[step]` is the step's batch, or the InputError that kept it from being read (an error raised in a worker
    would lose its sentence in the loader's traceback).
    """

    records: Records
    transform: Transform
    seed: int
    masks: bool
    views: tuple[Eval, ...] = ()

    def __getitem__(self, step: Step) -> Batch | InputError:
        try:
            return collate_views([self.samples(step.epoch, i) for i in step.own], self.views, self.canvas(step))
        except InputError as error:
            return error

    def samples(self, epoch: int, index: int) -> list[Sample]:
        """Picture `index` as it comes in an epoch, and in the further views."""
        record = self.records[index]
        image = read_image(record.path)
        with _chance(self.seed, epoch, index):
            return see(image, record, (self.transform, *self.views), self.masks)

    def canvas(self, step: Step) -> tuple[int, int]:
        """The largest height and width among the pictures of the joint batch that other processes read."""
        canvas = (1, 1)
        for index in set(step.joint) - set(step.own):
            with _chance(self.seed, step.epoch, index):
                height, width = self.transform.network_size(*self.records.sizes[index].tolist())
            canvas = (max(canvas[0], height), max(canvas[1], width))
        return canvas


class _Steps:
    """Workers that stay alive between epochs and read whatever plan they are given."""

    def __init__(
        self,
        records: Records,
        transform: Transform,
        seed: int,
        masks: bool,
        workers: int,
        pin: bool,
        start_method: str | None,
        views: Sequence[Eval] = (),
    ) -> None:
        self.plan: list[Step] = []  # filled anew for every run
        self.loader = DataLoader(
            Reader(records, transform, seed, masks, tuple(views)),
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

    def run(self, plan: Iterable[Step]) -> Iterator[Batch]:
        self.plan[:] = plan
        for batch in self.loader:
            if isinstance(batch, InputError):
                raise InputError(str(batch))  # a new one: `batch` would hold this frame in a cycle, and the workers would outlive it
            yield batch


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and SIGTERM reach the whole process group: the main process ends its workers itself, once it has saved."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)


def _same(batch: Any) -> Any:
    return batch
