"""What every request passes: the check of its host and origin, the limit of its size, and the headers of its answer."""

from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusedet.app.metrics import Metrics

FORM_BYTES = 2**16
"""What a form may hold beside the file."""
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
"""Headers of every answer: the page runs its own files only, and no other site shows or reads it."""


class RequestGuard:
    """ASGI middleware that refuses requests before they are read.

    - 400: the Host header is none of `hosts`, as after a DNS rebinding; ports are not compared.
    - 403: a page of another site sends something.
    - 413: the request is longer than a form with the largest file.

    A fault of the program is answered with 500, without its text.

    Args:
        app: The application.
        hosts: Names and addresses under which the server may be called, in lower case.
        max_bytes: The largest file in bytes.
        metrics: Counts the requests.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str], max_bytes: int, metrics: Metrics) -> None:
        self.app, self.hosts, self.max_bytes, self.metrics = app, frozenset(hosts), max_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        size, has_begun = 0, False

        async def receive_counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_bytes + FORM_BYTES:
                raise HTTPException(413, describe_size_limit(self.max_bytes))
            return message

        async def send_guarded(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                route: Any = scope.get("route")
                self.metrics.count_request(scope["method"], getattr(route, "path", "other"), message["status"])
            await send(message)

        refusal = self._refuse(scope)
        try:
            await (refusal or self.app)(scope, receive_counted, send_guarded)
        except Exception:  # the server logs it; an answer that has begun is cut off
            if not has_begun:
                await _answer(500, "the server failed at this request; its log says why")(scope, receive, send_guarded)
            raise

    def _refuse(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        if _get_hostname(f"//{headers.get('host', '')}") not in self.hosts:
            return _answer(400, "this server is not called by that Host header: start it with --allow-host NAME")
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin and _get_hostname(origin) not in self.hosts:
            return _answer(403, "pages of other sites may not send requests to this server")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.max_bytes + FORM_BYTES:
            return _answer(413, describe_size_limit(self.max_bytes))
        return None


def describe_size_limit(max_bytes: int) -> str:
    """Return the sentence for a file that is too large."""
    return f"the file is larger than {max_bytes / 1e6:g} MB, the limit of this server"


def _get_hostname(address: str) -> str | None:
    """Return the lower-case host of an address, without port and brackets; None for a malformed one."""
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _answer(status: int, text: str) -> JSONResponse:
    return JSONResponse({"detail": text}, status)
