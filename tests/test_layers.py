"""Imports go one way: a package imports from lower layers only, those of one layer never each other, without cycles."""

import ast
from functools import cache
from pathlib import Path

from syntax_trees import parse_source

ROOT = Path(__file__).resolve().parents[1] / "src" / "fusedet"
LAYERS = [
    {"errors"},
    {
        "types",
        "config",
        "safe_load",
        "atomic_io",
        "file_hash",
        "host_copy",
        "quiet",
        "garbage_collection",
        "collectives",
        "process_ranks",
        "function_skipping",
    },
    {"models.protocols"},
    {"models.build", "models.ops", "models.profiling"},
    {"models.backbones", "models.necks", "models.heads", "models.roi", "models.modules", "data"},
    {"models.detectors"},
    {"engine", "evaluation", "visualization", "interop", "exporters"},
    {"report"},
    {"api"},
    {"ablation", "app"},
    {"cli"},
]
LAYER_OF = {own: i for i, packages in enumerate(LAYERS) for own in packages}


@cache
def imports(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it, as dotted paths below the package."""
    imported = set()
    for node in ast.walk(parse_source(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fusedet":
            inside = node.module.split(".")[1:]
            names = [".".join([*inside, alias.name]) for alias in node.names]
            imported |= {n if is_module(n) else ".".join(inside) for n in names} - {""}
        elif isinstance(node, ast.Import):
            imported |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("fusedet.")}
    return imported


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def files() -> list[Path]:
    return [p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"]


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package(module: str) -> str:
    """The package of a module: the first part of its name, of `models` the first two."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "models" else 1])


def test_a_public_class_name_stands_for_one_class() -> None:
    places: dict[str, list[str]] = {}
    for path in files():
        for node in ast.walk(parse_source(path)):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(name(path))
    assert {own: modules for own, modules in places.items() if len(modules) > 1} == {}


def test_every_package_has_a_layer() -> None:
    assert {package(name(p)) for p in files()} - {"models"} <= set(LAYER_OF)


def test_imports_go_down() -> None:
    wrong = []
    for path in files():
        own = package(name(path))
        for target in imports(path):
            other = package(target)
            if other != own and LAYER_OF[other] >= LAYER_OF[own]:
                wrong.append(f"{name(path)} imports {target}")
    assert not wrong


def test_no_cycles_within_packages() -> None:
    graph = {name(p): {t for t in imports(p) if package(t) == package(name(p))} for p in files()}
    while graph:
        leaves = {n for n, targets in graph.items() if not targets & set(graph) - {n}}
        assert leaves, f"a cycle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


def test_layers_alone_read_the_mode() -> None:
    """forward, loss and predict work in train and eval mode alike: only layers read the mode."""
    readers = {p.relative_to(p.parents[2]).as_posix() for p in files() if "self.training" in p.read_text()}
    assert readers == {"models/backbones/trident.py", "models/ops/layers.py"}
