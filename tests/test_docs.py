"""The modules' pages and drawings: snippets run, tables agree with the code, links lead somewhere, labels fit."""

import inspect
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from fusedet.models.detectors import create_model
from fusedet.models.modules import INTERACTIONS, PLUGINS
from fusedet.models.necks import NECKS
from fusedet.models.profiling import count_cost

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted((DOCS / "modules").glob("*.md"))
pytestmark = pytest.mark.usefixtures("copied_parts")
PARENT = {"levels", "channels", "finest", "coarsest", "top"}  # what the builder or model.pyramid gives
Row = list[str]


def tables(page: Path) -> Iterator[tuple[Row, list[Row]]]:
    """Head and rows of every table, as cells."""
    for block in re.findall(r"(?:^\|.*\n)+", page.read_text(), re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in block.splitlines()]
        yield head, rows


def snippets() -> list[Any]:
    """Every block of Python, by page and place."""
    return [
        pytest.param(code, id=f"{page.stem}-{i}")
        for page in PAGES
        for i, code in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
    ]


def counts() -> list[Any]:
    """Config, overrides and printed count of every row of the tables "`CONFIG` with | trainable"."""
    collected = []
    for page in PAGES:
        for head, rows in tables(page):
            if match := re.fullmatch(r"`(.+)` with", head[0]):
                name, *common = shlex.split(match[1])
                collected += [
                    (name, (*common, *shlex.split(row[0].strip("`"))), int(row[1].replace(",", ""))) for row in rows
                ]
    return [
        pytest.param(*row, id=" ".join([row[0], *row[1]]), marks=pytest.mark.slow if i % 2 else ())
        for i, row in enumerate(dict.fromkeys(collected))
    ]


@pytest.mark.parametrize("code", snippets())
def test_snippet_runs(code: str) -> None:
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


def make(name: str, *overrides: str) -> nn.Module:
    """A model without memory."""
    with torch.device("meta"):
        return create_model(name, *overrides, "model.backbone.pretrained=false")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_and_configs(page: Path, tmp_path: Path) -> None:
    """What is said to be trained can be made; `test_docs_commands.py` makes the models of the commands, all of them."""
    assert re.search(r"^\$ fusedet train .+$", page.read_text(), re.MULTILINE)
    assert "<!-- not executed" not in page.read_text()
    for code in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        file = tmp_path / "mine.yaml"
        file.write_text(code)
        make(str(file))


@pytest.mark.parametrize(("name", "overrides", "printed"), counts())
def test_printed_counts(name: str, overrides: tuple[str, ...], printed: int) -> None:
    model = make(name, *overrides)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == printed


def test_differences_are_those_of_the_counts() -> None:
    for page in PAGES:
        for head, rows in tables(page):
            if len(head) > 2 and head[2].startswith("more than"):
                first, *others = [[int(cell.replace(",", "") or 0) for cell in row[1:3]] for row in rows]
                assert all(count - first[0] == more for count, more in others), page.name


QUICK = (
    "model.neck={type: mse_fpn, v_groups: 32}",
    "model.neck={type: mse_fpn, sim: split, v_groups: 32}",
    "model.plugin={type: msfm, positions: [after_conv3], scales: [0.5, 0.7, 1], conv_num: 1, groups: 16}",
    "model.interact={type: msil, to_cls: false}",
)
"""Rows whose models are counted in less time than the others; each table has one of them."""


def multiply_adds() -> list[Any]:
    """Config, overrides of the first row, of another one, and what that one prints in the column "multiply-adds, G"."""
    collected = []
    for page in PAGES:
        for head, (first, *others) in tables(page):
            if "multiply-adds, G" in head:
                name, *common = shlex.split(head[0].split("`")[1])
                place, said = head.index("multiply-adds, G"), lambda row: (*common, *shlex.split(row[0].strip("`")))  # noqa: B023
                assert not first[place]
                quick = next(row for text in QUICK for row in others if text in row[0])
                collected += [
                    pytest.param(
                        name,
                        said(first),
                        said(row),
                        row[place],
                        id=" ".join([name, *said(row)]),
                        marks=() if row is quick else pytest.mark.slow,
                    )
                    for row in others
                ]
    assert len(collected) > 25
    return collected


