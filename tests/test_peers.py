"""A process that dies in the middle of a step: the others stop within a minute with its name, and the last checkpoint is whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fusedet.engine import checkpoint

TESTS = Path(__file__).parent

# plain processes, without torchrun, which would end the others itself; forked, because importing torch is what takes time
SCRIPT = """
import json, os, signal, socket, sys, time
from pathlib import Path

import torch
from fakes import FakeDetector, FakeLoader
from lightning_fabric import Fabric
from torch import nn

from fusedet import cli
from fusedet.engine import peers
from fusedet.engine.trainer import Recipe, fit
from fusedet.engine.optim import Optim
from fusedet.errors import InputError

top = Path(sys.argv[1])
peers.GRACE = peers.STOPPED = 3.0


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def stuck():
    time.sleep(600)


def unreadable():
    raise InputError("x.jpg is truncated or damaged: use another image")


# by process, what happens to it in its sixth step
SCENARIOS = {
    "last": {2: killed},
    "first": {0: killed},
    "stuck": {0: stuck, 1: killed},
    "unreadable": {1: unreadable},
}


class Loader(FakeLoader):
    length = 4

    def epoch(self, epoch, start=0):
        for number, batch in enumerate(super().epoch(epoch, start), start=start):
            if (epoch, number) == (1, 1) and self.act:
                self.act()
            yield batch


def work(scenario, rank, world, out):
    fabric = Fabric(accelerator="cpu", devices=world, strategy="ddp")
    fabric.launch()
    loader = Loader(length=4)
    loader.act = SCENARIOS[scenario].get(rank)
    detector = FakeDetector()
    detector.body[1] = nn.Identity()
    with peers.Peers(fabric, out / "last.ckpt"):
        fit(fabric, detector, loader, Recipe(epochs=3, optim=Optim(warmup_steps=0)), out=out, quiet=True)


def child(scenario, rank, world, port, out):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    said = os.open(out / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 1)
    os.dup2(said, 2)
    cli.app = lambda *words, **more: work(scenario, rank, world, out)  # the command; what becomes of its errors is the command line's
    code = cli.run([])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


figures = {}
for scenario in SCENARIOS:
    out = top / scenario
    out.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    children = []
    world = 3 if scenario == "last" else 2
    for rank in range(world):
        if not (pid := os.fork()):
            child(scenario, rank, world, port, out)
        children.append(pid)
    codes, times = {}, {}
    for _ in children:
        pid, status = os.wait()
        codes[children.index(pid)] = os.waitstatus_to_exitcode(status)
        times[children.index(pid)] = time.monotonic()
    figures[scenario] = {"codes": [codes[r] for r in range(world)], "seconds": max(times.values()) - min(times.values())}
(top / "figures.json").write_text(json.dumps(figures))
"""


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("peers")
    (out / "script.py").write_text(SCRIPT)
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(out / "script.py"), str(out)], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads((out / "figures.json").read_text())


def said(ends: tuple[Path, dict[str, Any]], scenario: str, rank: int) -> str:
    return " ".join((ends[0] / scenario / f"{rank}.txt").read_text().split())


@pytest.mark.parametrize(
    ("scenario", "codes", "speaker", "silent", "name"),
    [
        ("last", [75, 75, -9], 0, [1], "process 2"),
        ("first", [-9, 75], 1, [], "process 0"),
        ("stuck", [75, -9], 0, [], "process 1"),
    ],
)
def test_the_others_stop_with_its_name(
    ends, scenario: str, codes: list[int], speaker: int, silent: list[int], name: str
) -> None:
    """Waiting in a collective operation (the first two) or busy with something else."""
    figures = ends[1][scenario]
    assert figures["codes"] == codes
    assert figures["seconds"] < 60
    host = "127.0.0.1" if name == "process 0" else socket.gethostname()
    last = ends[0] / scenario / "last.ckpt"
    gone = f"error: {name} on {host} is gone (killed, out of memory, or its machine is down)"
    sentence = f"{gone}; the others stop too, the last checkpoint is {last}: start all again with --resume"
    assert said(ends, scenario, speaker).count(sentence) == 1
    assert "Traceback" not in said(ends, scenario, speaker)
    assert not any("error:" in said(ends, scenario, rank) for rank in silent)
    saved = checkpoint.load(last)
    assert (saved["epoch"], saved["step"]) == (1, 4)


def test_one_process_alone_meets_a_bad_image(ends) -> None:
    """Its error is not lost, and the others do not wait for it."""
    assert ends[1]["unreadable"]["codes"] == [75, 2]
    assert ends[1]["unreadable"]["seconds"] < 60
    text = said(ends, "unreadable", 0)
    assert (
        f"process 1 on {socket.gethostname()} stopped: x.jpg is truncated or damaged: use another image; the others stop too"
        in text
    )
