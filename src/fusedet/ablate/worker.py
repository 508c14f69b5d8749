"""One run of an ablation: begun, or taken up where it stopped. As a program it reads the run's label and config from standard input."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable

from fusedet import config
from fusedet.ablate.plan import FAILED, TIMES, Cell
from fusedet.engine.loop import Interrupted, NonFinite
from fusedet.errors import InputError
from fusedet.verbs.folder import write_json
from fusedet.verbs.train import train


def run(cell: Cell, say: Callable[[str], None] = print, quiet: bool = False) -> None:
    """Train and score a run that is not finished; how long it took is noted in its folder.

    One that diverged is noted too and raises nothing: the other runs of a table do not depend on it.
    """
    folder = cell.folder
    resumed = (folder / "last.ckpt").is_file()
    if not resumed and folder.exists():
        shutil.rmtree(folder)  # it stopped before its first checkpoint: nothing of it can be used
    began = time.perf_counter()
    try:
        train(cell.config, resume=resumed, say=say, quiet=quiet)
    except NonFinite as error:
        write_json(folder / FAILED, {"reason": str(error)})
        return
    write_json(folder / TIMES, {"seconds": time.perf_counter() - began, "resumed": resumed})


def main() -> int:
    """Run what standard input says; exits as the command line does."""
    asked = json.load(sys.stdin)
    try:
        run(Cell(asked["label"], config.parse(asked["config"])))
    except InputError as error:
        print(str(error), file=sys.stderr)
        return 2
    except Interrupted:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
