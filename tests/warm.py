"""Processes forked from a server that has imported everything: a start skips the seconds of torch's import."""

from __future__ import annotations

import multiprocessing
import socket

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["fusedet.cli", "fusedet.api.train"]
)  # installed ones: it does not know pytest's own paths


def make_ranks(processes: int) -> list[dict[str, str]]:
    """The environment of each process of a group, as torchrun sets it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "tests",
        "GROUP_RANK": "0",
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
