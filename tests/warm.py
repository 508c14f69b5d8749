"""Processes forked from one that has imported everything: a start costs a second, not the seconds that torch's import takes."""

from __future__ import annotations

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["fusedet.cli", "fusedet.api.train"]
)  # installed ones: it does not know pytest's own paths
