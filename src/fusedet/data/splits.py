"""The splits that a config asks for: a share of the training split held out, and classes selected and renamed."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fusedet.config.schema import Data
from fusedet.data.dataset import DetectionDataset, PackedBytes
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import InputError, format_count, make_unknown_error

NO_DATA = "no data: add data=PATH, a folder or file in COCO, VOC or YOLO format"
"""The error of a command that needs a dataset."""


def read_split(data: Data, split: str, *, need_images: bool = True) -> DetectionDataset:
    """Read a split as the section `data` of a config describes it.

    Args:
        data: The section. A number as `data.val` is the share of the images of `data.train` that is `val`; the others
            are `data.train`. Its `path` may be missing only where a split is a file.
        split: The split's name, or its file.
        need_images: As for `read_dataset`.

    Raises:
        InputError: The dataset or the split cannot be read, or lacks a class that the section names.
    """
    is_held_out = isinstance(data.val, float) and split == data.val_split
    name = data.train if is_held_out else split
    if not data.path and not Path(name).is_file():  # "" would be the current folder
        raise InputError(NO_DATA)
    dataset = read_dataset(
        data.path or "",
        name,
        images=data.images,
        need_images=need_images,
        exif=data.exif,
    )
    if isinstance(data.val, float) and (is_held_out or split == data.train):
        held_out = hold_out(dataset, data.val, data.split_seed)
        part = "held out by" if is_held_out else "left by"
        source = f"{dataset.source}, {part} data.val={data.val:g}"
        if is_held_out:  # what cannot be counted by image is said of the other part only
            own = {text: count for text, count in dataset.problems.items() if text in dataset.faulty}
            dataset = dataclasses.replace(dataset, problems=own)
        dataset = take_images(dataset, np.flatnonzero(held_out == is_held_out), source)
    return select_classes(
        dataclasses.replace(dataset, value_range=data.range, channels=data.channels), data.classes, data.rename or {}
    )


def read_key(data: Data) -> tuple[Any, ...]:
    """Return what the splits of a config depend on: two configs of one key have the same splits."""
    settings = (
        data.path,
        data.images,
        data.train,
        data.val,
        data.split_seed,
        data.classes,
        data.exif,
        data.range,
        data.channels,
    )
    return (*settings, *(data.rename or {}).items())


def hold_out(dataset: DetectionDataset, share: float, seed: int) -> np.ndarray:
    """Choose images for validation, so that each class has its share of images there as far as possible.

    Iterative stratification: the class with the fewest images left is divided first. An image goes to the side that
    lacks most images of that class; if both lack as many, to the one that lacks most images, then to training. The
    augmented copies of an image that Roboflow exports (NAME.rf.HASH.jpg) stay together, as one image.

    Args:
        dataset: The images.
        share: The share that is held out, above 0 and below 1.
        seed: Seed of the order of the images.

    Returns:
        (N,) bool, true for the images that are held out: at least one and not all.

    Raises:
        InputError: There is only one image.

    References:
        Sechidis et al., On the Stratification of Multi-Label Data, ECML PKDD 2011, Algorithm 1.
    """
    names = [re.sub(r"\.rf\.\w+\.\w+$", "", str(dataset.path(i))) for i in range(len(dataset))]
    unique, copy_of = np.unique(names, return_inverse=True)
    if (count := len(unique)) < 2:
        raise InputError(f"{dataset.source} has {format_count(count, 'image')}: data.val={share:g} needs at least 2")
    has_class = np.zeros((count, len(dataset.names)), dtype=bool)
    has_class[copy_of[dataset.image_indices], dataset.labels.numpy()] = True
    order = np.random.default_rng(seed).permutation(count)
    shares = np.array([1 - share, share])
    lacking_images = shares * count
    lacking = shares[:, None] * has_class.sum(axis=0)  # (2, K): training and validation
    left = has_class.sum(axis=0)  # (K,): images that have no side yet
    side: np.ndarray = np.full(count, -1)

    def assign(position: int, k: int | None) -> None:
        image = order[position]
        wanted = lacking[:, k] if k is not None else lacking_images
        # rounding decides nothing: shares such as 0.2 and 0.8 of one image have no exact sum
        best = np.flatnonzero(wanted > wanted.max() - 1e-9)
        chosen = int(best[lacking_images[best].argmax()])
        side[image] = chosen
        lacking[chosen, has_class[image]] -= 1
        lacking_images[chosen] -= 1
        left[has_class[image]] -= 1

    while left.any():
        k = int(np.where(left > 0, left, count + 1).argmin())
        for position in np.flatnonzero(has_class[order, k] & (side[order] < 0)):
            assign(int(position), k)
    for position in np.flatnonzero(side[order] < 0):
        assign(int(position), None)
    held_out = np.asarray(side == 1)
    if held_out.all() or not held_out.any():
        held_out[order[-1]] = not held_out.any()
    has_objects: np.ndarray = np.asarray(has_class.any(axis=1))
    if has_objects.sum() > 1 and not (has_objects & held_out).any():
        # so few images that each class wants all of its own for training: exchange the one that it misses least
        counts = np.where(has_class, has_class.sum(axis=0), count + 1).min(axis=1)
        held_out[order[int(np.where(has_objects, counts, 0)[order].argmax())]] = True
        held_out[order[int(np.flatnonzero(held_out[order] & ~has_objects[order])[0])]] = False
    return held_out[copy_of]


def take_images(dataset: DetectionDataset, indices: np.ndarray, source: str) -> DetectionDataset:
    """Return a dataset of some of the images, in the given order, with the problems of their boxes."""
    offsets = dataset.offsets.numpy()
    counts = np.diff(offsets)[indices]
    rows = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices.tolist()] or [np.zeros(0, int)])
    at = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    images = torch.from_numpy(np.asarray(indices, dtype=np.int64))
    texts = dataset.image_id_texts
    new_images = torch.full((len(dataset),), -1)
    new_images[images] = torch.arange(len(images))
    return dataclasses.replace(
        dataset,
        source=source,
        image_ids=dataset.image_ids[images],
        sizes=dataset.sizes[images],
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
        paths=_take(dataset.paths, indices),
        image_id_texts=None if texts is None else _take(texts, indices),
        **_take_annotations(dataset, at),
        **_take_problems(dataset, new_images, torch.arange(len(dataset.names))),
    )


def select_classes(dataset: DetectionDataset, classes: Sequence[str], rename: Mapping[str, str]) -> DetectionDataset:
    """Rename classes, joining those of one name, and keep some of them; images that lose all objects are background.

    Args:
        dataset: The dataset.
        classes: The classes to keep, by their new names, in their new order; none keeps all.
        rename: New names by old ones. A class that gets the name of another joins it, with the id of the first.

    Raises:
        InputError: The dataset lacks a class.
    """
    for key, names, known in (
        ("data.rename", list(rename), dataset.names),
        ("data.classes", list(classes), [rename.get(name, name) for name in dataset.names]),
    ):
        if lacking := next((name for name in names if name not in known), None):
            raise InputError(f"{key}: {dataset.source}: {make_unknown_error('class', lacking, set(known))}")
    if not classes and not rename:
        return dataset
    renamed = [rename.get(name, name) for name in dataset.names]
    kept = select_names(dataset.names, classes, rename)
    new_label = torch.tensor([kept.index(name) if name in kept else -1 for name in renamed])
    firsts = [renamed.index(name) for name in kept]
    labels = new_label[dataset.labels]
    at = torch.nonzero(labels >= 0).flatten()
    image_indices = torch.from_numpy(dataset.image_indices)[at]
    offsets = torch.zeros(len(dataset) + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(image_indices, minlength=len(dataset)).cumsum(0)
    columns = _take_annotations(dataset, at) | {"labels": labels[at]}
    texts = dataset.category_id_texts
    return dataclasses.replace(
        dataset,
        names=tuple(kept),
        category_ids=tuple(dataset.category_ids[i] for i in firsts),
        category_id_texts=tuple(texts[i] for i in firsts) if texts else (),
        offsets=offsets,
        **columns,
        **_take_problems(dataset, torch.arange(len(dataset)), new_label),
    )


def select_names(names: Sequence[str], classes: Sequence[str], rename: Mapping[str, str]) -> list[str]:
    """Return the names of the classes that `select_classes` keeps of a dataset with these names."""
    return list(classes) or list(dict.fromkeys(rename.get(name, name) for name in names))


def _take_annotations(dataset: DetectionDataset, at: torch.Tensor) -> dict[str, Any]:
    columns = ("boxes", "labels", "ignore", "eval_ignore", "area")
    taken: dict[str, Any] = {name: getattr(dataset, name)[at] for name in columns}
    return taken | {"segmentations": _take(dataset.segmentations, at.numpy())}


def _take_problems(dataset: DetectionDataset, new_images: torch.Tensor, new_labels: torch.Tensor) -> dict[str, Any]:
    """Count the faulty boxes that are kept, given the new indices (N,) of the images and (K,) of the classes or -1."""
    problems, examples, faulty = dict(dataset.problems), dict(dataset.examples), {}
    for text, rows in dataset.faulty.items():
        taken = torch.stack([new_images[rows[:, 0]], new_labels[rows[:, 1]]], dim=1)
        is_kept = (taken >= 0).all(dim=1)
        del problems[text], examples[text]
        if is_kept.any():
            faulty[text] = taken[is_kept]
            problems[text] = len(faulty[text])
            examples[text] = str(dataset.path(int(rows[is_kept][0, 0])))
    return {"problems": problems, "examples": examples, "faulty": faulty}


def _take(items: PackedBytes, indices: np.ndarray) -> PackedBytes:
    return PackedBytes.pack([items[i] for i in indices.tolist()])
