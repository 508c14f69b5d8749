"""A served app in a thread, for tests that need a real connection or a browser."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from PIL import Image


@contextmanager
def serve_in_thread(app: Any) -> Iterator[str]:
    """Run an ASGI application on a free port of the loopback address; yields its address."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


def make_image(width: int, height: int, seed: int = 0, **options: Any) -> bytes:
    """Noise in coarse cells as an image file, PNG by default."""
    cells = np.random.default_rng(seed).integers(0, 255, (8, 12, 3), dtype=np.uint8)
    image = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, **({"format": "PNG"} | options))
    return data.getvalue()
