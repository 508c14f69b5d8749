"""What the commands name as the next step: the way from a training to a file that runs without fusedet."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from exporting import ONE_LEVEL, save_run
from fusedet import cli
from fusedet.cli.common import list_steps_after, name_program

pytestmark = pytest.mark.usefixtures("unrendered")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    """The commands that a command line names at its end, as arguments without their comments."""
    capsys.readouterr()
    code = cli.run([*arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    lines = said.out.splitlines()
    firsts = [i for i, line in enumerate(lines) if line.startswith("next: ")]
    assert len(firsts) <= 1
    steps = [line[6:] for line in lines[firsts[0] :]] if firsts else []
    return [shlex.split(step, comments=True) for step in steps]


@pytest.mark.parametrize(("step", "names"), [("train", "val predict export"), ("val", "predict export")])
def test_names_all_later_steps(step: str, names: str) -> None:
    assert [line.split()[1] for line in list_steps_after(step, "runs/a")] == names.split()


def test_comments_are_aligned() -> None:
    assert list_steps_after("train", "runs/a", "a.jpg") == [
        "fusedet val runs/a --open     # where it fails, as a page",
        "fusedet predict runs/a a.jpg  # boxes as JSON and drawn copies",
        "fusedet export runs/a         # files that run without fusedet",
    ]


def test_words_are_quoted_and_trust_is_repeated() -> None:
    (line,) = list_steps_after("predict", "runs/of mine", trust=True)
    assert shlex.split(line, comments=True) == ["fusedet", "export", "runs/of mine", "--trust"]


def test_the_program_is_named_as_it_was_started(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "my env" / "fusedet"
    started.parent.mkdir()
    started.touch(0o755)
    monkeypatch.setattr(sys, "argv", [str(started)])
    named = "Write fusedet train CONFIG data=PATH"
    for path, program in ((tmp_path, f"'{started}'"), (started.parent, "fusedet")):
        monkeypatch.setenv("PATH", str(path))
        assert cli.run(["train"]) == 2
        assert named.replace("fusedet", program) in capsys.readouterr().err
        assert name_program("to go on: fusedet train a --resume") == f"to go on: {program} train a --resume"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert name_program("files of fusedet; /bin/fusedet val a") == "files of fusedet; /bin/fusedet val a"
    monkeypatch.setattr(sys, "argv", ["my_script.py"])
    assert name_program("fusedet val a") == "fusedet val a"


def test_an_exported_model_is_not_exported_again(tmp_path: Path) -> None:
    (tmp_path / "model.json").touch()
    assert [line.split()[1] for line in list_steps_after("val", tmp_path)] == ["predict"]
    assert list_steps_after("predict", tmp_path) == []


@pytest.mark.slow
def test_the_whole_way(
    capsys: pytest.CaptureFixture[str], scenes: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From train to the boxes of the example script, each command as the one before prints it."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    image, made = str(next((scenes / "val").glob("*.jpg"))), tmp_path / "a run"
    val, predict, export = run(capsys, "train", str(trained), f"out={made}")
    assert run(capsys, *val[1:]) == [predict, export]
    assert opened[0].endswith("report.html")
    assert run(capsys, "val", str(made / "val.bbox.json"), f"data={scenes}") == []
    assert run(capsys, *predict[1:-1], image, "--no-draw") == [export]
    # random weights of another model decide between candidates, which those of a training of seconds do not
    shutil.rmtree(made)
    save_run(made, "retinanet", *ONE_LEVEL, data=scenes)
    ((_, *example, _),) = run(capsys, *export[1:])
    done = subprocess.run([sys.executable, *example, image, "0.01"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
