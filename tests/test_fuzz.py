"""Parsers raise InputError or nothing, whatever they read; the long version is in tests/soak."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import strategies as st

import fuzzing
from properties import property_test

EXAMPLES = 40
small = st.integers(1, 3)


@property_test(EXAMPLES, fuzzing.SEEDS, fuzzing.JSON, small)
def test_coco(seed: int, value: Any, count: int) -> None:
    fuzzing.check_coco(seed, value, count)


@property_test(EXAMPLES, fuzzing.JSON)
def test_any_json(tree: Any) -> None:
    fuzzing.check_json(tree)


@property_test(EXAMPLES, fuzzing.SEEDS, small)
def test_voc(seed: int, count: int) -> None:
    fuzzing.check_voc(seed, count)


@property_test(EXAMPLES, fuzzing.SEEDS, st.integers(0, 3))
def test_yolo(seed: int, count: int) -> None:
    fuzzing.check_yolo(seed, count)


@property_test(EXAMPLES, fuzzing.SEEDS, fuzzing.JSON, small)
def test_results(seed: int, value: Any, count: int) -> None:
    fuzzing.check_results(seed, value, count)


STRANGE = [("score", 10**400), ("image_id", 10**30), ("bbox", [1, 2, 10**40, 4]), ("bbox", [1, -1e308, 3, 20])]
COUNTS = [[10**30], [-5, 205], [5, 5], "~~~~", "X6" * 100, "", None, ["a"]]


def test_results_that_fuzzing_rarely_makes() -> None:
    """Deep nesting, numbers that no array holds, masks that are slow to draw."""
    good = fuzzing.FOUND
    assert fuzzing.score_results(json.dumps(good).encode())
    assert not fuzzing.score_results(b"[" * 200_000)
    masks = [
        ("segmentation", {"size": size, "counts": counts})
        for counts in COUNTS
        for size in ([10, 20], [-10, -20], [10.0, 20], 5)
    ]
    for key, value in STRANGE + masks:
        assert not fuzzing.score_results(json.dumps([good[0] | {key: value}]).encode()), (key, value)


@property_test(EXAMPLES, fuzzing.RLES, st.tuples(st.integers(1, 12), st.integers(1, 12)))
def test_rle(rle: dict[str, Any], size: tuple[int, int]) -> None:
    fuzzing.check_rle(rle, size)


@property_test(
    EXAMPLES,
    st.lists(st.tuples(fuzzing.KEYS, fuzzing.VALUES | st.text(max_size=6)), max_size=3),
    st.lists(st.text(max_size=8), max_size=2),
)
def test_overrides(pairs: list[tuple[str, str]], arguments: list[str]) -> None:
    fuzzing.check_overrides(pairs, arguments)


@property_test(EXAMPLES, fuzzing.SEEDS, small)
def test_config_files(seed: int, count: int) -> None:
    fuzzing.check_config(seed, count)


def test_the_fuzzer_sees_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a parser's mistake")

    monkeypatch.setattr(fuzzing, "read_coco", broken)
    with pytest.raises(KeyError):
        fuzzing.check_json([])
    with pytest.raises(KeyError):
        fuzzing.score_results(b"[]")
