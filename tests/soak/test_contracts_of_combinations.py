"""Every combination of detector, neck, plug-in and interaction keeps the contracts, not only test_together.py's."""

from __future__ import annotations

from itertools import product

import pytest

from small import DOUBLE_HEAD, TWO_STAGE
from test_together import COMBINATIONS, INTERACTIONS, NECKS, PAIRS, PLUGINS, STRIDES, check_contracts
from test_together_two_stage import REPPOINTS, TWO, TWO_STAGE_STRIDES, assemble
from test_together_two_stage import check_contracts as check_contracts_of

pytestmark = pytest.mark.soak


@pytest.mark.parametrize(("head", "neck", "plugin", "interact"), [row for row in COMBINATIONS if row not in PAIRS])
def test_one_stage(head: str, neck: str, plugin: str, interact: str) -> None:
    check_contracts(head, neck, plugin, interact)


@pytest.mark.parametrize(
    ("neck", "plugin", "interact"), [row for row in product(NECKS, PLUGINS, INTERACTIONS) if row not in REPPOINTS]
)
def test_reppoints(neck: str, plugin: str, interact: str) -> None:
    check_contracts_of(assemble("reppoints", neck, plugin, interact), STRIDES)


@pytest.mark.parametrize(
    ("name", "neck", "plugin"),
    [row for row in product([*TWO_STAGE, DOUBLE_HEAD], NECKS, PLUGINS) if row not in TWO],
)
def test_two_stage(name: str, neck: str, plugin: str) -> None:
    check_contracts_of(assemble(name, neck, plugin, everything=True), TWO_STAGE_STRIDES)
