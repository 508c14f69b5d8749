"""Property tests in two sizes: few random examples in the normal suite, the whole number in the slow one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis.strategies import SearchStrategy

SHARE = 0.3
"""Part of the examples in the normal suite."""


def property_test(examples: int, *strategies: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Run a check with that many examples of the strategies in the slow suite, and with a part of them otherwise."""

    def parametrize(check: Callable[..., None]) -> Any:
        sizes = [round(SHARE * examples), pytest.param(examples, marks=pytest.mark.slow)]

        @pytest.mark.parametrize("examples", sizes)
        def run(examples: int) -> None:
            settings(max_examples=examples, deadline=None)(given(*strategies)(check))()

        run.__doc__ = check.__doc__
        return run

    return parametrize
