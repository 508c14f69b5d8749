"""Static search for calls that could execute the content of a file, under any imported name."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator

NEVER = {
    *("eval", "exec", "compile", "__import__", "builtins"),
    *(
        "pickle",
        "_pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
        "runpy",
        "code",
        "codeop",
        "imp",
        "ctypes",
    ),
    *(
        "torch.jit.load",
        "torch.hub",
        "torch.package",
        "torch.serialization",
        "torch.ops.load_library",
        "torch.classes.load_library",
    ),
    *(
        "torch._utils",
        "torch._weights_only_unpickler",
        "numpy.lib",
        "numpy.core",
        "pydoc.locate",
        "pkgutil.resolve_name",
    ),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all", "yaml.load_all"),
    *(
        "yaml.Loader",
        "yaml.CLoader",
        "yaml.FullLoader",
        "yaml.UnsafeLoader",
        "yaml.CFullLoader",
        "yaml.CUnsafeLoader",
        "yaml.loader",
    ),
    *("os.system", "os.popen", "os.startfile", "pty", "importlib.util", "importlib.machinery", "importlib.__import__"),
    *(f"os.{kind}{way}" for kind in ("exec", "spawn") for way in ("l", "le", "lp", "lpe", "v", "ve", "vp", "vpe")),
}
HARMLESS = {
    "pickle.UnpicklingError",
    "torch.serialization.MAGIC_NUMBER",
    "torch.serialization.safe_globals",
    "importlib.util.find_spec",
}
"""Names below NEVER that execute nothing: an error, a number, a list of names, a test for a package."""
GUARDED = {"torch.load", "numpy.load", "yaml.load"}
"""Functions that may only be called, and only in their safe way."""
REQUIRED_VALUES = {"weights_only": "True", "allow_pickle": "False", "shell": "False"}
"""The only allowed values of these options, in any call."""
LOADERS = {"yaml.SafeLoader", "yaml.BaseLoader"}


def runs_untrusted_code(text: str) -> list[str]:
    """List every place in a source that could execute the content of a file."""
    tree = ast.parse(text)
    names = dict(_imports(tree))
    finder = _Finder(names)
    finder.findings += [f"{name}: everything is imported" for name in names.values() if name.endswith(".*")]
    finder.visit(tree)
    return finder.findings


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield the local names and the full names that they are imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                yield alias.asname or top, alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


class _Finder(ast.NodeVisitor):
    def __init__(self, names: dict[str, str]) -> None:
        self.names, self.findings = names, list[str]()

    def resolve(self, node: ast.AST) -> str:
        """The full name of an expression; empty where it is neither imported nor built in."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id if hasattr(builtins, node.id) else "")
        if isinstance(node, ast.Attribute):
            return (inner := self.resolve(node.value)) and f"{inner}.{node.attr}"
        if isinstance(node, ast.Call) and self.resolve(node.func) == "getattr":
            match node.args:
                case [owner, ast.Constant(value=key), *_]:
                    return (inner := self.resolve(owner)) and f"{inner}.{key}"
        return ""

    def note(self, name: str, node: ast.expr) -> None:
        self.findings.append(f"{name}, line {node.lineno}")

    def name(self, node: ast.expr) -> None:
        name = self.resolve(node)
        parts = name.split(".")
        if name in GUARDED or (name not in HARMLESS and NEVER & {".".join(parts[: i + 1]) for i in range(len(parts))}):
            self.note(name, node)
        elif not name:
            self.generic_visit(node)

    visit_Attribute = name  # noqa: N815

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.name(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, options = self.resolve(node.func), {keyword.arg: keyword.value for keyword in node.keywords}
        if any(key in REQUIRED_VALUES and ast.unparse(value) != REQUIRED_VALUES[key] for key, value in options.items()):
            self.note(name or ast.unparse(node.func), node)
        loader = [*node.args[1:2], *(value for key, value in options.items() if key == "Loader")]
        safe = {
            "torch.load": "weights_only" in options,
            "numpy.load": len(node.args) < 3 and None not in options,
            "yaml.load": [self.resolve(value) in LOADERS for value in loader] == [True],
        }
        if name in GUARDED and not safe[name]:
            self.note(name, node)
        elif name not in GUARDED:
            self.name(node) if self.resolve(node) else self.visit(node.func)
        for part in (*node.args, *node.keywords):
            self.visit(part)
