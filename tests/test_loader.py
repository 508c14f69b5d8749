"""Loaders: plan of an epoch, worker processes, ranks, padding, and exact resume."""

import multiprocessing
import os
import pickle
import signal
from collections import Counter
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from PIL import Image

from fusedet.data.collate import Sample, collate_samples
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.loader import build_eval_loader, build_train_loader, plan_epoch
from fusedet.data.transforms import EvalTransform, TrainTransform
from fusedet.errors import InputError
from fusedet.types import MULTIPLE, Target

TRANSFORM = TrainTransform([32, 48, 64], 96, photometric=True)


def make_dataset(folder, sizes, annotations=3):
    rng = np.random.default_rng(0)
    dataset = []
    for i, (height, width) in enumerate(sizes):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        n = annotations if i % 5 else 0
        corners = rng.uniform(0, 20, (n, 2))
        boxes = np.hstack([corners, corners + rng.uniform(5, 10, (n, 2))])
        segments = [[[x1, y1, x2, y1, x2, y2, x1, y2]] for x1, y1, x2, y2 in boxes.tolist()]
        labels, ignore = rng.integers(0, 3, n), rng.random(n) < 0.2
        dataset.append(
            ImageAnnotations(100 + i, path, height, width, boxes, labels, ignore, np.ones(n), segments, ignore)
        )
    return DetectionDataset.build(["a", "b", "c"], [1, 2, 3], dataset, source=folder, dataset_format="coco")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """13 images: 8 landscape, 5 portrait."""
    landscape, portrait = [(40, 60), (45, 55), (30, 80), (48, 48)], [(60, 40), (70, 33)]
    return make_dataset(tmp_path_factory.mktemp("images"), (landscape + portrait) * 2 + [portrait[0]])


def assert_equal(first, second):
    assert first.ids == second.ids
    assert torch.equal(first.images, second.images)
    assert torch.equal(first.sizes, second.sizes)
    assert torch.equal(first.scales, second.scales)
    for a, b in zip(first.targets, second.targets, strict=True):
        for x, y in ((a.boxes, b.boxes), (a.labels, b.labels), (a.ignore, b.ignore), (a.masks, b.masks)):
            assert (x is None and y is None) or torch.equal(x, y)


def assert_equal_lists(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) > 0
    for a, b in zip(first, second):
        assert_equal(a, b)


def test_collate_pads_to_a_multiple():
    def sample(height, width, image_id):
        masks = torch.ones(1, height, width, dtype=torch.bool)
        target = Target(torch.tensor([[0.0, 0, 5, 5]]), torch.tensor([1]), masks)
        return Sample(torch.full((3, height, width), 7, dtype=torch.uint8), (0.5, 0.25), image_id, target)

    batch = collate_samples([sample(40, 64, 5), sample(20, 65, 9)])
    assert batch.images.shape == (2, 3, 64, 96)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.sizes.tolist() == [[40, 64], [20, 65]]
    assert batch.scales.tolist() == [[0.5, 0.25], [0.5, 0.25]]
    assert batch.ids == (5, 9)
    for i, (h, w) in enumerate(batch.sizes.tolist()):
        assert (batch.images[i, :, :h, :w] == 7).all()
        assert batch.images[i].sum() == 7 * 3 * h * w
        assert batch.targets[i].masks.shape == (1, 64, 96)
        assert batch.targets[i].masks.sum() == h * w
    assert collate_samples([sample(32, 64, 1)]).images.shape == (1, 3, 32, 64)
    assert collate_samples([sample(32, 64, 1)], canvas=(33, 10)).images.shape == (1, 3, 64, 64)


