"""Downloads from a server on the loopback address: whole or not at all, continued after a break, checked by hash."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from file_server import FileServer, serve
from fusedet.api import download as downloads
from fusedet.api.download import DownloadError, download
from fusedet.errors import InputError, StorageError

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(CONTENT) as running:
        yield running


def fetch(server: FileServer, kind: str, folder: Path) -> list[str | None]:
    """Fetch the file; return the ranges that were asked for."""
    target = folder / "file.pth"
    download(server.url(kind), target, server.sha256)
    assert target.read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["file.pth"]
    return [asked for _, asked in server.requests]


@pytest.mark.parametrize("kind", ["whole", "slow"])
def test_whole(server: FileServer, tmp_path: Path, kind: str) -> None:
    assert fetch(server, kind, tmp_path) == [None]


def test_redirected(server: FileServer, tmp_path: Path) -> None:
    fetch(server, "moved", tmp_path)
    assert [kind for kind, _ in server.requests] == ["moved", "whole"]


def test_broken_off(server: FileServer, tmp_path: Path) -> None:
    assert fetch(server, "broken", tmp_path) == [None, f"bytes={len(CONTENT) // 2}-"]


def test_stalled(server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    assert fetch(server, "stalled", tmp_path) == [None, f"bytes={len(CONTENT) // 2}-"]


def test_a_server_without_ranges(server: FileServer, tmp_path: Path) -> None:
    """The second answer is the whole file and replaces the part."""
    assert len(fetch(server, "deaf", tmp_path)) == 2


def test_broken_off_for_good(server: FileServer, tmp_path: Path) -> None:
    half = len(CONTENT) // 2
    with pytest.raises(DownloadError, match=rf"broke after {half} of {len(CONTENT)} bytes"):
        download(server.url("dead"), tmp_path / "file.pth", server.sha256)
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth.part"]
    assert fetch(server, "whole", tmp_path)[-1] == f"bytes={half}-"


def test_killed_before_the_file_had_its_name(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file.pth.part").write_bytes(CONTENT)
    assert fetch(server, "whole", tmp_path) == [f"bytes={len(CONTENT)}-"]


def test_a_part_of_another_file(server: FileServer, tmp_path: Path) -> None:
    (tmp_path / "file.pth.part").write_bytes(b"another" * 100)
    assert fetch(server, "whole", tmp_path) == ["bytes=700-", None]


def test_wrong_hash(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not the published file: its SHA-256 does not begin with 00000000"):
        download(server.url("whole"), tmp_path / "file.pth", "00000000")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("missing", "answers 404 Not Found"), ("busy", "answers 503"), ("astray", "answers 302 .*not allowed")],
)
def test_refused(server: FileServer, tmp_path: Path, kind: str, reason: str) -> None:
    with pytest.raises(DownloadError, match=reason):
        download(server.url(kind), tmp_path / "file.pth", server.sha256)
    assert not list(tmp_path.iterdir())
    assert len(server.requests) == 1


def test_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(b"") as gone:
        pass
    with pytest.raises(DownloadError, match="refused"):
        download(gone.url("whole"), tmp_path / "file.pth", "00000000")


@pytest.mark.parametrize("address", ["http://[::1/file.pth", "http://a b/file.pth", "http://127.0.0.1:port/file.pth"])
def test_malformed_address(address: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError):
        download(address, tmp_path / "file.pth", "00000000")


def test_a_file_that_cannot_be_written(server: FileServer, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"file\.pth\.part cannot be written: No such file or directory"):
        download(server.url("whole"), tmp_path / "absent" / "file.pth", server.sha256)
