"""Live sources: videos over HTTP through the path of every address, and sources that do not answer."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from file_server import serve
from fusedet import cli
from fusedet.api.predictor import Predictor
from fusedet.data import videos
from making_videos import make_video

pytest.importorskip("av")
from test_predict_videos import Capture, make_predictor, read_lines
from test_videos import milliseconds, read

TIMES = range(0, 1600, 40)


@pytest.fixture
def square(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """The predictor that the command loads as any run."""
    predictor = make_predictor()
    monkeypatch.setattr("fusedet.api.predict.load", lambda run, *texts, **options: predictor)
    return predictor


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("streams") / "a.ts", TIMES, sound="aac")


@pytest.fixture(scope="module")
def video(file: Path) -> bytes:
    return file.read_bytes()


def predict(source: str, out: Path, *options: str) -> int:
    return cli.run(["predict", "RUN", source, f"out={out}", *options])


def test_a_video_over_http(file: Path, square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    """Each frame is predicted alone; lines and the drawn copy have the times of the file."""
    with serve(file.read_bytes()) as server:
        address = server.url("whole", "a.ts")
        assert predict(address, tmp_path / "out", "--every", "2", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["videos"], result["frames"], result["skipped"]) == (1, len(TIMES) // 2, 0)
    lines = read_lines(tmp_path / "out" / "videos" / "stream.jsonl")
    assert [line["frame"] for line in lines] == list(range(0, len(TIMES), 2))
    assert {line["file_name"] for line in lines} == {address}
    times = milliseconds(read(file))[::2]
    assert [round(1000 * line["time"]) for line in lines] == times
    assert milliseconds(read(tmp_path / "out" / "videos" / "stream.mp4")) == times
    detector: Any = square.detector
    assert set(detector.counts) == {1}


def test_a_server_that_breaks_off(video: bytes, square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    with serve(video) as server:
        assert predict(server.url("dead", "a.ts"), tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    folder = tmp_path / "out" / "videos"
    done = [record["frame"] for record in read_lines(folder / "stream.jsonl")]
    assert 5 < len(done) < len(TIMES)
    assert done == list(range(len(done)))
    assert "/dead/a.ts broke off at " in line
    assert line.endswith(f"s: Input/output error; {len(done)} frames before it are in {folder / 'stream.jsonl'}")
    assert len(read(folder / "stream.mp4")) == len(done)


def test_a_server_that_stops_sending(
    video: bytes, square: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(videos, "_TIMEOUTS", (0.5, 0.5))
    with serve(video) as server:
        start = time.monotonic()
        assert predict(server.url("stalled", "a.ts"), tmp_path / "out", "--no-draw") == 2
        assert time.monotonic() - start < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert "/stalled/a.ts " in line


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("missing", "Server returned 404 Not Found"), ("busy", "Server returned 5XX Server Error reply")],
)
def test_a_status_in_place_of_a_video(
    kind: str, reason: str, video: bytes, square: Predictor, tmp_path: Path, capsys: Capture
) -> None:
    with serve(video) as server:
        address = server.url(kind, "a.ts")
        assert predict(address, tmp_path / "out") == 2
    assert capsys.readouterr().err == f"error: {address} cannot be opened: {reason}\n"
    assert not (tmp_path / "out").exists(), "the same out= can be used again"


def test_a_redirect_to_a_local_file_is_not_followed(
    video: bytes, square: Predictor, tmp_path: Path, capsys: Capture
) -> None:
    with serve(video) as server:
        assert predict(server.url("astray", "a.ts"), tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot be opened: " in line


def test_an_rtsp_server_that_never_answers(
    square: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(videos, "_TIMEOUTS", (0.5, 0.5))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"rtsp://127.0.0.1:{silent.getsockname()[1]}/door"
        start = time.monotonic()
        assert predict(address, tmp_path / "out") == 2
        assert time.monotonic() - start < 10
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {address} cannot be opened: ")


def test_a_camera_that_does_not_exist(
    square: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    assert predict("97", tmp_path / "out") == 2
    assert capsys.readouterr().err == "error: there is no camera 97: /dev/video97 does not exist\n"
