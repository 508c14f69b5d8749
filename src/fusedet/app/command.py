"""The command `app` and its parts for Python: an ASGI application of one or two models, and a server that runs it."""

from __future__ import annotations

import errno
import importlib.util
import ipaddress
import re
import socket
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from fusedet.api.settings import Settings, to_overrides
from fusedet.errors import InputError, require_at_least

if TYPE_CHECKING:
    from fastapi import FastAPI

PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
"""The packages of the extra `app`, by the module to import."""
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Under these names the server is called from its own machine."""
ALL_ADDRESSES = ("0.0.0.0", "::", "")
CONNECTIONS = 200
"""Open connections and requests, above which further ones are refused with status 503."""


def create_app(
    run: str | Path,
    *overrides: str,
    beside: str | Path | None = None,
    examples: Iterable[str] | None = (),
    allowed_hosts: Collection[str] = (),
    max_size_mb: int = 32,
    queue: int = 16,
    trust: bool = False,
    **settings: Unpack[Settings],
) -> FastAPI:
    """Load one or two models and return the application that serves them, for any ASGI server.

    >>> app = fusedet.create_app("runs/a", allowed_hosts=["detect.example.com"])  # doctest: +SKIP

    Args:
        run: A run directory, a checkpoint, a name of published weights or an exported model.
        overrides: "key=value" texts for `api.predictor.SETTABLE` and `device`. `test.score` is the lowest score that is
            computed, by default `served_model.LOWEST_SCORE`; an exported model has its own.
        beside: A second model, compared with the first one.
        examples: Files, directories, globs and lists of example images; None for validation images of the run's
            dataset, where it is on this machine. Everyone who reaches the server can see them.
        allowed_hosts: Names and addresses under which it may be called beside those of its own machine. Requests with
            another Host header are refused.
        max_size_mb: The largest file in megabytes (10^6 bytes).
        queue: Requests that may wait beside the one that is computed; further ones are refused with status 429.
        trust: Whether the checkpoints' configs may name classes of other packages, whose code then runs.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A package of the extra `app` is missing, a host is none, or a model cannot be loaded.
    """
    _require_packages()
    require_at_least(1, max_size_mb=max_size_mb)
    require_at_least(0, queue=queue)
    hosts = {_parse_host(host) for host in (*LOCAL_HOSTS, *allowed_hosts)}
    from fusedet.app.examples import Examples
    from fusedet.app.served_model import load_models
    from fusedet.app.server import State, build_server

    sources = [run] if beside is None else [run, beside]
    models = load_models(sources, to_overrides(overrides, settings), trust)
    first = next(iter(models.values()))
    own = Examples(examples, first.predictor.config)
    return build_server(State(models, own, max_size_mb * 10**6, queue), hosts)


def serve_app(
    run: str | Path,
    *overrides: str,
    beside: str | Path | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    examples: Iterable[str] | None = None,
    allowed_hosts: Collection[str] = (),
    max_size_mb: int = 32,
    queue: int = 16,
    trust: bool = False,
    say: Callable[[str], None] = print,
    **settings: Unpack[Settings],
) -> None:
    """Serve a page to try one or two models until Ctrl-C.

    >>> fusedet.serve_app("runs/a", port=8000)  # doctest: +SKIP

    Args:
        run: As for `create_app`, and so are the other arguments except for these.
        overrides: "key=value" texts.
        beside: A second model.
        host: The address to bind. Other machines reach 0.0.0.0 or this machine's own address, under `host` or one of
            `allowed_hosts`.
        port: The port, 0 for a free one.
        examples: By default validation images of the run's dataset if `host` is this machine only, else no images.
        allowed_hosts: Further names and addresses of the server.
        max_size_mb: The largest file in megabytes.
        queue: Requests that may wait.
        trust: Whether code that a config names may run.
        say: Takes the line with the address.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: As `create_app`, or the address cannot be bound.
    """
    _require_packages()
    if not 0 <= port <= 65535:
        raise InputError(f"port={port} must be 0 to 65535")
    if not host:
        raise InputError("host is empty: use 127.0.0.1, or 0.0.0.0 for all addresses")
    import uvicorn

    is_local = host in LOCAL_HOSTS
    hosts = [*allowed_hosts, *([] if host in ALL_ADDRESSES else [host])]
    with _listen(host, port) as listening:
        app = create_app(
            run,
            *overrides,
            beside=beside,
            examples=() if examples is None and not is_local else examples,
            allowed_hosts=hosts,
            max_size_mb=max_size_mb,
            queue=queue,
            trust=trust,
            **settings,
        )
        from fusedet.app.replies import summarize_models

        shown = "localhost" if host in ALL_ADDRESSES else f"[{host}]" if ":" in host else host
        say(f"{summarize_models(app.state.served.models)}: http://{shown}:{listening.getsockname()[1]}")
        say("its JSON interface is described at /docs; Ctrl-C ends it")
        if host in ALL_ADDRESSES and not allowed_hosts:
            say("other machines are refused until --allow-host NAME names the host that they call")
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=CONNECTIONS,
            server_header=False,
            timeout_graceful_shutdown=5,
        )
        try:
            uvicorn.Server(config).run(sockets=[listening])
        except KeyboardInterrupt:
            say("stopped")


def _require_packages() -> None:
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise InputError(f'the app needs {" and ".join(missing)}: pip install "fusedet[app]"')


def _parse_host(host: str) -> str:
    """Return an allowed host as it is compared: in lower case, and of an IPv6 address without brackets.

    Raises:
        InputError: It is no name or address, as with a scheme or a port.
    """
    name = host.lower().strip("[]")
    if not re.fullmatch(r"[\w.-]+", name):
        try:
            ipaddress.ip_address(name)
        except ValueError:
            raise InputError(
                f"the allowed host {host!r} must be a name or an address without scheme, port and path, "
                "such as detect.example.com"
            ) from None
    return name


def _listen(host: str, port: int) -> socket.socket:
    """Open the socket before the models are loaded: a taken port is reported at once.

    Raises:
        InputError: The address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"port={port} is taken by another program: choose another one, or 0 for a free one"
            ) from error
        if error.errno in (errno.EADDRNOTAVAIL, socket.EAI_NONAME):
            raise InputError(f"host={host} is no address of this machine: use 127.0.0.1 or 0.0.0.0") from error
        raise InputError(f"host={host} port={port} cannot be opened: {error.strerror or error}") from error
