"""The project speaks the field's English: private words stay out of code, docs, help texts and test names."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from fusedet.cli import app
from syntax_trees import parse_source

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = [
    r"pictures?\b",
    r"bod(?:y|ies)\b",
    r"data sets?\b",
    r"rooms?\b",
    r"the house\b",
    r"verbs?\b",
    r"peers?\b",
    r"strangers?\b",
    r"outlines?\b",
    r"better(?:s|ed)\b",
    r"anew\b",
    r"told apart",
    r"at rest\b",
    r"resting\b",
    r"shared out\b",
    r"honest\b",
    r"bites?\b",
    r"second look\b",
    r"what was found",
    r"there is none\b",
]
"""Each begins at a word's beginning."""
BRITISH = (
    "centre|colour|neighbour|behaviour|licence|grey|(?:label|model|signal|cancel)l(?:ed|ing)|"
    "(?:general|initial|local|maxim|minim|normal|optim|random|real|recogn|regular|sanit|special|summar|synchron|visual)"
    "is(?:e|ing|ation)"
)
"""British spelling, anywhere in a word; American is the field's."""
IDENTIFIERS = {"told", "bare", "look", "found", "Found", "Records", "words", "views", "owner", "owners"}
PARAMETERS = {"one", "others"}
ALLOWED = {
    r"\boutline=|\.outline\b": "Pillow's and matplotlib's own name of a border",
    r"\w+(\(\w*\))?\\?\.body\b|\\?\.body\\?\.": "timm's model inside the backbone, part of checkpoint keys as in torchvision; ast's field",
    r"\bbody=": "ast's field",
    r"\bget\(\"body\"|\bbody: form\b": "ASGI's field and that of a request in a browser",
    r"</?body\b|\bbody[ ,{]+(\.|font|margin)|\bbody\.dragging": "HTML's element",
    r"\boutline(-offset)?:": "CSS's property",
    r"\baria-labelledby\b": "HTML's attribute",
}
"""Fragments that may stand, each with its reason."""

SOURCES = sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "src").rglob("*.yaml"))
PAGES = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "Makefile")),
    *(path for path in sorted((ROOT / "examples").rglob("*")) if path.suffix in (".md", ".py", ".ipynb")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *sorted((ROOT / "src/fusedet/app/static").iterdir()),
    *sorted((ROOT / "src/fusedet/report").glob("page.*s")),
]
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def find_forbidden(text: str) -> Iterator[str]:
    """Line number and line of every forbidden word."""
    forbidden = re.compile(rf"\b(?:{'|'.join(FORBIDDEN)})|{BRITISH}", re.IGNORECASE)
    for number, line in enumerate(text.splitlines(), 1) if forbidden.search(text) else ():
        rest = re.sub("|".join(ALLOWED), "", line)
        for match in forbidden.finditer(rest):
            yield f"{number}: '{match[0]}' in {line.strip()[:100]}"


def list_lines(path: Path, lines: Iterable[str]) -> list[str]:
    """The lines as `file:line` for the report of a test, which reads many files because a test each takes longer."""
    return [f"{path.relative_to(ROOT)}:{line}" for line in lines]


def test_words() -> None:
    assert not [
        line
        for path in (*SOURCES, *PAGES)
        for line in list_lines(path, find_forbidden(path.read_text(encoding="utf-8")))
    ]


def find_identifiers(tree: ast.AST) -> Iterator[str]:
    """Line number and name of every forbidden identifier."""
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "name", None)
        if name in IDENTIFIERS or (isinstance(node, ast.arg) and node.arg in IDENTIFIERS | PARAMETERS):
            yield f"{node.lineno}: {name or node.arg}"  # type: ignore[attr-defined]


def test_identifiers() -> None:
    assert not [
        line
        for path in (*SOURCES, *PAGES, *TESTS)
        if path.suffix == ".py"
        for line in list_lines(path, find_identifiers(parse_source(path)))
    ]


def test_names_and_docstrings_of_tests() -> None:
    wrong = []
    for path in TESTS:
        texts = [path.stem.replace("_", " ")]
        for node in ast.walk(parse_source(path)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                texts += [getattr(node, "name", "").replace("_", " "), ast.get_docstring(node) or ""]
        wrong += list_lines(path, find_forbidden("\n".join(texts)))
    assert not wrong


def list_commands() -> list[tuple[str, ...]]:
    """Every command and group of the command line as the arguments that call it."""

    def visit(command: object, arguments: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield arguments
        for name, child in getattr(command, "commands", {}).items():
            yield from visit(child, (*arguments, name))

    return list(visit(get_command(app), ()))


@pytest.mark.parametrize("arguments", list_commands(), ids=lambda arguments: " ".join(arguments) or "fusedet")
def test_help_texts(arguments: tuple[str, ...]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0
    assert not list(find_forbidden(result.output))


def test_a_forbidden_word_is_noticed() -> None:
    assert len(list(find_forbidden("A picture\nfine\nset anew, Told Apart\nbox_centres"))) == 4
    assert not list(find_forbidden("brush.rectangle(box, outline=color)"))
    assert list(find_identifiers(ast.parse("def f(one):\n    told = one"))) == ["1: one", "2: told"]