@pytest.mark.parametrize(("name", "without", "overrides", "printed"), multiply_adds())
def test_printed_multiply_adds(
    name: str,
    without: tuple[str, ...],
    overrides: tuple[str, ...],
    printed: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the detector has more on an image of 800 x 1344 than that of the table's first row."""
    # without data only the sizes matter, and torch takes seconds to find those of bilinear maps
    monkeypatch.setattr(
        "fusedet.models.modules.msfm.resize", lambda x, size, align_corners: x.new_empty(*x.shape[:2], *size)
    )
    assert f"{(_multiply_adds(name, *overrides) - _multiply_adds(name, *without)) / 1e9:.2f}" == printed


_counted: dict[tuple[str, ...], int] = {}


def _multiply_adds(*config: str) -> int:
    if config not in _counted:
        _counted[config] = count_cost(make(*config), 800, 1344)["multiply_adds"]
    return _counted[config]


def options(make: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of a part's options, as YAML has them."""
    has = (
        vars(make())
        if is_dataclass(make)
        else {k: p.default for k, p in inspect.signature(make).parameters.items() if k not in PARENT}
    )
    return {k: list(v) if isinstance(v, tuple) else v for k, v in has.items()}


@pytest.mark.parametrize("name", ["mse_fpn", "smsl", "msil", "msfm"])
def test_options_and_defaults(name: str) -> None:
    rows = next(rows for head, rows in tables(DOCS / "modules" / f"{name}.md") if head[0] == "option")
    said = {row[0].strip("`"): yaml.safe_load(row[1].strip("`")) for row in rows}
    assert said == options((NECKS | INTERACTIONS | PLUGINS)[name])


def test_other_necks() -> None:
    """Every neck is in the index, and those that are not a module of the papers with their options and defaults."""
    rows = next(rows for head, rows in tables(DOCS / "modules" / "README.md") if head[0] == "`model.neck`")
    said: dict[str, dict[str, Any]] = {}
    for row in rows:
        kind = next(k for k in sorted(NECKS, key=len, reverse=True) if k in row[0].replace("[fpn,", ""))
        said.setdefault(kind, {}).update({k: yaml.safe_load(v) for k, v in re.findall(r"`(\w+)` \(`([^`]+)`", row[2])})
    assert set(said) | {"mse_fpn", "smsl"} == set(NECKS)
    for kind, collected in said.items():
        assert collected == options(NECKS[kind]), kind


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert targets
    assert not [t for t in targets if not (page.parent / t).exists()]


def test_drawings() -> None:
    """Every page has its drawing; a text lies inside its box and in the image, and no two texts meet."""
    code = runpy.run_path(str(DOCS / "drawings.py"))
    sections = yaml.safe_load(code["DATA"].read_text())
    assert set(sections) | {"README"} == {page.stem for page in PAGES}
    for name, entries in sections.items():
        assert f"../images/{name}.png" in (DOCS / "modules" / f"{name}.md").read_text()
        drawing = code["read_drawing"](entries)
        figure = code["draw_figure"](drawing)
        ax = figure.axes[0]
        collected = [(t, t.get_window_extent().transformed(ax.transData.inverted())) for t in ax.texts if t.get_text()]
        for b in drawing.boxes:
            if b.text and b.kind in code["KINDS"]:
                (text,) = [e for t, e in collected if t.get_position() == (b.x, b.y) and t.get_text() == b.text]
                inside = b.x - b.w / 2 <= text.x0 and text.x1 <= b.x + b.w / 2 and abs(text.height) <= b.h
                assert inside, f"{name}: the text of {b.name} leaves its box"
        for i, (text, here) in enumerate(collected):
            seen = (
                here.x0 >= 0
                and here.x1 <= code["WIDTH"]
                and min(here.y0, here.y1) >= 0
                and max(here.y0, here.y1) <= drawing.height
            )
            assert seen, f"{name}: '{text.get_text()}' leaves the image"
            met = [other.get_text() for other, there in collected[i + 1 :] if here.overlaps(there)]
            assert not met, f"{name}: '{text.get_text()}' meets {met}"
