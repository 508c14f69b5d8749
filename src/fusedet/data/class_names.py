"""Class names that are given twice, or differ in case, spaces or accents only."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import format_count


def normalize_class_name(name: str) -> str:
    """Return a class name without case, accents, spaces and hyphens.

    >>> normalize_class_name(" Traffic-Light"), normalize_class_name("Müll")
    ('trafficlight', 'mull')
    """
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return re.sub(r"[\s_-]+", "", "".join(letters).casefold())


def count_per_label(dataset: DetectionDataset) -> list[int]:
    """Count the annotations of each label, in the order of the class names."""
    return np.bincount(dataset.labels.numpy(), minlength=len(dataset.names)).tolist()


def label_classes(dataset: DetectionDataset) -> list[str]:
    """Return the class names; where two classes share one, with their category ids."""
    return [
        f"{name} (id {category_id})" if dataset.names.count(name) > 1 else name
        for name, category_id in zip(dataset.names, dataset.category_ids, strict=True)
    ]


def describe_repeated_names(dataset: DetectionDataset) -> tuple[list[str], list[str]]:
    """Describe the class names that several classes share.

    Returns:
        Sentences about names whose classes both have annotations, and about the others: Roboflow, for example, exports
        the group of the classes as a class of its own.
    """
    used, unused = [], []
    counts = count_per_label(dataset)
    for name in dict.fromkeys(name for name in dataset.names if dataset.names.count(name) > 1):
        own = [k for k, other in enumerate(dataset.names) if other == name]
        parts = [f"id {dataset.category_ids[k]} with {format_count(counts[k], 'annotation')}" for k in own]
        sentence = f"{dataset.source}: {len(own)} classes are named '{name}' ({', '.join(parts)})"
        if sum(counts[k] > 0 for k in own) > 1:
            used.append(f"{sentence}: give them different names, or one id")
        else:
            unused.append(f"{sentence}: remove those without annotations, which stay classes that are never detected")
    return used, unused


def describe_similar_names(dataset: DetectionDataset) -> list[tuple[str, int, str]]:
    """Describe the class names that differ in case, spaces, hyphens or accents only.

    Returns:
        Per group of names a sentence, the number of annotations of all but the most frequent name, and the first image
        with one of them.
    """
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for k, name in enumerate(dataset.names):
        groups[normalize_class_name(name)].append(k)
    counts, labels = count_per_label(dataset), dataset.labels.numpy()
    similar = []
    for own in groups.values():
        names = list(dict.fromkeys(dataset.names[k] for k in own))
        if len(names) < 2:
            continue
        order = sorted(own, key=lambda k: -counts[k])
        parts = [f"'{dataset.names[k]}' ({counts[k]})" for k in order]
        kind = "in case only" if len({n.casefold() for n in names}) == 1 else "in case, spaces or accents only"
        sentence = f"the class names {' and '.join(parts)} differ {kind}: write one name if they are one class"
        rare = np.flatnonzero(np.isin(labels, order[1:]))
        example = ""
        if len(rare):
            example = str(dataset.path(int(np.searchsorted(dataset.offsets.numpy(), rare[0], side="right")) - 1))
        similar.append((sentence, len(rare), example))
    return similar


def compare_class_names(train: DetectionDataset, val: DetectionDataset) -> list[str]:
    """Describe how the class names of two splits differ; an empty list where they are equal, in order."""
    if train.names == val.names:
        return []
    a, b = set(train.names), set(val.names)
    only = [_describe_only(split, own) for split, own in (("train", a - b), ("val", b - a)) if own]
    known = {normalize_class_name(name): name for name in b - a}
    similar = [f"'{name}' and '{known[key]}'" for name in sorted(a - b) if (key := normalize_class_name(name)) in known]
    hint = f" ({' and '.join(similar)} differ in case, spaces or accents only)" if similar else ""
    details = f"{'; '.join(only) or 'their order differs'}{hint}"
    return [f"the class names of {train.source} and {val.source} differ: {details}"]


def _describe_only(split: str, names: Iterable[str]) -> str:
    return f"only {split} has {', '.join(sorted(names))}"
