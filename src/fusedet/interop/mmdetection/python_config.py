"""Read MMDetection's Python configs as data: they are parsed and never executed."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fusedet.errors import InputError

Tree = dict[str, Any]
_LARGEST = 10**6  # items and digits that an expression may create; no config has more
_BASE = re.compile(r"\{\{\s*_base_\.([\w.]+)\s*\}\}")
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


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
    if (
        isinstance(above, dict)
        and isinstance(below, list)
        and above
        and all(str(k).isdigit() and int(k) < len(below) for k in above)
    ):
        return [
            merge_configs(item, above.get(str(i), above.get(i, {}))) if str(i) in above or i in above else item
            for i, item in enumerate(below)
        ]
    if not isinstance(above, dict):
        return above
    own = {k: v for k, v in above.items() if k != "_delete_"}
    start = dict(below) if isinstance(below, dict) and not above.get("_delete_", False) else {}
    for key, value in own.items():
        start[key] = merge_configs(start.get(key), value)
    return start


class _Reader:
    """Evaluates one file, statement by statement."""

    def __init__(self, file: str, folder: Path | None, children: tuple[Path, ...]) -> None:
        self.file, self.folder, self.children = file, folder, children
        self.names: Tree = {}
        self.base: Tree = {}
        self.missing: list[str] = []

    def refuse(self, node: ast.AST, what: str) -> InputError:
        where = f"{self.file}, line {getattr(node, 'lineno', '?')}"
        return InputError(
            f"{where}: {what} cannot be read as data, and configs are never executed: write the value itself"
        )

    def execute(self, node: ast.stmt) -> None:
        """Apply an assignment or a del statement; ignore a docstring."""
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            node = ast.copy_location(ast.Assign([node.target], node.value), node)
        if not isinstance(node, (ast.Assign, ast.Delete)):
            raise self.refuse(node, _first_line(node))
        for target in node.targets:
            holder, key = self.resolve_target(node, target)
            try:
                if isinstance(node, ast.Delete):
                    del holder[key]
                else:
                    holder[key] = self.evaluate(node.value)
            except (TypeError, KeyError, IndexError) as error:
                raise self.refuse(node, _first_line(node)) from error
            if isinstance(target, ast.Name) and key == "_base_":
                self.inherit(node, holder[key])

    def resolve_target(self, node: ast.stmt, target: ast.expr) -> tuple[Any, Any]:
        """Return what an assignment changes: a mapping or list, and the key or index in it."""
        match target:
            case ast.Name(id=name):
                return self.names, name
            case ast.Subscript(value=inner, slice=index):
                return self.evaluate(inner), self.evaluate(index)
            case ast.Attribute(value=ast.Name(id="_base_"), attr=name):
                return self.base, name
            case ast.Attribute(value=inner, attr=name):
                return self.evaluate(inner), name
        raise self.refuse(node, _first_line(node))

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
        match node:
            case ast.Constant(value=str(text)):
                return self.fill_template(node, text)
            case ast.Constant():
                return node.value
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
            case ast.Attribute(value=inner, attr=name):
                return self.evaluate_attribute(node, inner, name)
            case ast.Subscript(value=inner, slice=index):
                return self.guard(node, lambda: self.evaluate(inner)[self.evaluate_index(index)])
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not() as op, operand=inner):
                signs: dict[type, Callable[[Any], Any]] = {
                    ast.USub: operator.neg,
                    ast.UAdd: operator.pos,
                    ast.Not: operator.not_,
                }
                return self.guard(node, lambda: signs[type(op)](self.evaluate(inner)))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return self.guard(
                    node,
                    lambda: self.apply_operator(node, _BINARY[type(op)], self.evaluate(left), self.evaluate(right)),
                )
            case ast.IfExp(test=test, body=then, orelse=other):
                return self.evaluate(then) if self.evaluate(test) else self.evaluate(other)
            case ast.JoinedStr(values=parts):
                return "".join(str(self.evaluate(p.value if isinstance(p, ast.FormattedValue) else p)) for p in parts)
            case ast.ListComp(elt=item, generators=[ast.comprehension(target=ast.Name(id=name), iter=source, ifs=[])]):
                return self.evaluate_comprehension(node, item, name, source)
        raise self.refuse(node, _first_line(node))

    def evaluate_items(self, node: ast.expr) -> list[Any]:
        return list(self.evaluate(node.value)) if isinstance(node, ast.Starred) else [self.evaluate(node)]

    def evaluate_index(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Slice):
            return slice(
                *(None if part is None else self.evaluate(part) for part in (node.lower, node.upper, node.step))
            )
        return self.evaluate(node)

    def evaluate_mapping(self, pairs: Any) -> Tree:
        mapping: Tree = {}
        for key, value in pairs:
            if key is None:  # **name
                spread = self.evaluate(value)
                if not isinstance(spread, Mapping):
                    raise self.refuse(value, f"**{_first_line(value)}")
                mapping |= spread
            else:
                mapping[self.evaluate(key)] = self.evaluate(value)
        return mapping

    def evaluate_attribute(self, node: ast.expr, inner: ast.expr, name: str) -> Any:
        if isinstance(inner, ast.Name) and inner.id == "_base_":
            return self.guard(node, lambda: self.base[name])
        holder = self.evaluate(inner)
        if not isinstance(holder, Mapping):
            raise self.refuse(node, _first_line(node))
        return self.guard(node, lambda: holder[name])

    def fill_template(self, node: ast.expr, text: str) -> Any:
        """Replace {{_base_.name}} in a text; a text of nothing else becomes the value itself."""

        def look_up(names: str) -> Any:
            value: Any = self.base
            for part in names.split("."):
                value = value[part]
            return value

        if whole := _BASE.fullmatch(text):
            return self.guard(node, lambda: look_up(whole[1]))
        return self.guard(node, lambda: _BASE.sub(lambda m: str(look_up(m[1])), text))

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
            raise self.refuse(node, _first_line(node))
        return act(a, b)

    def evaluate_comprehension(self, node: ast.expr, item: ast.expr, name: str, source: ast.expr) -> list[Any]:
        before, values = self.names.get(name), []
        had = name in self.names
        for each in self.guard(node, lambda: list(self.evaluate(source))):
            self.names[name] = each
            values.append(self.evaluate(item))
        self.names.pop(name, None)
        if had:
            self.names[name] = before
        return values

    def guard(self, node: ast.expr, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except (TypeError, KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError, MemoryError) as error:
            if isinstance(error, InputError):
                raise
            raise self.refuse(node, _first_line(node)) from error


def _first_line(node: ast.AST) -> str:
    text = " ".join(ast.unparse(node).split())
    return f"`{text[:57]}...`" if len(text) > 60 else f"`{text}`"
