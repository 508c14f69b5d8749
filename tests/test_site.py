"""The documentation site builds without warnings, and its links lead somewhere."""

import os
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import fusedet
from fusedet.config import Config

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """Links, image sources and ids of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.targets += [values[key] or "" for key in ("href", "src") if key in values]
        self.ids |= {values[key] or "" for key in ("id", "name") if key in values}


@pytest.fixture(scope="module")
def site(make_once: Callable[..., Path]) -> Path:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package)
    return make_once("site", build_site)


def build_site(out: Path) -> None:
    """Build the site as `make docs` does; every warning is an error."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-c", "docs", ".", str(out)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}  # those of Sphinx remain, old torch's about itself do not
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_links(site: Path) -> None:
    """Every link within the site names a file of it, and an anchor of that file."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 35
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            file = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].ids):
                broken.append(f"{path.relative_to(site)}: {target}")
    assert not broken


def test_nothing_is_fetched(site: Path) -> None:
    """A reader without network sees every page whole: no script, style or image of another host."""
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert 'src="http' not in text, path
        assert '<link rel="stylesheet" href="http' not in text, path


def test_reference_is_complete(site: Path) -> None:
    """Every public name, command, section of the config and published weights is in the reference."""
    python = Page((site / "docs/reference/python.html").read_text(encoding="utf-8"))
    assert {f"fusedet.{name}" for name in fusedet.__all__ if name != "__version__"} <= python.ids
    commands = Page((site / "docs/reference/commands.html").read_text(encoding="utf-8"))
    assert {"train", "val", "predict", "convert-weights", "weights"} <= commands.ids
    config = (site / "docs/config.html").read_text(encoding="utf-8")
    assert all(f"{section}." in config for section in Config.model_fields if section not in ("device", "out"))
    zoo = (site / "docs/reference/model_zoo.html").read_text(encoding="utf-8")
    assert not [w.name for w in fusedet.list_weights().weights if w.name not in zoo]


def test_search_works_offline(site: Path) -> None:
    assert (site / "searchindex.js").is_file()
    assert "docs/modules/smsl" in (site / "searchindex.js").read_text(encoding="utf-8")
