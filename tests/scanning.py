"""What a source could run of a file's content, found by its names: whatever they are imported as, called or handed on."""

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
FINE = {
    "pickle.UnpicklingError",
    "torch.serialization.MAGIC_NUMBER",
    "torch.serialization.safe_globals",
    "importlib.util.find_spec",
}
"""An error, a number, a list of names and a look whether a package is there: they run nothing."""
CAREFUL = {"torch.load", "numpy.load", "yaml.load"}
"""To be called only, and in their safe way."""
ONLY = {"weights_only": "True", "allow_pickle": "False", "shell": "False"}
"""What these options may be, of whatever call."""
LOADERS = {"yaml.SafeLoader", "yaml.BaseLoader"}


def runs_untrusted_code(text: str) -> list[str]:
    """Every place in a source that could run what a file holds."""
    tree = ast.parse(text)
    names = dict(_imports(tree))
    finder = _Finder(names)
    finder.found += [f"{name}: everything is imported" for name in names.values() if name.endswith(".*")]
    finder.visit(tree)
    return finder.found


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names, and what they are imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield one.asname or one.name.partition(".")[0], one.name if one.asname else one.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for one in node.names:
                yield one.asname or one.name, f"{node.module}.{one.name}"


class _Finder(ast.NodeVisitor):
    def __init__(self, names: dict[str, str]) -> None:
        self.names, self.found = names, list[str]()

    def called(self, node: ast.AST) -> str:
        """The full name of what an expression stands for; nothing where that is no import and no built-in."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, node.id if hasattr(builtins, node.id) else "")
        if isinstance(node, ast.Attribute):
            return (inner := self.called(node.value)) and f"{inner}.{node.attr}"
        if isinstance(node, ast.Call) and self.called(node.func) == "getattr":
            match node.args:
                case [owner, ast.Constant(value=key), *_]:
                    return (inner := self.called(owner)) and f"{inner}.{key}"
        return ""

    def note(self, name: str, node: ast.expr) -> None:
        self.found.append(f"{name}, line {node.lineno}")

    def name(self, node: ast.expr) -> None:
        name = self.called(node)
        parts = name.split(".")
        if name in CAREFUL or (name not in FINE and NEVER & {".".join(parts[: i + 1]) for i in range(len(parts))}):
            self.note(name, node)
        elif not name:
            self.generic_visit(node)

    visit_Attribute = name  # noqa: N815

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.name(node)

    def visit_Call(self, node: ast.Call) -> None:
        name, options = self.called(node.func), {one.arg: one.value for one in node.keywords}
        if any(key in ONLY and ast.unparse(value) != ONLY[key] for key, value in options.items()):
            self.note(name or ast.unparse(node.func), node)
        loader = [*node.args[1:2], *(value for key, value in options.items() if key == "Loader")]
        safe = {
            "torch.load": "weights_only" in options,
            "numpy.load": len(node.args) < 3 and None not in options,
            "yaml.load": [self.called(one) in LOADERS for one in loader] == [True],
        }
        if name in CAREFUL and not safe[name]:
            self.note(name, node)
        elif name not in CAREFUL:
            self.name(node) if self.called(node) else self.visit(node.func)
        for part in (*node.args, *node.keywords):
            self.visit(part)
