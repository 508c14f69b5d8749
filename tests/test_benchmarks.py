"""The benchmark scripts use names that the package has; `make bench` is too slow to run them here."""

import ast
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[1] / "benchmarks").glob("*.py"))


def import_name(module: str, name: str) -> Any:
    if hasattr(import_module(module), name):
        return getattr(import_module(module), name)
    assert find_spec(f"{module}.{name}"), f"{module} has no {name}"
    return import_module(f"{module}.{name}")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_benchmark_uses_names_that_the_package_has(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {
        alias.asname or alias.name: import_name(node.module, alias.name)
        for node in imports
        if node.module.partition(".")[0] == "fusedet"
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id)
            assert not isinstance(module, ModuleType) or hasattr(module, node.attr), f"{node.value.id}.{node.attr}"
