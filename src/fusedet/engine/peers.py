"""Tells within a minute which process of several is gone, while the others would wait for it for half an hour.

The first process holds a connection to each of the others. When a process ends, however it ends, its system closes the connection at
once; when a machine is lost, TCP's own questions go unanswered for half a minute. Neither depends on what a process is busy with.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lightning_fabric import Fabric

from fusedet.errors import InputError

EXIT = 75
"""The exit code where another process is gone: sysexits' "try again", here with --resume."""
MEETING, VERDICT = 60.0, 10.0  # seconds: to connect; to learn whom an error came from
GRACE, STOPPED = (
    15.0,
    45.0,
)  # seconds for a process to end by itself: after another's death, after another's own error, which it may share
_LONGEST = 16384  # bytes of a message
_OPEN: weakref.WeakSet[socket.socket] = weakref.WeakSet()


class Lost(Exception):  # noqa: N818
    """Another process of the training is gone. The command line exits with 75; the message is empty where another process says it."""


class Peers:
    """Inside the block, a process that ends without leaving it ends the others too, by `Lost` with its number and host.

    All processes enter together, after Fabric's launch, and leave when they like. checkpoint: the file to name as what to go on from.
    With one process nothing is done. A process stuck in a collective operation cannot raise: it says so and ends after `GRACE` seconds.
    """

    def __init__(self, fabric: Fabric, checkpoint: Path, say: Callable[[str], None] = print) -> None:
        self.fabric, self.checkpoint, self.say = fabric, checkpoint, say
        self.rank, self.world = fabric.global_rank, fabric.world_size
        self.hosts: dict[int, str] = {}
        self.reason: str | None = None
        self._lost, self._left = threading.Event(), threading.Event()
        self._peers: dict[int, socket.socket] = {}  # of the first process: all others; of another: the first

    def __enter__(self) -> Self:
        if self.world > 1:
            self._meet()
            threading.Thread(target=self._listen, name="peers", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.world == 1:
            return
        # an error of this library or a signal is told as it is; anything else may be what another's end looks like from here
        lost = isinstance(error, (RuntimeError, OSError)) and self._lost.wait(VERDICT)
        self._left.set()
        self._tell({"end": "" if error is None or lost else _sentence(error)})
        for peer in self._peers.values():
            peer.close()
        if lost:
            raise Lost(self.reason if self._speaks() else "") from None

    def _meet(self) -> None:
        server, key = None, secrets.token_hex(16)
        master = os.environ.get("MASTER_ADDR", "127.0.0.1")
        if not self.rank:
            server = _server(master)
        port, key = self.fabric.broadcast((server.getsockname()[1] if server else 0, key))
        if server:
            with server:
                self._peers = dict(self._arrivals(server, key))
            if absent := sorted(set(range(1, self.world)) - self._peers.keys()):
                numbers = ", ".join(map(str, absent))
                self.say(
                    f"warning: port {port} of {master} cannot be reached by process {numbers}: its end will not be noticed"
                )
        else:
            about = {"key": key, "rank": self.rank, "host": socket.gethostname()}
            try:
                peer = socket.create_connection((master, port), timeout=MEETING)
                _watched(peer).sendall(_line(about))
                self._peers, self.hosts = {0: peer}, {0: master}
            except OSError:
                return  # the first process says so

    def _arrivals(self, server: socket.socket, key: str) -> Iterator[tuple[int, socket.socket]]:
        """The other processes with their connections, as long as they take to come; strangers are turned away."""
        end, missing = time.monotonic() + MEETING, self.world - 1
        while missing and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            try:
                peer, _ = server.accept()
            except OSError:
                return
            peer.settimeout(5)
            about = _message(peer)
            if not hmac.compare_digest(str(about.get("key")), key):
                peer.close()
                continue
            self.hosts[int(about["rank"])] = str(about["host"])
            missing -= 1
            yield int(about["rank"]), _watched(peer)

    def _listen(self) -> None:
        """Wait for one of the others to end; of those that say why or goodbye, nothing more is expected."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map() and not self._left.is_set():
                for ready, _ in selector.select(timeout=1):
                    said = _message(ready.fileobj)  # type: ignore[arg-type]
                    selector.unregister(ready.fileobj)
                    if said.get("end") != "":
                        return self._end(
                            said.get("lost") or self._told(ready.data, said.get("end")), STOPPED if said else GRACE
                        )

    def _told(self, rank: int, why: str | None) -> str:
        gone = f"process {rank} on {self.hosts.get(rank, 'an unknown host')}"
        reason = f"stopped: {why}" if why else "is gone (killed, out of memory, or its machine is down)"
        there = self.checkpoint.is_file()
        rest = (
            f"the last checkpoint is {self.checkpoint}: start all again with --resume" if there else "start all again"
        )
        return f"{gone} {reason}; the others stop too, {rest}"

    def _end(self, reason: str, grace: float) -> None:
        if self._left.is_set():
            return
        self.reason = reason
        self._lost.set()
        if not self.rank:
            self._tell({"lost": reason})
        if not self._left.wait(grace):
            if self._speaks():
                print(f"error: {reason}", file=sys.stderr, flush=True)
            os._exit(EXIT)

    def _speaks(self) -> bool:
        """The first process speaks for all; where it is gone, one or two on each machine."""
        return not self.rank or (
            (self.reason or "").startswith("process 0 ") and int(os.environ.get("LOCAL_RANK", 0)) < 2
        )

    def _tell(self, message: dict[str, Any]) -> None:
        for peer in self._peers.values():
            try:
                peer.sendall(_line(message))
            except OSError:
                continue  # it is gone already


def _server(address: str) -> socket.socket:
    """A free port of this machine where the other processes look for it."""
    for host in (address, ""):
        try:
            family = socket.getaddrinfo(host or "0.0.0.0", None)[0][0]
            server = socket.create_server((host, 0), family=family)
        except OSError:
            continue  # a name that stands for this machine elsewhere only
        _OPEN.add(server)
        return server
    raise InputError(f"MASTER_ADDR={address}: no port of this machine can be opened for the other processes")


def _watched(peer: socket.socket) -> socket.socket:
    """A connection that the system asks after 10 s of silence, every 5 s, whether the other side is still there."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _OPEN.add(peer)
    return peer


def _line(message: dict[str, Any]) -> bytes:
    return (json.dumps(message) + "\n").encode()


def _message(peer: socket.socket) -> dict[str, Any]:
    """The next message; empty where none comes whole."""
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < _LONGEST:
            if not (part := peer.recv(1)):
                return {}
            text += part
        said = json.loads(text)
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _sentence(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:1000]


def _close_in_child() -> None:
    """A worker must not hold its parent's connections: they would outlive the parent."""
    for one in list(_OPEN):
        one.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
