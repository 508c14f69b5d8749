"""Inference engines in processes of their own, which measure when they are asked: both ends of the pipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from fusedet.api.timing import Span, read_peak_memory, time_call
from fusedet.errors import InputError

Engine = Callable[[int], dict[str, Span]]
"""Function of a number of images that predicts as many at once, and returns the seconds of each part by name."""
GRACE = 10.0  # seconds for a process to end by itself
LONGEST_REASON = 300


class Measurement(NamedTuple):
    """An engine's answer: the seconds of each part, and the process's peak memory so far in MiB."""

    spans: dict[str, Span]
    peak: float | None


class EngineProcess:
    """A process with one engine. What goes wrong in it is kept in `error`; nothing is raised.

    Args:
        command: The program and its arguments; it calls `serve`.

    Attributes:
        error: Why the engine cannot run, in one line; None while it can.
        start_seconds: Seconds of opening the model and of the first prediction, without the imports.
        imports_memory: MiB that the process held before it opened the model: PyTorch and fusedet.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.error: str | None = None
        self.start_seconds: float | None = None
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by close)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, encoding="utf-8"
        )
        opened = self._receive()
        self._open_seconds = float(opened["open_seconds"]) if opened else 0.0
        self.imports_memory: float | None = opened["imports_MiB"] if opened else None

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def measure(self, batch: int) -> Measurement | None:
        """Predict a batch of images once; None if the engine cannot."""
        if self.error is not None:
            return None
        assert self._process.stdin is not None
        with suppress(OSError):  # it died: the answer is missing too
            self._process.stdin.write(f"{json.dumps(batch)}\n")
            self._process.stdin.flush()
        answer = self._receive()
        if answer is None:
            return None
        spans = {name: Span(*seconds) for name, seconds in answer["spans"].items()}
        if self.start_seconds is None:
            self.start_seconds = self._open_seconds + max(span.wall for span in spans.values())
        return Measurement(spans, answer["peak_MiB"])

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):  # it died with an unread line
            self._process.stdin.close()
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _receive(self) -> dict[str, Any] | None:
        """Read an answer; keep the error that it states, or that the process died of."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith("\n"):
            self.error = _describe_death(self._process.wait(), self._read_log())
            return None
        answer: dict[str, Any] = json.loads(line)
        self.error = answer.get("error")
        return answer if self.error is None else None

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode(errors="replace")


def serve(open_engine: Callable[[], Engine], requests: Iterable[str], answer: Callable[[str], object]) -> None:
    """Open an engine, then answer each request, a number of images, with one line of JSON.

    An error of the engine is answered and ends the loop.
    """
    try:
        imports = read_peak_memory()
        engine, opened = time_call(open_engine)
        answer(json.dumps({"open_seconds": opened.wall, "imports_MiB": imports}))
        for line in requests:
            spans = engine(json.loads(line))
            answer(json.dumps({"spans": spans, "peak_MiB": read_peak_memory()}))
    except Exception as error:
        answer(json.dumps({"error": describe_error(error)}))


def serve_pipe(open_engine: Callable[[], Engine]) -> None:
    """Serve on the standard streams; what libraries print goes to standard error instead."""
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(open_engine, sys.stdin, lambda line: print(line, file=pipe, flush=True))


def describe_error(error: Exception) -> str:
    """Return an error as one line; with its type, unless it is a sentence for the user."""
    text = " ".join(str(error).split())[:LONGEST_REASON]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}".removesuffix(": ")


def _describe_death(code: int, log: str) -> str:
    """Say how a process ended without an answer: by a signal, or with the last line of its log."""
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + ", maybe because memory ran out" * (name == "SIGKILL")
    last = (log.strip().splitlines() or ["no message"])[-1][:LONGEST_REASON]
    return f"its process ended with code {code}: {last}"
