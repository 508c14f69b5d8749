"""The page for users of other libraries: fusedet's side of its tables is what the config and the commands take."""

import re
from pathlib import Path

import pytest
from typer.main import get_command

from fusedet import config
from fusedet.cli import app
from fusedet.interop.mmdetection.python_config import parse_config

PAGE = (Path(__file__).resolve().parents[1] / "docs/other_libraries.md").read_text(encoding="utf-8")


def list_first_cells(section: str, column: int = 1) -> list[str]:
    """Cells of a column of the section's table, without its head."""
    text = PAGE.split(f"## {section}\n")[1].split("\n## ")[0]
    return [line.split(" | ")[column - 1].strip("| ") for line in re.findall(r"^\|.*", text, re.MULTILINE)[2:]]


@pytest.mark.parametrize("cell", list_first_cells("Settings"))
def test_settings(cell: str) -> None:
    texts = re.findall(r"`([\w.]+=[^`]+)`", cell)
    assert texts
    config.load("retinanet_r50", texts)


@pytest.mark.parametrize("cell", list_first_cells("Commands", column=2))
def test_commands(cell: str) -> None:
    arguments = cell.strip("`").split()
    assert arguments[0] == "torchrun" or arguments[1] in get_command(app).commands  # type: ignore[attr-defined]


def test_configs_say_the_same(tmp_path: Path) -> None:
    """The YAML loads, and MMDetection's Python has the same neck, epochs and milestones."""
    yaml, python = (re.search(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for kind in ("yaml", "python"))
    assert yaml
    assert python
    file = tmp_path / "mine.yaml"
    file.write_text(yaml[1])
    ours = config.load(str(file))
    theirs = parse_config(python[1], "page").tree
    steps = theirs["param_scheduler"][1]
    assert ours.model.neck == {"type": theirs["model"]["neck"]["type"].lower()}
    assert ours.train.epochs == theirs["train_cfg"]["max_epochs"] == steps["end"]
    assert list(ours.train.milestones) == steps["milestones"]
