"""The memory of a process and its workers, a line fitted to it, and programs that measure themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

KIB, MIB = 2**10, 2**20
BLOCKS = 20
T_95 = 2.101  # Student's t for BLOCKS - 2 degrees of freedom, 95 % two-sided


@dataclass(frozen=True)
class Line:
    """A slope and its 95 % interval, in bytes per unit; the units that the fit covers."""

    slope: float
    low: float
    high: float
    units: float

    def __str__(self) -> str:
        return f"{self.slope:+.0f} bytes each ({self.low:+.0f} to {self.high:+.0f}) over {self.units:.0f}"


def line(units: Sequence[float], memory: Sequence[float], warm_up: float = 0.25) -> Line:
    """Least squares through the means of BLOCKS blocks, the first `warm_up` share of the units left out.

    Blocks, since an allocator's steps last for many samples: neighbors are not independent, and their interval would be
    too narrow.
    """
    x, y = np.asarray(units, float), np.asarray(memory, float)
    keep = x >= x[0] + warm_up * (x[-1] - x[0])
    blocks = [np.array_split(v[keep], BLOCKS) for v in (x, y)]
    x, y = (np.array([part.mean() for part in parts]) for parts in blocks)
    away = x - x.mean()
    slope = float(away @ y / (away @ away))
    rest = y - y.mean() - slope * away
    error = float(np.sqrt(rest @ rest / (BLOCKS - 2) / (away @ away)))
    return Line(slope, slope - T_95 * error, slope + T_95 * error, float(np.ptp(x)))


def pss(pid: int | str = "self") -> int:
    """Return the bytes of a process and its descendants; a page that n of them share counts 1/n in each.

    Pages of files are left out: a library's count less in each process as soon as an unrelated process maps it too.
    """
    total, rest = 0, [str(os.getpid() if pid == "self" else pid)]
    while rest:
        process = Path("/proc", rest.pop())
        try:
            rows = (process / "smaps_rollup").read_text().splitlines()
            total += sum(int(row.split()[1]) * KIB for row in rows if row.startswith(("Pss_Anon:", "Pss_Shmem:")))
            for task in (process / "task").iterdir():
                rest += (task / "children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    return total


COMMAND = """
import json, sys
from fusedet import cli
from fusedet.models.detectors import OneStage
from resident import pss

method, every, arguments = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
taken, calls, images = [], 0, 0
original = getattr(OneStage, method)

def watched(self, batch, *rest, **named):
    global calls, images
    calls, images = calls + 1, images + len(getattr(batch, "images", batch))
    if calls % every == 0:
        taken.append((calls, images, pss()))
    return original(self, batch, *rest, **named)

setattr(OneStage, method, watched)
assert cli.run(arguments) == 0
print(json.dumps(taken))
"""


def run(program: str | Path, *arguments: Any, timeout: float = 3600) -> Any:
    """Run a program, a text or a file, and return its last line as JSON; it can import the modules beside this one."""
    started = [str(program)] if isinstance(program, Path) else ["-c", program]
    place = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(
        [sys.executable, *started, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | place,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def of_command(method: str, every: int, arguments: Sequence[object]) -> np.ndarray:
    """Run a `fusedet` command and sample its memory every so many calls of a detector's method.

    Returns:
        (samples, 3): calls so far, images so far, bytes.
    """
    return np.array(run(COMMAND, method, every, json.dumps([str(argument) for argument in arguments])))
