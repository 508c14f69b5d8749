"""Predictions in parts: sources found lazily, parts whole or not at all, gone on with, shared out, and what cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fusedet import cli, config
from fusedet.api import batch_predict
from fusedet.api.image_sources import Sources
from fusedet.api.predict import Predictor, load
from fusedet.engine import checkpoint
from fusedet.errors import InputError
from fusedet.models.detectors import build_detector

OPTIONS = [
    "model.backbone.name=regnetx_002",
    "model.pyramid.channels=16",
    "model.head.convs=1",
    "model.head.norm=false",
    "data.size=[32,48]",
    "test.score=0.001",
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights as a checkpoint: what is found does not matter, that it is the same does."""
    torch.manual_seed(0)
    options = config.load("retinanet_tiny", [*OPTIONS, "test.max_det=5"])
    file = tmp_path_factory.mktemp("model") / "best.safetensors"
    meta = {"config": options.to_yaml(), "names": '["dog", "cat"]', "category_ids": "[3, 7]"}
    checkpoint.save_weights(file, build_detector(options, 2).state_dict(), meta)
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten images in folders, one of them with a name of another one's."""
    names = [
        "a/1.png",
        "a/2.png",
        "a.png",
        "b/1.png",
        "b/c/x.PNG",
        "b/c/y.png",
        "b/d.png",
        "z/1 2.png",
        "z/ü.png",
        "z.png",
    ]
    for i, name in enumerate(names):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (20 * i, 255 - 20 * i, 7 * i)).save(file, format="PNG")
    (tmp_path / "images" / "b" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def predict(model: Path, *words: object, **env: str) -> int:
    return cli.run(["predict", str(model), *map(str, words), "--no-draw", "device=cpu", "data.workers=0"])


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


# -- sources


def test_sources_come_in_the_order_of_their_paths_each_once(folder: Path, tmp_path: Path) -> None:
    everything = sorted(p for p in folder.rglob("*") if p.suffix.lower() == ".png" and p.is_file())
    assert list(Sources([str(folder)])) == everything
    assert Sources([str(folder)]).count() == len(everything) == 10
    for pattern in ("*.png", "**/*.png", "b/**/*.png", "*/1*.png", "b/?/y.png", "**/c/*", "[ab]/1.png"):
        expected = sorted(p for p in folder.glob(pattern) if p.is_file())
        assert expected
        assert list(Sources([f"{folder}/{pattern}"])) == expected, pattern
    twice = [str(folder / "b" / "d.png"), f"{folder}/*/1.png", str(folder), f"{folder}/**/*.png"]
    found = list(Sources(twice))
    assert sorted(found) == everything
    assert found[0] == folder / "b" / "d.png"
    (tmp_path / "list.txt").write_text(
        f"\ufeff{folder}/z.png\r\n\n{folder}/missing.png\n{folder}/b/c\n{folder}/z.png\n", encoding="utf-8"
    )
    listed = ["z.png", "missing.png", "b/c/x.PNG", "b/c/y.png", "z.png"]
    assert list(Sources([f"@{tmp_path}/list.txt"])) == [folder / name for name in listed]


def test_a_source_is_no_more_read_than_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(
        "fusedet.api.image_sources.os.scandir", lambda path: (seen.append(Path(path).name), scan(path))[1]
    )
    walk = iter(Sources([str(folder)]))
    seen.clear()
    assert [next(walk).name, next(walk).name, next(walk).name] == ["1.png", "2.png", "a.png"]
    assert seen == ["images", "a"], "b and z are walked when they come"


@pytest.mark.parametrize("word", ["@nowhere.txt", "nowhere.png", "*.xyz"])
def test_sources_that_are_none(word: str) -> None:
    with pytest.raises(
        InputError, match=r"there is no list nowhere.txt|there is no image, folder or pattern|holds no image"
    ):
        Sources([word])


# -- parts


@pytest.fixture
def whole(model: Path, folder: Path, tmp_path: Path) -> dict[str, Any]:
    """What one part with all images gives."""
    assert predict(model, folder, f"out={tmp_path / 'whole'}") == 0
    found = read(tmp_path / "whole" / "predictions.json")
    assert list(found) == ["images", "categories", "annotations"]
    assert [image["id"] for image in found["images"]] == list(range(1, 11))
    assert [one["id"] for one in found["annotations"]] == list(range(1, len(found["annotations"]) + 1))
    assert len(found["annotations"]) == 50
    assert not (tmp_path / "whole" / "parts").exists()
    return found


def test_parts_joined_are_the_whole_and_parts_left_alone_too(
    model: Path, folder: Path, tmp_path: Path, whole: dict[str, Any], capsys: Capture
) -> None:
    assert predict(model, folder, f"out={tmp_path / 'joined'}", "--part", 3) == 0
    assert read(tmp_path / "joined" / "predictions.json") == whole
    capsys.readouterr()
    assert predict(model, folder, f"out={tmp_path / 'parts'}", "--part", 3, "--parts", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    index = read(tmp_path / "parts" / "index.json")
    assert (
        (said["images"], said["detections"], said["skipped"])
        == (10, 50, 0)
        == tuple(index[k] for k in ("images", "detections", "skipped"))
    )
    assert [(part["file"], part["first"], part["images"]) for part in index["parts"]] == [
        (f"parts/part-0000{i}.json", 3 * i + 1, 3 if i < 3 else 1) for i in range(4)
    ]
    contents = [read(tmp_path / "parts" / part["file"]) for part in index["parts"]]
    assert [image for content in contents for image in content["images"]] == whole["images"]
    strip = lambda items: [{k: v for k, v in one.items() if k != "id"} for one in items]  # noqa: E731
    assert strip(one for content in contents for one in content["annotations"]) == strip(whole["annotations"])
    assert not (tmp_path / "parts" / "predictions.json").exists()


def test_what_is_stopped_goes_on_and_finished_parts_are_not_predicted_again(
    model: Path, folder: Path, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out, seen, together = tmp_path / "stopped", [], Predictor.together

    def dies(self: Predictor, group: Any) -> Any:
        seen.extend(path for _, path in group)
        if len(seen) > 7:
            os._exit(9)
        return together(self, group)

    words = [folder, f"out={out}", "--part", 3, "--resume"]
    if not (child := os.fork()):  # a process that is killed in the middle of the third part
        monkeypatch.setattr(Predictor, "together", dies)
        predict(model, *words)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert sorted(file.name for file in (out / "parts").iterdir()) == ["part-00000.json", "part-00001.json"]
    assert not (out / "predictions.json").exists()
    monkeypatch.setattr(
        Predictor, "together", lambda self, group: (seen.extend(path for _, path in group), together(self, group))[1]
    )
    assert predict(model, *words[:-1]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    for other, key in ((["--part", 4], "part"), (["test.max_det=4"], "options"), (["test.batch=2"], "options")):
        assert predict(model, *words, *other) == 2
        assert f"was begun with {key}" in capsys.readouterr().err
    (folder / "a" / "1.png").rename(folder / "a" / "0.png")
    assert predict(model, *words) == 2
    assert "of other images than the sources stand for now" in capsys.readouterr().err
    (folder / "a" / "0.png").rename(folder / "a" / "1.png")
    assert not seen, "nothing was predicted meanwhile"
    assert predict(model, *words) == 0
    assert seen == list(Sources([str(folder)]))[6:]
    assert read(out / "predictions.json") == whole
    seen.clear()
    assert predict(model, *words) == 0
    assert not seen
    assert "10 images, 50 detections" in capsys.readouterr().out
    file = out / "predict.json"
    good = read(file)
    for bad in (
        "",
        "[",
        "[]",
        "1",
        "{}",
        '{"asked": []}',
        '{"asked": {"part": "3"}}',
        '{"asked": {"part": 0}}',
        f"{'[' * 100_000}",
    ):
        file.write_text(bad)
        refused(model, words, f"{file} is damaged", capsys)
    for done in ([], {}, {**good["done"], "shown": "x"}, {**good["done"], "files": None}):
        file.write_text(json.dumps({**good, "done": done}))
        refused(model, words, f"{file} is damaged", capsys)


def refused(model: Path, words: list[Any], text: str, capsys: Capture) -> None:
    assert predict(model, *words) == 2
    said = capsys.readouterr().err
    assert text in said.replace("\n", " ") or text in said.replace("\n", "")
    assert "Traceback" not in said


def test_a_image_that_cannot_be_read_ends_it_or_is_counted_and_listed(
    model: Path, folder: Path, tmp_path: Path, whole: dict[str, Any], capsys: Capture
) -> None:
    bad = list(Sources([str(folder)]))[4]
    bad.write_bytes(b"no image")
    words = [folder, f"out={tmp_path / 'bad'}", "--part", 3]
    assert predict(model, *words) == 2
    said = capsys.readouterr().err
    assert str(bad) in said
    assert "--on-bad-image skip" in said
    assert [image["id"] for image in read(tmp_path / "bad" / "predictions.json")["images"]] == [1, 2, 3, 4]
    assert predict(model, *words, "--resume", "--on-bad-image", "skip", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["images"], said["skipped"]) == (9, 1)
    found = read(tmp_path / "bad" / "predictions.json")
    assert found["images"] == [image for image in whole["images"] if image["id"] != 5]
    assert [(one["id"], one["file_name"]) for one in found["skipped"]] == [(5, str(bad))]
    assert str(bad) in found["skipped"][0]["reason"]


def test_processes_share_the_images_each_once(model: Path, folder: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    words = [
        "predict",
        str(model),
        str(folder),
        f"out={tmp_path / 'shared'}",
        "--no-draw",
        "device=cpu",
        "--part",
        "4",
        "data.workers=0",
    ]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fusedet.cli",
    ]
    done = subprocess.run(
        [*launch, *words], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert read(tmp_path / "shared" / "predictions.json") == whole
    assert done.stdout.count("10 images, 50 detections") >= 1


def test_each_process_says_what_it_cannot_read(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Of a prediction; what stops a training the processes tell each other, and one on each machine says it."""
    bad = list(Sources([str(folder)]))[7]
    bad.write_bytes(b"no image")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, code in (("0", 0), ("1", 2)):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        assert predict(model, folder, f"out={tmp_path / 'shared'}", "--part", 5) == code
    said = capsys.readouterr().err
    assert said.startswith(f"error: process 1: {bad} is empty or not an image")
    assert said.count("\n") == 1
    assert cli.run(["train"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.run(["train"]) == 2
    assert capsys.readouterr().err.startswith("error: process 1: which config?")
    monkeypatch.setenv("RANK", "x")
    assert predict(model, folder) == 2
    assert capsys.readouterr().err.startswith("error: RANK=x")


def test_what_is_joined_is_on_the_disk_before_its_parts_are_gone(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut takes back what was not synchronised, but not the removal of the parts."""
    held: dict[str, int] = {}
    sync, remove = os.fsync, batch_predict.shutil.rmtree

    def noted(file: int) -> None:
        sync(file)
        held[os.readlink(f"/proc/self/fd/{file}")] = os.fstat(file).st_size

    def removed(path: Path, **options: Any) -> None:
        whole = path.parent / "predictions.json"
        assert held[str(whole.with_name(".predictions.json.part"))] == whole.stat().st_size
        held["removed"] = 1
        remove(path, **options)

    monkeypatch.setattr("os.fsync", noted)
    monkeypatch.setattr(batch_predict.shutil, "rmtree", removed)
    assert predict(model, folder, f"out={tmp_path / 'out'}") == 0
    assert held["removed"]


def test_what_is_read_ahead_comes_in_order_and_is_bounded() -> None:
    asked: list[int] = []

    def reading(i: int) -> Any:
        asked.append(i)
        return i, Path(), torch.zeros(0)

    items = batch_predict.ahead(reading, iter(range(1000)), 2)
    assert [next(items)[0] for _ in range(10)] == list(range(10))
    assert len(asked) <= 15
    assert [i for i, _, _ in items] == list(range(10, 1000))


def test_python_takes_the_same(model: Path, folder: Path) -> None:
    assert [one.path for one in load(model, device="cpu").stream(Sources([str(folder)]), batch=4)] == list(
        Sources([str(folder)])
    )
