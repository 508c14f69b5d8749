"""The page of an ablation in a browser: no network requests, no errors, and the whole table is on it."""

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fusedet.ablation import render, report


@contextmanager
def open_page(browser: Any, file: Path, **options: Any) -> Iterator[tuple[Any, list[str], list[str]]]:
    """Show a page; give its window, what it wrote to the console and the addresses that it requested."""
    messages: list[str] = []
    requests: list[str] = []
    window = browser.new_page(**options)
    window.on("console", lambda message: messages.append(message.text))
    window.on("pageerror", lambda error: messages.append(str(error)))
    window.on("request", lambda request: requests.append(request.url))
    window.goto(file.as_uri())
    assert requests.pop(0) == file.as_uri()
    yield window, messages, requests
    window.close()


class Cells(HTMLParser):
    """The text of every cell and heading, the number of plots, and the targets of links, which browsers load ahead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.links: list[str | None] = []
        self.images = 0
        self.open = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += tag == "svg"
        if tag == "link":
            self.links.append(dict(attrs).get("href"))
        if tag in ("td", "th", "h1", "h2"):
            self.open = True
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.open = self.open and tag not in ("td", "th", "h1", "h2")

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[-1] += data


def make_summary(folder: Path) -> dict[str, Any]:
    """Three rows of two seeds and a cited row, with names that HTML must escape."""
    classes = ["<script>alert(1)</script>", "cell & nucleus", "Zähler"]
    rows: list[dict[str, Any]] = []
    for i, label in enumerate(["FPN", "FPN + <SMSL>", "MSE-FPN | long label that has to be broken somewhere"]):
        measured = {
            name: {"mean": 30.0 + i, "low": 29.0 + i, "high": 31.0 + i, "values": [29.5 + i, 30.5 + i]}
            for name in ("AP", "AP50", "APs", "APm")
        }
        change = {"value": 1.0 * i, "over_images": [0.5 * i, 1.5 * i], "over_seeds": [-1.0, 3.0]} if i else None
        runs = []
        for seed in (0, 1):
            run = folder / f"row{i}" / f"seed{seed}"
            run.mkdir(parents=True)
            (run / "metrics.csv").write_text(f"epoch,step,AP\n1,4,\n1,4,0.{i}1\n2,8,0.{i}{seed + 3}\n")
            about = {
                "state": "finished",
                "folder": str(run),
                "metrics": {"AP": 1.0},
                "seconds": 61.0,
                "device": "cpu",
                "reason": None,
            }
            runs.append(about | {"seed": seed, "versions": {"torch": "2.6"}})
        cost = {"parameters": 10**7, "trainable": 9 * 10**6, "multiply_adds": 10**10 * (1 + i), "image": [64, 96]}
        cost |= {
            "prediction": {"p50_ms": 9.0 + i, "p95_ms": 12.0, "images": 8, "peak_MiB": 55.5, "device": "cpu"},
            "training": None,
        }
        rows.append(
            {
                "label": label,
                "cited": False,
                "published": {"AP": 35.5 + i},
                "params_M": 37.74,
                "time_ms": None,
                "split": "val",
                "note": None,
                "published_difference": {"AP": 1.0 * i} if i else {},
                "reference": "FPN",
                "weights_of": None,
            }
            | {"base": "x", "overrides": [], "same_as": None, "runs": runs, "measured": measured, "cost": cost}
            | {"difference": dict.fromkeys(measured, change) if change else None, "conclusion": f"conclusion {i}"}
            | {
                "classes": [{"name": name, "value": 1.0, "over_images": [0.5, 1.5]} for name in classes]
                if change
                else None
            }
        )
    rows.append(
        {
            "label": "theirs",
            "cited": True,
            "published": {"AP": 41.0},
            "params_M": None,
            "time_ms": None,
            "split": None,
            "note": "n",
        }
        | {"published_difference": {}}
    )
    split = {"source": "data & more", "images": 8, "instances": 24, "fingerprint": "17a5b5b7ccea1f3f"}
    head = {
        "table": "mine",
        "title": "Necks <of> mine",
        "paper": "A paper",
        "note": None,
        "baseline": "FPN",
        "seeds": 2,
        "overrides": [],
    }
    head |= {"metric": "AP", "resampled": True, "best_weights": False, "size_bins": []}
    return head | {
        "commands": [["fusedet", "ablate", "mine", "data=a b"]],
        "data": {"train": split, "val": split, "classes": classes},
        "unit": "percent",
        "resamples": 1000,
        "level": 0.95,
        "rows": rows,
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of a summary, and the summary. Neither is to be changed."""
    folder = tmp_path_factory.mktemp("page")
    summary = make_summary(folder / "runs")
    (folder / "out").mkdir()
    return report.write_ablation_report(summary, folder / "out")["page"], summary


