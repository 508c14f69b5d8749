"""A server on the loopback address that serves one file in several ways, for tests of downloads."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer:
    """Serves `content` below `address`, in the way that the first part of the path says.

    - whole: as a usual server, which answers ranges.
    - broken: the first connection ends in the middle.
    - deaf: the same, and ranges are ignored.
    - dead: every connection ends in the middle, and later ones bring nothing.
    - slow: in many small parts.
    - stalled: the first connection stops in the middle and stays open.
    - missing, busy: the status 404, 503.
    - moved: redirects to `whole`; astray: redirects to a local file.
    """

    def __init__(self, content: bytes, address: str) -> None:
        self.content, self.address = content, address
        self.requests: list[tuple[str, str | None]] = []
        self.release = threading.Event()

    @property
    def sha256(self) -> str:
        """The beginning of the content's hash."""
        return hashlib.sha256(self.content).hexdigest()[:8]

    def url(self, kind: str, name: str = "file.pth") -> str:
        return f"{self.address}/{kind}/{name}"


def _make_handler(server: FileServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Print nothing."""

        def do_GET(self) -> None:
            kind, _, name = self.path.strip("/").partition("/")
            server.requests.append((kind, self.headers.get("Range")))
            is_first = sum(other == kind for other, _ in server.requests) == 1
            if kind in ("missing", "busy"):
                return self.send_error({"missing": 404, "busy": 503}[kind])
            if kind in ("moved", "astray"):
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname" if kind == "astray" else f"/whole/{name}")
                return self.end_headers()
            return self._send(kind, is_first)

        def _send(self, kind: str, is_first: bool) -> None:
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and kind != "deaf" else 0
            total = len(server.content)
            if asked and start >= total:
                return self.send_error(416)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(total - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.end_headers()
            rest = server.content[start:]
            if kind == "dead":
                rest = rest[: total // 2 if is_first else 0]
            elif kind in ("broken", "deaf", "stalled") and is_first:
                rest = rest[: total // 2]
            step = max(1, total // 20) if kind == "slow" else len(rest) or 1
            for i in range(0, len(rest), step):
                self.wfile.write(rest[i : i + step])
                time.sleep(0.01 * (kind == "slow"))
            self.wfile.flush()
            if kind == "stalled" and is_first:
                server.release.wait(10)
            return None

    return Handler


@contextmanager
def serve(content: bytes) -> Iterator[FileServer]:
    """Serve a file inside the block."""
    state = FileServer(content, "")
    http = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(state))
    state.address = f"http://127.0.0.1:{http.server_port}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.release.set()
        http.shutdown()
        http.server_close()
        thread.join()
