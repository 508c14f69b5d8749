"""The command line: parses text, calls `fusedet.api`, prints the result. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import errno
import os
import sys

from rich.markup import escape

from fusedet.cli import commands  # noqa: F401  (registers them)
from fusedet.cli.app import app, err
from fusedet.engine.signals import Interrupted
from fusedet.errors import DivergenceError, InputError, StorageError

EXIT_CODES: dict[type[Exception], int] = {InputError: 2, DivergenceError: 3, StorageError: 4}
"""The exit code of each error; all codes are listed in the help of `fusedet`."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
JOINT_COMMANDS = ("train", "val")
"""Commands whose processes fail together, so that one per machine reports it."""


def main() -> None:
    """Run the command of `sys.argv` and exit with its code."""
    sys.exit(run())


def run(arguments: list[str] | None = None) -> int:
    """Run a command line and return its exit code."""
    command = (sys.argv[1:] if arguments is None else arguments)[:1]
    try:
        app(arguments, prog_name="fusedet")
    except SystemExit as end:
        return int(end.code or 0)
    except tuple(EXIT_CODES) as error:
        return _report(str(error), next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), command)
    except Interrupted as stop:
        err.print(escape(str(stop)))
        return stop.code
    except BrokenPipeError:
        return 0
    except OSError as error:
        code = EXIT_CODES[StorageError if error.errno in FULL else InputError]
        return _report(f"{error.filename or 'a file'}: {error.strerror or error}", code, command)
    return 0


def _report(text: str, code: int, command: list[str]) -> int:
    """Print an error in one line and return the exit code; of several processes name the one that fails."""
    rank, world, local = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    is_joint = bool(command) and command[0] in JOINT_COMMANDS
    if not (is_joint and local not in ("", "0")):
        is_named = world not in ("", "1") and rank.isdecimal() and not (is_joint and rank == "0")
        err.print(f"[red]error:[/] {f'process {rank}: ' * is_named}{escape(' '.join(text.splitlines()))}")
    return code
