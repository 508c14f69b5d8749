"""Repeat-factor sampling: LVIS's rule by hand, epochs of one length, and equal samples after a resume."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fusedet.data.class_balance import (
    compute_repeat_factors,
    count_entries,
    count_images_per_class,
    draw_entries,
)
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.loader import build_train_loader, plan_epoch
from fusedet.data.split_checks import describe_rare_classes
from fusedet.data.transforms import TrainTransform


def make_dataset(classes_of_images, ignored=(), folder=Path(), names=("a", "b", "c", "d")):
    """A dataset of images that show objects of these classes."""
    rows = []
    for i, labels in enumerate(classes_of_images):
        n = len(labels)
        boxes = np.tile([[2.0, 2, 20, 20]], (n, 1))
        ignore = np.full(n, i in ignored)
        rows.append(
            ImageAnnotations(
                i, folder / f"{i}.png", 40, 60, boxes, np.array(labels, int), ignore, np.ones(n), [None] * n, ignore
            )
        )
    return DetectionDataset.build(names, range(len(names)), rows, source=folder, dataset_format="coco")


HAND = [[0], [0, 0], [0, 1], [0], [0, 1], [0], [0], [0, 2], [], [2]]
"""Of 10 images: class 0 in 8, class 1 in 2, class 2 in 2 (one of them ignored below), class 3 in none."""


def test_factors_by_hand():
    """Threshold 0.4: class 0 has f = 0.8, class 1 f = 0.2 and sqrt(2), class 2 f = 0.1 and sqrt(4) = 2."""
    dataset = make_dataset(HAND, ignored=[9])
    assert count_images_per_class(dataset).tolist() == [8, 2, 1, 0]
    root = 2**0.5
    expected = [1, 1, root, 1, root, 1, 1, 2, 1, 1]
    assert compute_repeat_factors(dataset, 0.4).tolist() == pytest.approx(expected)
    assert compute_repeat_factors(dataset, 0.001).tolist() == [1] * 10
    assert count_entries(np.array(expected)) == 12  # 7 + 2 sqrt(2) + 2 = 11.83


@given(st.lists(st.floats(1, 5), min_size=1, max_size=20), st.integers(0, 5), st.integers(0, 5))
def test_entries_of_an_epoch(factors, seed, epoch):
    factors = np.array(factors)
    entries = draw_entries(factors, seed, epoch)
    assert len(entries) == count_entries(factors)
    assert len(set(entries)) == len(entries), "every repetition is an entry of its own"
    counts = np.bincount([entry % len(factors) for entry in entries], minlength=len(factors))
    exact = factors * count_entries(factors) / factors.sum()
    assert (np.abs(counts - exact) < 1 + 1e-6).all(), "rounded up or down"
    for i, count in enumerate(counts):
        assert {entry // len(factors) for entry in entries if entry % len(factors) == i} == set(range(count))


def test_entries_have_the_factors_as_mean():
    factors = np.array([1, 1.5, 2.3, 1, 1.2])
    total = np.zeros(5)
    for epoch in range(2000):
        total += np.bincount([entry % 5 for entry in draw_entries(factors, 0, epoch)], minlength=5)
    assert (total / 2000).tolist() == pytest.approx(factors.tolist(), abs=0.05)


def test_plan_has_full_batches_of_one_orientation():
    factors = np.array([1.0, 3, 1, 1, 2, 1])
    portrait = np.array([0, 1, 0, 0, 1, 0], dtype=bool)
    plan = plan_epoch(portrait, 2, 0, 0, factors)
    assert [len(batch) for batch in plan] == [2] * 5
    mixed = [batch for batch in plan if len({bool(portrait[i % 6]) for i in batch}) > 1]
    assert len(mixed) <= 1


def write_images(dataset):
    rng = np.random.default_rng(0)
    for i in range(len(dataset)):
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(dataset.path(i))


def test_repetitions_are_augmented_differently_and_repeat_after_a_resume(tmp_path):
    dataset = make_dataset([[0]] * 8 + [[1]], folder=tmp_path)
    write_images(dataset)
    transform = TrainTransform([32, 40, 48, 64, 72, 80], 200, flip=0.5)
    options = {"batch": 2, "seed": 3, "balance": 1.0}
    loader = build_train_loader(dataset, transform, **options)
    assert len(loader) == 6  # 8 sqrt(9/8) + 3 = 11.49 images
    whole = list(loader.epoch(0))
    assert len(whole) == len(loader)
    rare = [tuple(b.sizes[i].tolist()) for b in whole for i, own in enumerate(b.ids) if own == 8]
    assert len(rare) in (3, 4)
    assert len(set(rare)) > 1, "a repetition has its own random size"
    for a, b in zip(whole[2:], build_train_loader(dataset, transform, **options, workers=2).epoch(0, 2), strict=True):
        assert a.ids == b.ids
        assert torch.equal(a.images, b.images)
    for rank in (0, 1):
        share = list(build_train_loader(dataset, transform, **options, rank=rank, world=2).epoch(0))
        for a, b in zip(whole, share, strict=True):
            assert torch.equal(a.images[rank : rank + 1], b.images)


def test_doctor_says_when_to_balance():
    frequent = make_dataset([[0]] * 60 + [[1]] * 40 + [[2]] * 3)
    finding = describe_rare_classes(frequent)
    assert finding.message.startswith("1 rare class (c): c is in 3 images, a in 60; train.balance=0.3 repeats")
    assert finding.is_harmless
    assert compute_repeat_factors(frequent, 0.3)[-1] == pytest.approx(3, abs=0.5)
    assert describe_rare_classes(make_dataset([[0]] * 19 + [[1]])) is None
    assert describe_rare_classes(make_dataset([])) is None
    assert describe_rare_classes(replace(frequent, ignore=torch.ones_like(frequent.ignore))) is None
