"""Every command block of the README and the documentation runs.

A block fenced as `console` is executed line by line, with a small dataset, run and output directory in place of the
documented ones. A block after the comment `<!-- not executed: REASON -->` is not, because it needs minutes, a GPU or
several machines. A summary of a command's arguments is fenced as `text`.
"""

import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fusedet import cli, config, create_model, resolve_config
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered", "copied_parts")

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not executed: .+? -->\n+)?^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
DATASETS = ("PATH", "../shared/data/bccd")
TRAINED_HERE = "retinanet_r18_small"  # other models of `train` are built, not trained: their training takes minutes


def list_commands() -> list[Any]:
    """Every documented command, by page and place."""
    return [
        pytest.param(line.removeprefix("$ "), output, id=f"{page.relative_to(ROOT)}-{block}-{i}")
        for page in PAGES
        for block, match in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")))
        if not match[1]
        for i, (line, output) in enumerate(pairwise([*re.sub(r"\\\n\s*", "", match[2]).splitlines(), ""]))
        if line.startswith("$ ")
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_fenced(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"^ {4}(?:\$ )?(?:fusedet|torchrun|python|pip|make) .*", text, re.MULTILINE) == []


@pytest.mark.parametrize(("command", "output"), list_commands())
def test_command(
    command: str,
    output: str,
    scenes: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    program, *arguments = shlex.split(command, comments=True)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program.endswith("python"):
        assert all((ROOT / argument).exists() for argument in arguments if argument.endswith(".py"))
    elif output.startswith("error:"):
        assert cli.run([argument.replace("PATH", str(scenes)) for argument in arguments]) == 2
        assert capsys.readouterr().err.startswith(output.partition(" Known:")[0])
    else:
        assert program == "fusedet", "this block needs a comment that says why it is not executed"
        assert run(arguments, scenes, trained, tmp_path) == 0


_executed: set[tuple[str, ...]] = set()
"""The calls that ended without an error. Another page's equal call needs no second execution."""


def normalize(arguments: list[str]) -> tuple[str, ...]:
    """A call without its seed, the names of its run directories, and what `SMALL` overrides in a training."""
    overridden = [argument.partition("=")[0] for argument in SMALL] if arguments[:2] == ["train", TRAINED_HERE] else []
    arguments = [re.sub(r"^(out=|)runs/\w+$", r"\1runs/RUN", argument) for argument in arguments]
    return tuple(argument for argument in arguments if argument.partition("=")[0] not in ("train.seed", *overridden))


def run(arguments: list[str], data: Path, trained: Path, folder: Path) -> int:
    """Execute a documented call of fusedet on small data; its exit code."""
    command, *arguments = arguments
    for argument in arguments:
        if argument.startswith("runs/"):
            shutil.copytree(trained, folder / argument, dirs_exist_ok=True)
    images = str(data / "val")
    arguments = [
        images if argument in ("IMAGES", "IMAGE") or argument.endswith("/JPEGImages") else argument
        for argument in arguments
    ]
    arguments = [f"data={data}" if argument.partition("=")[2] in DATASETS else argument for argument in arguments]
    arguments = [
        argument for argument in arguments if not argument.startswith(("data.val=", "--split"))
    ]  # the dataset has train and val
    for i, argument in enumerate(arguments):
        if argument.startswith("test.scales="):
            resolve_config(trained, [argument])  # the documented sizes are valid, but take ten seconds
            arguments[i] = "test.scales=[32,48,64]"
    if command == "train" and arguments[0] in config.names():
        resolve_config(arguments[0], [argument for argument in arguments[1:] if "=" in argument])
    call = normalize([command, *arguments])
    if call in _executed:
        return 0
    code = execute(command, arguments)
    if code == 0:
        _executed.add(call)
    return code


def execute(command: str, arguments: list[str]) -> int:
    """Make the model of a training, or run the call; its exit code."""
    if command == "train" and "--resume" not in arguments and arguments[0] != TRAINED_HERE:
        overrides = [w for w in arguments[1:] if not w.startswith(("data=", "out="))]
        with torch.device("meta"):
            create_model(arguments[0], *overrides, "model.backbone.pretrained=false")
        return 0
    if command == "train" and "--resume" not in arguments:
        arguments += SMALL
    return cli.run([command, *arguments])


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_first_python_block(
    page: str, scenes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    match = re.search(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert match
    code = match[1].replace('"retinanet_r50", ', f'"retinanet_tiny", *{SMALL!r}, ').replace("data/coco", str(scenes))
    if "train(" not in code:
        shutil.copytree(trained, tmp_path / "runs" / "a")
    first = next((scenes / "val").glob("*.jpg"))
    for name in ("image.jpg", "street.jpg", "images/street.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(first, tmp_path / name)
    exec(compile(code, page, "exec"), {"__name__": "snippet"})
