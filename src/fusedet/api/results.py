"""What the commands return: plain fields, JSON-ready content, and tables when printed."""

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from fusedet.api import tables
from fusedet.api.run_dir import to_plain


class CommandResult(ABC):
    """A command's result. `print(result)` shows it as text, `rich.print(result)` as tables."""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain values, as `--json` prints it: by default all fields."""
        return dict(to_plain(vars(self)))

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return json.dumps(to_plain(self.to_dict()), indent=2, ensure_ascii=False)

    @abstractmethod
    def __rich__(self) -> RenderableType:
        """Return what is printed on a terminal."""

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=200, soft_wrap=True, highlight=False, emoji=False).print(self)
        return text.getvalue().rstrip("\n")


@dataclass(frozen=True)
class RunResult(CommandResult):
    """A trained or validated model.

    Attributes:
        out: The directory of the files.
        metrics: COCO's metrics by name, `classes` with a row per class, and `stamp`, which identifies data and
            evaluator. Empty in all processes but the first.
        files: The files written, by what they show.
        title: What was evaluated, for the table.
    """

    out: Path
    metrics: dict[str, Any]
    files: dict[str, Path]
    title: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics, the directory and the files."""
        return self.metrics | {"out": str(self.out), "files": format_paths(self.files)}

    def __rich__(self) -> RenderableType:
        scored = [tables.metrics_table(self.metrics, self.title)] if "AP" in self.metrics else []
        return Group(*scored, list_files(self.files))


def format_paths(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the files by what they show, as text."""
    return {name: str(path) for name, path in files.items()}


def list_files(files: Mapping[str, Path]) -> Group:
    """Return a line per file."""
    return group_lines(f"{name}: {path}" for name, path in files.items())


def group_lines(texts: Any) -> Group:
    """Return texts as lines that are not broken and hold no markup."""
    return Group(*(Text(text, no_wrap=True, overflow="ignore") for text in texts))
