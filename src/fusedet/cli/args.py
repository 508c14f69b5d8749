"""What the commands share: the words of a command line as a config, and what is printed."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from fusedet import config
from fusedet.api import run_dir
from fusedet.cli import tables
from fusedet.config import Config
from fusedet.errors import InputError

out, err = (Console(stderr=to_err, soft_wrap=True, highlight=False, emoji=False) for to_err in (False, True))

Words = Annotated[list[str] | None, typer.Argument(metavar="[MODEL] [KEY=VALUE]...", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Trust = Annotated[
    bool,
    typer.Option("--trust", help="Let a checkpoint's or run's config name classes of other packages: their code runs."),
]
Classes = Annotated[int | None, typer.Option(help="Number of classes; by default a run's own, else COCO's 80.")]


def any_config(words: list[str] | None) -> Config:
    """The config of a model, where one is named, with its overrides; else of the overrides alone."""
    name, overrides = separate(words)
    return load_config(name, overrides) if name else config.parse(config.overridden({}, overrides))


def load_config(name: str, overrides: list[str], trust: bool = True) -> Config:
    """The config of a shipped name, a YAML file or a run's folder (its `out` is not taken: nothing is written there again).

    trust: whether a run's folder, which may be somebody else's, may name classes of other packages.
    """
    if name in config.names() or not Path(name).is_dir():
        return config.load(name, overrides)
    return config.load(of_run(Path(name)), ["out=null", *overrides], trust=trust)


def of_run(folder: Path) -> Path:
    """The config file of a run's folder; raises InputError for another folder."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise InputError(f"{folder} is not a run's folder: it has no config.yaml; did you mean data={folder}?")
    return file


def separate(words: list[str] | None) -> tuple[str | None, list[str]]:
    """The model's name, if any, and the overrides; order does not matter."""
    names = [w for w in words or [] if not is_override(w)]
    if len(names) > 1:
        raise InputError(f"one model at a time, got {' and '.join(names)}: options are written key=value")
    return (names[0] if names else None), [w for w in words or [] if is_override(w)]


def is_override(word: str) -> bool:
    """Whether a word is key=value, and no file of that name."""
    key = word.partition("=")[0]
    return (
        "=" in word
        and not Path(word).exists()
        and key.replace(".", "").replace("_", "").replace("[", "").replace("]", "").isalnum()
    )


def speaker(json: bool) -> Callable[[str], None]:
    """What prints a line for the user: where JSON is asked for, to standard error."""
    return lambda text: (err if json else out).print(escape(text))


def track(json: bool, items: Iterable[Any], total: int, text: str) -> Iterable[Any]:
    """The items, with a progress bar."""
    return tables.track(err if json else out, items, total, text)


def print_files(files: dict[str, Path]) -> None:
    """Files by what they show, a line each."""
    for name, path in files.items():
        out.print(f"{name}: {escape(str(path))}")


def print_json(content: dict[str, Any]) -> None:
    """Figures as JSON on standard output."""
    print(jsonlib.dumps(run_dir.plain(content), indent=2, ensure_ascii=False))
