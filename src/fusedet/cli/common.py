"""What all commands share: the application, their registration, common arguments, and output."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
import webbrowser
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from rich.markup import escape
from typer import Argument, Context, Exit, Option, Typer
from typer.core import TyperCommand

from fusedet import __version__
from fusedet.errors import InputError

if TYPE_CHECKING:
    from fusedet.api.results import CommandResult

EXIT_CODES = (
    "Exit codes: 0 success; 1 doctor reports errors; 2 wrong input; 3 the training diverged; 4 a file cannot be "
    "written, such as on a full disk; 130 Ctrl-C; 143 SIGTERM"
)
COMMON: dict[str, Any] = {"no_args_is_help": True, "context_settings": {"help_option_names": ["-h", "--help"]}}

EXAMPLE = "torchvision/fasterrcnn_resnet50_fpn_v2"
PLAIN: dict[str, Any] = {"soft_wrap": True, "highlight": False, "emoji": False, "markup": False}
out, err = Console(**PLAIN), Console(stderr=True, **PLAIN)
app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, epilog=EXIT_CODES, **COMMON)
converters = Typer(rich_markup_mode="rich", **COMMON)

Settings = Annotated[list[str] | None, Argument(metavar="KEY=VALUE", help="Settings, such as test.score=0.1.")]
ConfigAndSettings = Annotated[
    list[str] | None,
    Argument(metavar="CONFIG|KEY=VALUE", help="Config, YAML file, run directory, published weights; data=PATH, ..."),
]
Sources = Annotated[
    list[str] | None,
    Argument(metavar="SOURCE|KEY=VALUE", help='Files, directories, globs, @FILE (a path per line), "-"; settings.'),
]
ImagesAndVideos = Annotated[
    list[str] | None,
    Argument(
        metavar="SOURCE|KEY=VALUE",
        help='Images, videos, directories, globs, @FILE (a path per line), "-", rtsp://..., cameras (0); settings.',
    ),
]
Save = Annotated[list[str] | None, Option(metavar="FORMAT,...", help="Write csv or yolo too, beside COCO's json.")]
Every = Annotated[int, Option(help="Predict the first of so many frames.", min=1, rich_help_panel="Videos")]
From = Annotated[str, Option("--from", metavar="TIME", help="In seconds, or as 1:30.", rich_help_panel="Videos")]
To = Annotated[str | None, Option("--to", metavar="TIME", help="By default the end.", rich_help_panel="Videos")]
Track = Annotated[bool, Option("--track", help="Number the objects by ByteTrack.", rich_help_panel="Videos")]
Run = Annotated[str, Argument(metavar="RUN", help="Run directory, checkpoint or published weights.")]
Launcher = Annotated[Literal["local", "slurm"], Option(help="Here, or a job per run.", rich_help_panel="Cluster")]
Slurm = Annotated[list[str] | None, Option(metavar="KEY=VALUE", help="Of submitit's jobs.", rich_help_panel="Cluster")]
Json = Annotated[bool, Option("--json", help="Print JSON instead of tables.", rich_help_panel="Output")]
Trust = Annotated[
    bool, Option("--trust", help="Run other packages' code that a config names.", rich_help_panel="Security")
]


def _version(is_asked: bool) -> None:
    if is_asked:
        out.print(__version__)
        raise Exit


@app.callback()
def _root(
    version: Annotated[bool, Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """Object detection with feature pyramids: train, evaluate, compare and explain detectors.

    Settings are written key=value: fusedet train retinanet_r50 data=PATH train.epochs=24 out=runs/a
    """


def command(
    name: str, first: str, second: str, panel: str | None = None, **options: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command, of `convert` without a panel. Its docstring and two examples are the help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        text = "\n\n".join(" ".join(paragraph.split()) for paragraph in (function.__doc__ or "").split("\n\n"))
        epilog = "\n\n".join(["[bold]Examples[/]", *(f"[cyan]$ fusedet {escape(line)}[/]" for line in (first, second))])
        group = app if panel else converters
        return group.command(name, help=text, epilog=epilog, rich_help_panel=panel, **options)(function)

    return register


class SettingsCommand(TyperCommand):
    """A command whose help ends with the settings of the config."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, then key, type, default, meaning and range of every setting."""
        super().format_help(ctx, formatter)
        print(_format_settings(out.width))


