"""The fuzzing of tests/test_fuzz.py at length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fuzzing

pytestmark = pytest.mark.soak
COUNTS = {
    "coco": 5000,
    "json": 3000,
    "voc": 5000,
    "yolo": 5000,
    "results": 5000,
    "rle": 20_000,
    "overrides": 2000,
    "config": 3000,
}
small = st.integers(1, 5)
CASES = {
    "coco": (fuzzing.check_coco, (fuzzing.SEEDS, fuzzing.JSON, small)),
    "json": (fuzzing.check_json, (fuzzing.JSON,)),
    "voc": (fuzzing.check_voc, (fuzzing.SEEDS, small)),
    "yolo": (fuzzing.check_yolo, (fuzzing.SEEDS, small)),
    "results": (fuzzing.check_results, (fuzzing.SEEDS, fuzzing.JSON, small)),
    "rle": (fuzzing.check_rle, (fuzzing.RLES, st.tuples(st.integers(1, 12), st.integers(1, 12)))),
    "overrides": (
        fuzzing.check_overrides,
        (
            st.lists(st.tuples(fuzzing.KEYS, fuzzing.VALUES | st.text(max_size=6)), max_size=4),
            st.lists(st.text(max_size=8), max_size=3),
        ),
    ),
    "config": (fuzzing.check_config, (fuzzing.SEEDS, small)),
}


@pytest.mark.parametrize("name", CASES)
def test_nothing_but_input_errors(name: str) -> None:
    check, strategies = CASES[name]

    @settings(max_examples=COUNTS[name], deadline=None, database=None)
    @given(st.tuples(*strategies))
    def run(values: tuple) -> None:
        check(*values)

    run()
