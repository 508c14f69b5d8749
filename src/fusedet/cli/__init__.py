"""The command line: parses text, calls the functions of `fusedet`, prints results.

Heavy modules are imported when a command runs, not for the help.
"""

from __future__ import annotations

import errno
import os
import sys

from rich.markup import escape

from fusedet.cli import commands  # noqa: F401  (registers them)
from fusedet.cli.common import app, err
from fusedet.engine.signals import Interrupted
from fusedet.errors import InputError, StorageError

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
    except InputError as error:
        return _report(str(error), error.exit_code, command)
    except Interrupted as stop:
        err.print(escape(str(stop)))
        return stop.code
    except BrokenPipeError:
        return 0
    except OSError as error:
        code = (StorageError if error.errno in FULL else InputError).exit_code
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