def _format_settings(width: int) -> str:
    """Format the settings of a config, by group; they are read from a file, without importing the declarations."""
    file = Path(__file__).parents[1] / "configs" / "settings.json"
    indent, lines = " " * 6, []
    for group, rows in groupby(json.loads(file.read_text(encoding="utf-8")), key=itemgetter("group")):
        lines.append(f"\nSettings: {group or 'run'}\n")
        for row in rows:
            limits = f" ({row['range']})" if row["range"] else ""
            lines.append(f"  {row['key']:<27}{row['type']} = {row['default']}{limits}")
            lines += wrap(row["help"], width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(lines)


def split_arguments(arguments: Iterable[str] | None) -> tuple[list[str], list[str]]:
    """Return the arguments that are no settings, and the settings (key=value); the name of a file is no setting."""
    arguments = list(arguments or ())
    settings = [text for text in arguments if re.match(r"[\w.\[\]]+=", text) and not Path(text).exists()]
    return [text for text in arguments if text not in settings], settings


def split_config(arguments: Iterable[str] | None) -> tuple[str | None, list[str]]:
    """Return the config, if one is named, and the settings, in any order."""
    names, settings = split_arguments(arguments)
    return (names[0] if names else None), [*settings, *settings_only(names[1:], "one config at a time")]


def settings_only(arguments: Iterable[str] | None, context: str) -> list[str]:
    """Return the settings; raise InputError for any other argument. `context` says what the command takes."""
    others, settings = split_arguments(arguments)
    if others:
        raise InputError(f"{others[0]} is one too many: {context}; settings are written key=value")
    return settings


def refuse_other_options(context: Context, mode: str, *allowed: str) -> None:
    """Refuse every option of the command line that a mode of the command does not use.

    Args:
        context: The command's context.
        mode: What selects the mode, such as "--power".
        allowed: Names of the parameters that the mode uses.

    Raises:
        InputError: Other options were given.
    """
    others = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.param_type_name == "option"
        and parameter.name not in allowed
        and getattr(context.get_parameter_source(parameter.name or ""), "name", "") == "COMMANDLINE"
    ]
    if others:
        names = " and ".join(others)
        raise InputError(f"{mode} does not use {names}: leave out {names}")


def split_sides(text: str | None) -> list[int] | None:
    """Return the sides of "800,1216"; raise InputError for another text."""
    return None if text is None else split_numbers(text, "--size", "height,width, such as 800,1216")


def split_numbers(text: str, option: str, right: str) -> list[int]:
    """Return the numbers of "1,8"; raise InputError, which names the option and what is right, for another text."""
    if not all(number.isdecimal() for number in text.split(",")):
        raise InputError(f"{option} {text}: write {right}")
    return [int(number) for number in text.split(",")]


def console(json: bool) -> Console:
    """Return where progress is shown; with --json standard error."""
    return err if json else out


def open_in_browser(page: Path | None) -> None:
    """Open a page in the user's browser; say so if there is no page, and where it is if there is no browser."""
    if page is None:
        err.print("warning: there is no report.html to open: it needs a split with objects")
    elif not webbrowser.open(page.resolve().as_uri()):
        err.print(f"warning: no browser can be started here: open {page}")


def list_steps_after(step: str, run: object, images: str = "IMAGE_OR_DIR...", trust: bool = False) -> list[str]:
    """Return the commands that follow a step on the way from a training to files that run without fusedet.

    Args:
        step: The command that was run: train, val or predict.
        run: A run directory, a checkpoint, published weights or an exported model.
        images: What can be predicted, as shell arguments.
        trust: Whether `run` needs --trust.
    """
    from fusedet.exporters import find_export

    source = shlex.quote(str(run)) + (" --trust" if trust else "")
    rows = [
        (f"fusedet val {source} --open", "where it fails, as a page"),
        (f"fusedet predict {source} {images}", "boxes as JSON and drawn copies"),
        (f"fusedet export {source}", "files that run without fusedet"),
    ]
    rows = rows[["train", "val", "predict"].index(step) : 2 if find_export(str(run)) else 3]
    width = max([len(command) for command, _ in rows], default=0)
    return [f"{command:{width}}  # {gain}" for command, gain in rows]


def name_program(text: str) -> str:
    """Name `fusedet` in the commands of a text as it was started, if the shell does not find it by its name."""
    started, by_name = sys.argv[0], shutil.which("fusedet")
    if Path(started).name != "fusedet" or (by_name and os.path.realpath(by_name) == os.path.realpath(started)):
        return text
    known: list[Any] = [*app.registered_commands, *app.registered_groups]
    names = "|".join(info.name for info in known)
    return re.sub(rf"(?<![\w./-])fusedet (?=({names})\b)", lambda _: f"{shlex.quote(started)} ", text)


def show(result: CommandResult, json: bool, *next_steps: str) -> None:
    """Print a result and which commands could follow; with --json its content."""
    if json:
        return print(result.to_json())
    # a terminal breaks wide tables, a file or a pipe never does
    target = out if out.is_terminal else Console(file=out.file, width=1000, **PLAIN)
    steps = [f"{'      ' if i else 'next: '}{name_program(step)}" for i, step in enumerate(next_steps)]
    target.print(result, *steps, sep="\n")
