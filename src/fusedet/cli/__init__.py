"""The command line: parses text, calls the functions of `fusedet`, prints results; the help imports no torch."""

import errno
import sys
from typing import Any

from rich.markup import escape
from typer import BadParameter
from typer.main import get_command

from fusedet.cli import benchmark, commands, conversions, datasets, serving  # noqa: F401  (registers the commands)
from fusedet.cli.common import COMMON, app, err, name_program
from fusedet.engine.signals import Interrupted
from fusedet.errors import InputError, StorageError
from fusedet.process_ranks import get_ranks

USAGE_ERROR: Any = BadParameter.__base__  # in which module it stands depends on typer's version
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
JOINT_COMMANDS = ("train", "val")
"""Commands whose processes fail together, so that one per machine reports it."""


def run(arguments: list[str] | None = None) -> int:
    """Run a command line, by default that of `sys.argv`, and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, name = arguments[:1], "fusedet"
    called: Any = get_command(app)
    if arguments[1:] in (["--help"], ["-h"]) and arguments[0] in called.commands:
        # the application has options whose values are converted first, by pydantic: it takes as long as the rest
        called, name, arguments = called.commands[arguments[0]], f"fusedet {arguments[0]}", arguments[1:]
    try:
        return int(called.main(arguments, prog_name=name, standalone_mode=False, **COMMON["context_settings"]) or 0)
    except USAGE_ERROR as error:  # typer reports a wrong choice as a "Value error"
        return _report(error.format_message().replace("Value error, ", ""), error.exit_code, command)
    except InputError as error:
        return _report(str(error), error.exit_code, command)
    except Interrupted as stop:
        err.print(name_program(str(stop)))
        return stop.code
    except OSError as error:
        code = (StorageError if error.errno in FULL else InputError).exit_code
        return _report(f"{error.filename or 'a file'}: {error.strerror or error}", code, command)


def _report(text: str, code: int, command: list[str]) -> int:
    """Print an error in one line and return the exit code; of several processes name the one that fails."""
    try:
        rank, world, local = get_ranks()
    except InputError:  # it is then the error to report
        rank, world, local = 0, 1, 0
    is_joint = bool(command) and command[0] in JOINT_COMMANDS
    text = name_program(" ".join(text.splitlines()))
    if text and not (is_joint and local):
        is_named = world > 1 and not (is_joint and rank == 0)
        err.print(f"[red]error:[/] {f'process {rank}: ' * is_named}{escape(text)}", markup=True)
    return code
