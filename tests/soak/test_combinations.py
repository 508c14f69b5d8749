"""Every combination of detector, neck, plug-in and interaction exports and compiles, not only test_together.py's."""

from __future__ import annotations

import pytest

from test_together import COMBINATIONS, check_compiled, check_export

pytestmark = pytest.mark.soak


@pytest.mark.parametrize(("head", "neck", "plugin", "interact"), COMBINATIONS)
def test_exports_and_compiles(head: str, neck: str, plugin: str, interact: str) -> None:
    check_export(head, neck, plugin, interact)
    check_compiled(head, neck, plugin, interact)
