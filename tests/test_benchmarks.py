"""The benchmark scripts use names that the package has; `make bench` is too slow to run them here."""

import ast
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fusedet.interop.published_weights import list_published_weights

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


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


def test_published_latencies() -> None:
    """Each line of the model zoo's latencies is of names that exist and no other line has."""
    lines = (ROOT / "docs/reference/latency.jsonl").read_text(encoding="utf-8").splitlines()
    about, *rows = map(json.loads, lines)
    names = [name for row in rows for name in row["names"]]
    assert len(names) == len(set(names))
    assert not {name for name in names if not name.startswith("torchvision/")} - list_published_weights().keys()
    assert all(row["processor_ms"] > 0 and row["ratio"] > 0 and row["detections"] >= 0 for row in rows)
    assert about["machine"]["threads"] == 1


GPU_CASES = [
    ("step", "retinanet", []),
    ("predict", "mask_rcnn", []),
    ("predict", "retinanet", ["model.neck=[fpn,smsl]"]),
]
"""Each kind of call, kind of detector and side, and a module."""
SELECTION = """
import json, sys

sys.path.insert(0, sys.argv.pop())
import gpu

chosen, list_cases = json.loads(sys.argv.pop()), gpu.list_cases
gpu.list_cases = lambda setup: [case for case in list_cases(setup) if [case[0], case[1], list(case[4])] in chosen]
gpu.main()
"""
"""The benchmark with the cases of its last but one argument; the last one is its folder."""


@pytest.mark.slow
@pytest.mark.parametrize("every_case", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_gpu_benchmark_runs_on_the_cpu(every_case: bool, tmp_path: Path) -> None:
    """At tiny sizes, so that the script does not fail on a machine with a GPU."""
    table = tmp_path / "table.md"
    folder = ROOT / "benchmarks"
    start = [str(folder / "gpu.py")] if every_case else ["-c", SELECTION]
    chosen = [] if every_case else [json.dumps(GPU_CASES), str(folder)]
    command = [sys.executable, "-W", "ignore", *start, "--tiny", "--table", str(table), *chosen]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(done.stdout)
    assert len(report["rows"]) == (16 if every_case else len(GPU_CASES))
    assert report["left_out"] == []
    assert not [row["errors"] for row in report["rows"] if "errors" in row]
    assert all(values["median_ms"] > 0 for row in report["rows"] for values in row["sides"].values())
    assert report["training"]["runs"].keys() == {f"{p} seed {s}" for p in ("fp32", "bf16") for s in (0, 1)}
    assert len(table.read_text().splitlines()) == 4 + sum(len(row["sides"]) for row in report["rows"])
