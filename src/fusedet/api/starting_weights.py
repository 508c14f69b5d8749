"""Starting weights of a training on other classes: rows of equal names are kept, others are initialized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedet.config import Config
from fusedet.data.class_names import normalize_class_name
from fusedet.models.detectors import build_meta_detector

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class _Rows:
    """The rows of a tensor that has some per class: `per_class` of each of the K classes, then `shared` ones."""

    per_class: int
    shared: int

    def index(self, key: str, classes: int) -> Tensor:
        """Return the rows of each class as (K, per_class)."""
        rows = torch.arange(self.per_class * classes)
        if key.split(".")[-2] == "reg":  # four box deltas of one class lie together
            return rows.unflatten(0, (classes, self.per_class))
        return rows.unflatten(0, (self.per_class, classes)).T  # logits: all classes of one anchor lie together


def find_class_rows(config: Config) -> dict[str, _Rows]:
    """Return the tensors with rows per class: their number of rows depends on the number of classes."""
    of_one, of_two = (build_meta_detector(config, count).state_dict() for count in (1, 2))
    rows = {}
    for key in of_one:
        if of_one[key].shape != of_two[key].shape:
            per_class = len(of_two[key]) - len(of_one[key])
            rows[key] = _Rows(per_class, len(of_one[key]) - per_class)
    return rows


def match_class_names(names: Sequence[str], known: Sequence[str]) -> dict[int, int]:
    """Match class names that are equal but for case, spaces, accents and a plural ending.

    >>> match_class_names(["Cars", "traffic_light", "unicorn"], ["traffic light", "car", "bus"])
    {0: 1, 1: 0}

    Args:
        names: Names to find.
        known: Names to find them in; an equal spelling comes first.

    Returns:
        Index in `known` by index in `names`; names without a match are left out.
    """
    forms: dict[str, int] = {}
    for spell in (str, normalize_class_name):
        for i, name in enumerate(known):
            forms.setdefault(spell(name), i)
    plurals = {plural: forms[name] for name in map(normalize_class_name, known) for plural in _plurals(name)}
    matches = {}
    for i, name in enumerate(names):
        text = normalize_class_name(name)
        places = (forms.get(name), forms.get(text), plurals.get(text), *map(forms.get, _plurals(text)))
        if (place := next((place for place in places if place is not None), None)) is not None:
            matches[i] = place
    return matches


def adapt_class_rows(
    state: Mapping[str, Tensor], fresh: Mapping[str, Tensor], config: Config, known: int, matches: Mapping[int, int]
) -> tuple[Weights, list[str]]:
    """Return weights for other classes.

    Args:
        state: Weights of a detector with `known` classes.
        fresh: Initial weights of the detector with the new classes.
        config: Config of both.
        known: Number of classes of `state`.
        matches: Index of a class in `state` by its new index; its rows are kept.

    Returns:
        The weights, and the names of those with rows per class.
    """
    adapted, class_rows = dict(state), find_class_rows(config)
    for key, rows in class_rows.items():
        old, new = state.get(key), fresh[key].clone()
        if old is None or old.shape[1:] != new.shape[1:] or len(old) != rows.per_class * known + rows.shared:
            continue  # not this detector's: loading refuses it
        classes = (len(new) - rows.shared) // rows.per_class
        if matches:
            of_new, of_old = (list(side) for side in zip(*matches.items()))
            new[rows.index(key, classes)[of_new]] = old[rows.index(key, known)[of_old]]
        if rows.shared:
            new[-rows.shared :] = old[-rows.shared :]  # background
        adapted[key] = new
    return adapted, list(class_rows)


def describe_matches(names: Sequence[str], known: Sequence[str], matches: Mapping[int, int]) -> str:
    """Say which classes keep their rows, under which name, and which start from initial values."""
    kept = [
        name if name == known[matches[i]] else f"{name} (there {known[matches[i]]})"
        for i, name in enumerate(names)
        if i in matches
    ]
    initialized = [name for i, name in enumerate(names) if i not in matches]
    parts = [f"{', '.join(kept)} keep what was learned" if len(kept) > 1 else f"{kept[0]} keeps what was learned"]
    if initialized:
        parts.append(f"{', '.join(initialized)} {'start' if len(initialized) > 1 else 'starts'} from initial values")
    return ", ".join(parts)


def _plurals(name: str) -> list[str]:
    """Return how the regular plural of an English noun may be written."""
    if name.endswith("s"):
        return [f"{name}es"]
    return [f"{name}s", f"{name}es", *([f"{name[:-1]}ies"] if name.endswith("y") else [])]