def test_collate_without_targets():
    batch = collate_samples([Sample(torch.zeros(3, 10, 10, dtype=torch.uint8), (1.0, 1.0), 1)])
    assert batch.targets is None


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 40, 41])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_plan_of_an_epoch(count, batch):
    portrait = np.arange(count) % 3 == 0
    plan = plan_epoch(portrait, batch, seed=3, epoch=5)
    assert len(plan) == -(-count // batch)
    assert {len(step) for step in plan} == {batch}
    seen = Counter(i for step in plan for i in step)
    assert set(seen) == set(range(count)), "every image is loaded"
    assert sum(seen.values()) - count < batch, "only the last batch is filled"
    assert sum(len({bool(portrait[i]) for i in step}) > 1 for step in plan) <= 2, "at most two batches are mixed"
    if count >= batch:
        assert all(len(set(step)) == batch for step in plan[:-1])
    assert plan == plan_epoch(portrait, batch, seed=3, epoch=5)
    if count > 8:
        assert plan != plan_epoch(portrait, batch, seed=3, epoch=6)
        assert plan != plan_epoch(portrait, batch, seed=4, epoch=5)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(dataset, workers):
    single = build_train_loader(dataset, TRANSFORM, batch=4, seed=7, masks=True)
    pooled = build_train_loader(dataset, TRANSFORM, batch=4, seed=7, masks=True, workers=workers)
    for epoch in (0, 1, 4):  # the workers stay alive
        assert_equal_lists(single.epoch(epoch), pooled.epoch(epoch))


def test_epochs_and_seeds_differ(dataset):
    def images(seed, epoch):
        return torch.cat([b.scales for b in build_train_loader(dataset, TRANSFORM, batch=4, seed=seed).epoch(epoch)])

    assert torch.equal(images(0, 0), images(0, 0))
    assert not torch.equal(images(0, 0), images(0, 1))
    assert not torch.equal(images(0, 0), images(1, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_start_skips_without_reading(dataset, workers, monkeypatch):
    loader = build_train_loader(dataset, TRANSFORM, batch=4, workers=workers)
    assert len(loader) == 4
    whole = list(loader.epoch(2))
    if not workers:
        from fusedet.data import dataset_images as module

        read, paths = module.read_image, []
        monkeypatch.setattr(
            module, "read_image", lambda path, *args, **options: paths.append(path) or read(path, *args, **options)
        )
    assert_equal_lists(whole[2:], loader.epoch(2, start=2))
    if not workers:
        assert len(paths) == 8
    assert list(loader.epoch(2, start=4)) == []


def test_an_epoch_can_be_interrupted_by_another(dataset):
    loader = build_train_loader(dataset, TRANSFORM, batch=2, workers=1)
    next(loader.epoch(0))
    assert_equal_lists(loader.epoch(1), build_train_loader(dataset, TRANSFORM, batch=2).epoch(1))


def test_torchs_generator_stays_untouched(dataset):
    state = torch.get_rng_state()
    for _ in build_train_loader(dataset, TRANSFORM, batch=4).epoch(0):
        pass
    for _ in build_eval_loader(dataset, EvalTransform(32, 64), batch=4):
        pass
    assert torch.equal(state, torch.get_rng_state())


def test_processes_load_the_joint_batch(dataset):
    joint = list(build_train_loader(dataset, TRANSFORM, batch=4, seed=1, masks=True).epoch(3))
    ranks = [
        list(build_train_loader(dataset, TRANSFORM, batch=4, seed=1, masks=True, rank=r, world=2).epoch(3))
        for r in range(2)
    ]
    assert [len(r) for r in ranks] == [len(joint)] * 2
    for whole, *parts in zip(joint, *ranks):
        assert torch.equal(whole.images, torch.cat([p.images for p in parts])), "the padding is the same too"
        assert whole.ids == parts[0].ids + parts[1].ids
        assert torch.equal(whole.scales, torch.cat([p.scales for p in parts]))
        boxes = [t.boxes for p in parts for t in p.targets]
        assert all(torch.equal(a.boxes, b) for a, b in zip(whole.targets, boxes, strict=True))


def test_fewer_images_than_the_batch(tmp_path):
    few = make_dataset(tmp_path, [(40, 60), (60, 40)])
    loader = build_train_loader(few, TRANSFORM, batch=8)
    (batch,) = loader.epoch(0)
    assert len(loader) == 1
    assert Counter(batch.ids) == {100: 4, 101: 4}


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (4, 0), (1, 2)])
def test_evaluation_loads_each_image_once(dataset, world, workers):
    loaders = [
        build_eval_loader(dataset, EvalTransform(32, 64), batch=4, workers=workers, rank=r, world=world)
        for r in range(world)
    ]
    batches = [b for loader in loaders for b in loader]
    assert sorted(i for b in batches for i in b.ids) == sorted(dataset.image_ids.tolist())
    assert [len(list(loader)) for loader in loaders] == [len(loader) for loader in loaders]
    for b in batches:
        assert b.images.shape[2:] == tuple(-(-int(s) // MULTIPLE) * MULTIPLE for s in b.sizes.amax(0))
        assert len(b.targets) == len(b)


def test_evaluation_is_in_order_of_aspect_ratio(dataset):
    sizes = torch.cat([b.sizes for b in build_eval_loader(dataset, EvalTransform(640, 1000), batch=2)])
    ratio = sizes[:, 1] / sizes[:, 0]
    assert (ratio.diff() > -0.01).all()


def test_annotations_are_not_copied_to_workers(tmp_path):
    (tmp_path / "many").mkdir()
    small, large = (
        make_dataset(tmp_path, [(40, 60)] * 2),
        make_dataset(tmp_path / "many", [(40, 60)] * 2, annotations=20_000),
    )
    few, many = (
        len(ForkingPickler.dumps(build_train_loader(r, TRANSFORM, batch=2).workers.loader.dataset))
        for r in (small, large)
    )
    assert many < 8_000
    assert many - few < 500
    assert len(pickle.dumps(large.boxes)) > 500_000


class Threads:
    """A transform that returns its worker's number of threads as the scale."""

    def network_size(self, height, width):
        return height, width

    def __call__(self, image, annotations, masks=False):
        empty = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        return image, (float(torch.get_num_threads()), 1.0), empty


@pytest.mark.slow
def test_spawned_workers_with_one_thread(dataset):
    loader = build_train_loader(dataset, Threads(), batch=4, workers=1, start_method="spawn")
    batches = list(loader.epoch(0))
    assert [b.ids for b in batches] == [b.ids for b in build_train_loader(dataset, Threads(), batch=4).epoch(0)]
    assert all((b.scales == 1).all() for b in batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_gives_one_sentence(tmp_path, workers):
    bad = make_dataset(tmp_path, [(40, 60)] * 4)
    (tmp_path / "2.png").write_bytes(b"gone")
    expected = f"{tmp_path / '2.png'} is empty or not an image in a format that Pillow reads"
    assert error_of(build_train_loader(bad, TRANSFORM, batch=2, workers=workers).epoch(0)) == expected
    assert error_of(build_eval_loader(bad, EvalTransform(32, 64), batch=2, workers=workers)) == expected


def error_of(batches):
    """The message of the error; pytest.raises would keep the traceback, and with it the workers, in a cycle."""
    try:
        list(batches)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"batch": 0}, "batch"),
        ({"batch": 5, "world": 2}, "multiple of the 2 processes"),
        ({"batch": 4, "world": 2, "rank": 2}, "rank"),
        ({"batch": 4, "workers": -1}, "workers"),
    ],
)
def test_wrong_options(dataset, options, text):
    for loader in (build_train_loader, build_eval_loader):
        with pytest.raises(InputError, match=text):
            loader(dataset, TRANSFORM, **options)


def test_no_images(tmp_path):
    with pytest.raises(InputError, match="no images"):
        build_train_loader(make_dataset(tmp_path, []), TRANSFORM, batch=2)


def test_workers_ignore_the_signals_that_end_a_training(dataset):
    """A terminal or a cluster signals the whole process group; the training must still finish its step and save."""
    loader = build_train_loader(dataset, TRANSFORM, batch=2, workers=1)
    batches = loader.epoch(0)
    first = next(batches)
    for worker in multiprocessing.active_children():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    ids = [first.ids, *(b.ids for b in batches)]
    assert ids == [b.ids for b in build_train_loader(dataset, TRANSFORM, batch=2).epoch(0)]
