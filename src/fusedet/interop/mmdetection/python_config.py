"""Read MMDetection's Python configs as data: they are parsed and never executed."""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedet.errors import InputError

Tree = dict[str, Any]
_LARGEST = 10**6  # items and digits that an expression may create; no config has more
_BASE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_MISTAKES = (TypeError, KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError, MemoryError)


@dataclass
class PythonConfig:
    """A config and its missing base files."""

    tree: Tree
    missing: list[str] = field(default_factory=list)


def read_config(path: str | Path) -> PythonConfig:
    """Read a config file with its `_base_` files, merged as MMDetection merges them.

    Supported are literals, names assigned before, `dict(...)`, `list(...)` and `tuple(...)`, arithmetic, subscripts,
    comprehensions over lists, and `_base_.name` or `{{_base_.name}}`.

    Raises:
        InputError: The file is absent, or has anything else, which would have to be executed; the message has the line.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"there is no config file {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: give MMDetection's Python config") from error
    return parse_config(text, str(path), path.parent, (path.resolve(),))


def parse_config(text: str, name: str, folder: Path | None = None, children: tuple[Path, ...] = ()) -> PythonConfig:
    """Parse the text of a config.

    Args:
        text: The config.
        name: Name of the config in messages.
        folder: Folder of its bases; None if they are not available.
        children: Config files that have this one as a base.

    Raises:
        InputError: As `read_config` does.
    """
    try:
        statements = ast.parse(text).body
    # Very long numbers and deep nesting raise the last three.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise InputError(f"{name}{line} is not Python: use a config of MMDetection") from error
    reader = _Reader(name, folder, children)
    try:
        for statement in statements:
            reader.execute(statement)
    except RecursionError as error:
        raise InputError(f"{name} is nested too deeply for a config") from error
    return PythonConfig(
        merge_configs(reader.base, {k: v for k, v in reader.names.items() if k != "_base_"}), reader.missing
    )


def merge_configs(below: Any, above: Any) -> Any:
    """Merge `above` into `below`: mappings by key unless `above` has `_delete_`, lists by index; replace all else."""
    if not isinstance(above, dict):
        return above
    if isinstance(below, list) and above and all(str(k).isdigit() and int(k) < len(below) for k in above):
        changes = {int(k): v for k, v in above.items()}
        return [merge_configs(item, changes[i]) if i in changes else item for i, item in enumerate(below)]
    start = dict(below) if isinstance(below, dict) and not above.get("_delete_", False) else {}
    return start | {k: merge_configs(start.get(k), v) for k, v in above.items() if k != "_delete_"}


class _Reader:
    """Evaluates one file, statement by statement."""

    def __init__(self, file: str, folder: Path | None, children: tuple[Path, ...]) -> None:
        self.file, self.folder, self.children = file, folder, children
        self.names: Tree = {}
        self.base: Tree = {}
        self.missing: list[str] = []

    def refuse(self, node: ast.AST, what: str = "") -> InputError:
        """Make the error for a node, which is shown if `what` does not describe it."""
        if not what:
            text = " ".join(ast.unparse(node).split())
            what = f"`{text[:57]}...`" if len(text) > 60 else f"`{text}`"
        where = f"{self.file}, line {getattr(node, 'lineno', '?')}"
        return InputError(
            f"{where}: {what} cannot be read as data, and configs are never executed: write the value itself"
        )

    @contextmanager
    def refusing(self, node: ast.AST) -> Iterator[None]:
        """Refuse a node that cannot be evaluated."""
        try:
            yield
        except InputError:
            raise
        except _MISTAKES as error:
            raise self.refuse(node) from error

    def execute(self, node: ast.stmt) -> None:
        """Apply an assignment or a del statement; ignore a docstring."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.copy_location(ast.Assign([node.target], node.value), node)
        if not isinstance(node, (ast.Assign, ast.Delete)):
            raise self.refuse(node)
        for target in node.targets:
            with self.refusing(node):
                holder, key = self.resolve_target(node, target)
                if isinstance(node, ast.Delete):
                    del holder[key]
                else:
                    holder[key] = self.evaluate(node.value)
            if isinstance(target, ast.Name) and key == "_base_":
                self.inherit(node, holder[key])

    def resolve_target(self, node: ast.stmt, target: ast.expr) -> tuple[Any, Any]:
        """Return what an assignment changes: a mapping or list, and the key or index in it."""
        match target:
            case ast.Name(id=name):
                return self.names, name
            case ast.Subscript(value=inner, slice=index):
                return self.evaluate(inner), self.evaluate(index)
            case ast.Attribute(value=inner, attr=name):
                return self.evaluate(inner), name
        raise self.refuse(node)

    def inherit(self, node: ast.AST, bases: Any) -> None:
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, (list, tuple)) or not all(isinstance(base, str) for base in bases):
            raise self.refuse(node, "a _base_ that is not a file name")
        for base in bases:
            path = None if self.folder is None else self.folder / base
            if path is None or not path.is_file():
                self.missing.append(f"{base} ({self.file})")
                continue
            if path.resolve() in self.children:
                raise InputError(f"{self.file} is, through {base}, its own base")
            if path.suffix != ".py":
                raise self.refuse(node, f"the base {base}, which is not a Python config,")
            base_config = parse_config(
                path.read_text(encoding="utf-8"), str(path), path.parent, (*self.children, path.resolve())
            )
            self.base = merge_configs(self.base, base_config.tree)
            self.missing += base_config.missing

    def evaluate(self, node: ast.expr) -> Any:
        """Evaluate an expression."""
        with self.refusing(node):
            return self._evaluate(node)

    def _evaluate(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=str(text)):
                return self.fill_template(text)
            case ast.Constant():
                return node.value
            case ast.Name(id="_base_") if "_base_" in self.names:
                return self.base
            case ast.Name(id=name):
                if name not in self.names:
                    raise self.refuse(node, f"the name {name}, which is not assigned before,")
                return self.names[name]
            case ast.List() | ast.Tuple():
                items = [v for item in node.elts for v in self.evaluate_items(item)]
                return tuple(items) if isinstance(node, ast.Tuple) else items
            case ast.Set(elts=[ast.Set(elts=[inner])]):  # {{_base_.name}}
                return self.evaluate(inner)
            case ast.Dict():
                return self.evaluate_mapping(zip(node.keys, node.values))
            case ast.Call(func=ast.Name(id="dict"), args=args):
                pairs = dict(self.evaluate(args[0])) if len(args) == 1 else {}
                return pairs | self.evaluate_mapping(
                    (None if k.arg is None else ast.Constant(k.arg), k.value) for k in node.keywords
                )
            case ast.Call(func=ast.Name(id="list" | "tuple" as kind), args=[argument], keywords=[]):
                return list(self.evaluate(argument)) if kind == "list" else tuple(self.evaluate(argument))
            case ast.Attribute(value=inner, attr=name) if isinstance(holder := self.evaluate(inner), Mapping):
                return holder[name]
            case ast.Subscript(value=inner, slice=ast.Slice() as part):
                ends = (None if end is None else self.evaluate(end) for end in (part.lower, part.upper, part.step))
                return self.evaluate(inner)[slice(*ends)]
            case ast.Subscript(value=inner, slice=index):
                return self.evaluate(inner)[self.evaluate(index)]
            case ast.UnaryOp(op=op, operand=inner) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](self.evaluate(inner))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return self.apply_operator(node, _OPERATORS[type(op)], self.evaluate(left), self.evaluate(right))
            case ast.IfExp(test=test, body=then, orelse=other):
                return self.evaluate(then) if self.evaluate(test) else self.evaluate(other)
            case ast.JoinedStr(values=parts):
                return "".join(str(self.evaluate(p.value if isinstance(p, ast.FormattedValue) else p)) for p in parts)
            case ast.ListComp(elt=item, generators=[ast.comprehension(target=ast.Name(id=name), iter=source, ifs=[])]):
                return self.evaluate_comprehension(item, name, source)
        raise self.refuse(node)

    def evaluate_items(self, node: ast.expr) -> list[Any]:
        return list(self.evaluate(node.value)) if isinstance(node, ast.Starred) else [self.evaluate(node)]

    def evaluate_mapping(self, pairs: Any) -> Tree:
        mapping: Tree = {}
        for key, value in pairs:
            if key is not None:
                mapping[self.evaluate(key)] = self.evaluate(value)
            elif isinstance(spread := self.evaluate(value), Mapping):  # **name
                mapping |= spread
            else:
                raise self.refuse(value)
        return mapping

    def fill_template(self, text: str) -> Any:
        """Replace {{_base_.name}} in a text; a text of nothing else becomes the value itself."""

        def look_up(match: re.Match[str]) -> Any:
            value: Any = self.base
            for part in match[1].split("."):
                value = value[part]
            return value

        whole = _BASE.fullmatch(text)
        return look_up(whole) if whole else _BASE.sub(lambda match: str(look_up(match)), text)

    def apply_operator(self, node: ast.expr, act: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        """Apply an operator, unless its result could be larger than that of any config."""
        sizes = [len(v) if isinstance(v, (str, list, tuple)) else abs(v) for v in (a, b)]
        numbers = not any(isinstance(v, (str, list, tuple)) for v in (a, b))
        too_large = {
            operator.pow: not numbers or max(sizes) > _LARGEST or sizes[1] > 64,
            operator.mul: sizes[0] * sizes[1] > (_LARGEST**3 if numbers else _LARGEST),
            operator.mod: not numbers,
        }
        if too_large.get(act, False):
            raise self.refuse(node)
        return act(a, b)

    def evaluate_comprehension(self, item: ast.expr, name: str, source: ast.expr) -> list[Any]:
        values, outer = [], self.names
        for each in list(self.evaluate(source)):
            self.names = outer | {name: each}
            values.append(self.evaluate(item))
        self.names = outer
        return values