def test_page_in_a_browser(browser: Any, page: tuple[Path, dict[str, Any]]) -> None:
    file, summary = page
    with open_page(browser, file) as (window, messages, requests):
        dom = window.content()
    assert messages == []
    assert requests == []
    seen = Cells(dom)
    assert seen.links == ["data:,"]  # the icon, which is in the page
    for sheet in render.make_sheets(summary):
        assert sheet.title in seen.texts
        for cells in [sheet.head, *sheet.rows]:
            assert any(seen.texts[i : i + len(cells)] == cells for i in range(len(seen.texts))), cells
    assert {"Necks <of> mine", "FPN + <SMSL>", "conclusion 2", "mine"} <= set(seen.texts)
    assert seen.images == 3 + 2  # and a plot by class for each row except the baseline
    assert "<script" not in dom


def test_requests_and_messages_are_detected(browser: Any, tmp_path: Path) -> None:
    """Otherwise the test above could not fail."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/a.png"><script>console.error("oh no")</script>')
    with open_page(browser, page) as (_, messages, requests):
        assert "oh no" in messages
        assert requests == ["http://127.0.0.1:9/a.png"]


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_light_and_dark(browser: Any, page: tuple[Path, dict[str, Any]], scheme: str, dark: bool) -> None:
    """The page follows the reader's color scheme, and text and plots contrast with its background."""
    with open_page(browser, page[0], color_scheme=scheme, viewport={"width": 1200, "height": 2600}) as (window, *_):
        gray = Image.open(io.BytesIO(window.screenshot())).convert("L")
    assert (gray.getpixel((3, 3)) < 60) is dark
    histogram = gray.histogram()
    bright, deep = sum(histogram[200:]), sum(histogram[:60])
    assert (deep > 10 * bright) is dark
    assert min(bright, deep) > 5000  # the page is not empty


def test_page_fits_a_narrow_window(browser: Any, page: tuple[Path, dict[str, Any]]) -> None:
    """Wide tables and plots scroll, the page itself does not."""
    with open_page(browser, page[0], viewport={"width": 600, "height": 900}) as (window, *_):
        assert window.evaluate("document.documentElement.scrollWidth") <= window.evaluate("innerWidth") == 600


def test_text_in_plots_follows_the_page(page: tuple[Path, dict[str, Any]]) -> None:
    """Text without a color would be black on the dark page."""
    texts = re.findall(r"<!-- (.*?) -->\s*<g([^>]*)>", page[0].read_text())
    assert {"multiply-adds (G)", "epoch", "AP", "FPN"} <= {text for text, _ in texts}
    assert [text for text, style in texts if "fill: " not in style] == []


def test_missing_measurements_are_marked(page: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Without any run the page has no plots and no measured values."""
    summary = json.loads(json.dumps(page[1]))
    for row in summary["rows"][:3]:
        row |= {
            "measured": None,
            "difference": None,
            "classes": None,
            "runs": [],
            "conclusion": "Not measured: no conclusion.",
        }
        row["cost"] |= {"prediction": None}
    shutil.copytree(page[0].parent, tmp_path / "out")
    assert list((tmp_path / "out" / "plots").glob("*.svg"))
    text = report.write_ablation_report(summary, tmp_path / "out")["page"].read_text()
    assert "<svg" not in text
    assert [cells[2] for cells in render.make_difference_sheet(summary).rows] == ["not measured"] * 3 + ["cited"]
    assert render.make_cost_sheet(summary).rows[0][5:] == ["not measured"] * 4
    assert not list((tmp_path / "out" / "plots").glob("*.svg"))


def test_a_cited_baseline_is_not_named_none(tmp_path: Path) -> None:
    summary = make_summary(tmp_path)
    for row in summary["rows"][:3]:
        row |= {"reference": None, "difference": None}
    sheet = render.make_difference_sheet(summary)
    assert "AP - reference" in sheet.head
    assert "None" not in " ".join(sheet.head)
