"""Processes forked from a server that has imported everything: a start skips the seconds of torch's import."""

from __future__ import annotations

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["fusedet.cli", "fusedet.api.train"]
)  # installed ones: it does not know pytest's own paths
