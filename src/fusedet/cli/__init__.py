"""The command line: one typed function per command; a user's mistake is one line and exit 2."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from rich.markup import escape

from fusedet.api.distributed import place
from fusedet.cli import data, evidence, model, prediction
from fusedet.cli.args import err
from fusedet.engine.trainer import Interrupted
from fusedet.errors import InputError

app = typer.Typer(
    help="Object detection with feature pyramids. Options are key=value: fusedet train retinanet_r50 data=PATH train.epochs=24 out=runs/a",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


converting = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
app.add_typer(
    converting,
    name="convert",
    help="Write a dataset in another form, or another project's weights as a checkpoint here.",
)

COMMANDS: dict[str, Callable[..., None]] = {
    "train": model.train,
    "val": model.val_,
    "predict": prediction.predict_,
    "compare": evidence.compare_,
    "cam": evidence.cam_,
    "ablate": evidence.ablate_,
    "info": model.info,
    "doctor": data.doctor,
    "browse": data.browse,
    "demo": model.demo,
    "config": model.config_,
}
TOGETHER = ("train", "val")
"""Verbs whose processes tell each other what stops them."""
CONVERTERS: dict[str, Callable[..., None]] = {"data": data.convert_data_, "weights": data.convert_weights_}

for name, command in COMMANDS.items():
    app.command(name)(command)
for name, command in CONVERTERS.items():
    converting.command(name)(command)


def main() -> None:
    """Run a command. Exit codes: 0 success, 1 the doctor found errors, 2 wrong input, 3 divergence, 4 a file cannot be written,
    130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """The exit code of a command line."""
    try:
        app(arguments, prog_name="fusedet")
    except SystemExit as end:
        return int(end.code or 0)
    except InputError as error:
        return _refuse(error, sys.argv[1:2] if arguments is None else arguments[:1])
    except Interrupted as stop:
        err.print(escape(str(stop)))
        return stop.code
    except BrokenPipeError:
        return 0
    except OSError as error:  # a full disk, a folder without permission: said, not traced
        return _complain(f"{error.filename or 'a file'}: {error.strerror or error}")
    return 0


def _refuse(error: InputError, command: list[str]) -> int:
    """Say what is wrong with the input: of processes that work together the first one on each machine does, of others each."""
    try:
        rank, world, local = place()
    except InputError:  # it is what is to be said
        rank, world, local = 0, 1, 0
    together = bool(command) and command[0] in TOGETHER
    if together and local:
        return error.exit_code
    return _complain(
        f"process {rank}: {error}" if world > 1 and (rank or not together) else str(error), error.exit_code
    )


def _complain(text: str, code: int = 2) -> int:
    err.print(f"[red]error:[/] {escape(' '.join(text.splitlines()))}")
    return code
