"""A small part of a full product in which every pair of values occurs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Choose combinations of one value per axis so that every pair of values of two axes occurs; a greedy cover."""
    candidates = list(product(*axes))
    missing = {pair for row in candidates for pair in pairs(row)}
    rows = []
    while missing:
        best = max(candidates, key=lambda row: len(missing & pairs(row)))
        rows.append(best)
        missing -= pairs(best)
    return rows


def pairs(row: tuple[Any, ...]) -> set[tuple[Any, ...]]:
    return set(combinations(enumerate(row), 2))
