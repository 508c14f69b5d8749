"""Prediction of many images: lazy sources, JSON lines, resumption, several processes, unreadable images."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fusedet import cli, config
from fusedet.api import batch_predict, prediction_exports
from fusedet.api.image_sources import Sources
from fusedet.api.prediction_exports import Exports
from fusedet.api.prediction_lines import read_lines
from fusedet.api.predictor import Predictor, load
from fusedet.data import large_images
from fusedet.engine import checkpoint
from fusedet.errors import InputError
from fusedet.models.detectors import build_detector

pytestmark = pytest.mark.usefixtures("unrendered")

OPTIONS = [
    "model.backbone.name=test_resnet",
    "model.pyramid.channels=16",
    "model.head.convs=1",
    "model.head.norm=false",
    "data.size=[32,48]",
    "test.score=0.001",
]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights: only the equality of predictions matters."""
    torch.manual_seed(0)
    options = config.load("retinanet_tiny", [*OPTIONS, "test.max_det=5"])
    file = tmp_path_factory.mktemp("model") / "best.safetensors"
    meta = {"config": options.to_yaml(), "names": '["dog", "cat"]', "category_ids": "[3, 7]"}
    checkpoint.save_weights(file, build_detector(options, 2).state_dict(), meta)
    return file


NAMES = ["a/1.png", "a/2.png", "a.png", "b/1.png", "b/c/x.PNG", "b/c/y.png", "b/d.png", "z/1 2.png", "z/ü.png", "z.png"]


def write_images(folder: Path) -> None:
    for i, name in enumerate(NAMES):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), (20 * i, 255 - 20 * i, 7 * i)).save(file, format="PNG")
    (folder / "b" / "notes.txt").write_text("no image")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten images in folders, one of them with a name of another one's. Not to be changed: use `changed_folder`."""
    folder = tmp_path_factory.mktemp("sources") / "images"
    write_images(folder)
    return folder


@pytest.fixture
def changed_folder(folder: Path) -> Iterator[Path]:
    """The same images at the same place, to be changed: they are written again afterwards."""
    yield folder
    shutil.rmtree(folder)
    write_images(folder)


def predict(model: Path, *arguments: object) -> int:
    return cli.run(["predict", str(model), *map(str, arguments), "--no-draw", "device=cpu", "data.workers=0"])


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
    paths = list(Sources(twice))
    assert sorted(paths) == everything
    assert paths[0] == folder / "b" / "d.png"
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
        InputError, match=r"there is no list nowhere.txt|there is no image, folder or pattern|matches no image"
    ):
        Sources([word])


def test_files_are_named_after_their_images_each_once(tmp_path: Path) -> None:
    """Any number of images; a name with a number is none that a later image has."""
    paths = ["d1/a.jpg", "d2/a-2.jpg", "d2/a.jpg", "d3/a-3.jpg", "d4/a.png", *(f"{i:06d}.jpg" for i in range(1500))]
    (tmp_path / "list.txt").write_text("\n".join(paths))
    sources = Sources([f"@{tmp_path}/list.txt"])

    def name_files(*, drawn: bool) -> list[str]:
        options = batch_predict.Options(Exports(0.3, drawn, (), False), 4, False, "error", "", 0, 0, 1)
        missing = batch_predict._missing(sources, [], tmp_path, options, len(paths), lambda images: None)
        return [image.name for image in missing]

    stems = [Path(path).stem for path in paths]
    assert name_files(drawn=True) == ["a", "a-2", "a-3-2", "a-3", "a-5", *stems[5:]]
    assert name_files(drawn=False) == stems, "no file is named"


# -- files


@pytest.fixture(scope="module")
def whole(model: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The predictions of one uninterrupted process. Not to be changed."""
    out = tmp_path_factory.mktemp("predictions") / "whole"
    assert predict(model, folder, f"out={out}") == 0
    content = read(out / "predictions.json")
    assert list(content) == ["images", "categories", "annotations"]
    assert [image["id"] for image in content["images"]] == list(range(1, 11))
    assert [entry["id"] for entry in content["annotations"]] == list(range(1, len(content["annotations"]) + 1))
    assert len(content["annotations"]) == 50
    assert sorted(file.name for file in out.iterdir()) == ["predict.json", "predictions.json"]
    return dict(content)


def lines(directory: Path) -> list[dict[str, Any]]:
    files = directory.glob("predictions-*.jsonl")
    return sorted((json.loads(line) for file in files for line in file.open()), key=lambda record: record["id"])


def test_json_lines_stay_on_request(
    model: Path, folder: Path, tmp_path: Path, whole: dict[str, Any], capsys: Capture
) -> None:
    capsys.readouterr()
    out = tmp_path / "lines"
    assert predict(model, folder, f"out={out}", "--jsonl", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["detections"], summary["skipped"], summary["left"]) == (10, 50, 0, 0)
    assert summary["files"] == {"predictions-0-of-1": str(out / "predictions-0-of-1.jsonl")}
    records = lines(out)
    assert [{key: record[key] for key in whole["images"][0]} for record in records] == whole["images"]
    annotations = [entry for record in records for entry in record["annotations"]]
    assert annotations == [{key: entry[key] for key in entry if key != "id"} for entry in whole["annotations"]]
    assert not (out / "predictions.json").exists()


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_killed_prediction_resumes_to_the_same_result(
    model: Path, changed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture, batch: int
) -> None:
    size = f"test.batch={batch}"
    assert predict(model, changed_folder, f"out={tmp_path / 'uninterrupted'}", size) == 0
    out, seen, predict_batch = tmp_path / "stopped", [], Predictor.predict_batch

    def dies(self: Predictor, group: Any, batch: Any = None) -> Any:
        seen.extend(path for _, path in group)
        if len(seen) > 7:
            os._exit(9)
        return predict_batch(self, group, batch)

    arguments = [changed_folder, f"out={out}", size, "--resume"]
    if not (child := os.fork()):
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: a parallel region would wait for them
            monkeypatch.setattr(Predictor, "predict_batch", dies)
            predict(model, *arguments)
        finally:
            os._exit(1)  # else an exception would return the child to pytest, as a second worker
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (out / "predictions.json").exists()
    file = out / "predictions-0-of-1.jsonl"
    done = len(lines(out))
    assert done == (7 if batch == 1 else 4)
    content = file.read_bytes()
    file.write_bytes(content[:-5])  # a torn last line
    monkeypatch.setattr(
        Predictor,
        "predict_batch",
        lambda self, group, batch: (seen.extend(path for _, path in group), predict_batch(self, group, batch))[1],
    )
    assert predict(model, *arguments[:-1]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    for key, value in {"test.max_det": 4, "test.batch": 2}.items():
        assert predict(model, *arguments, f"{key}={value}") == 2
        before = 5 if key == "test.max_det" else batch
        assert f"was begun with {key} {before}, now it is {value}: give" in " ".join(capsys.readouterr().err.split())
    (changed_folder / "a" / "1.png").rename(changed_folder / "a" / "0.png")
    assert predict(model, *arguments) == 2
    assert "predictions of other images than the sources" in capsys.readouterr().err
    (changed_folder / "a" / "0.png").rename(changed_folder / "a" / "1.png")
    assert not seen, "nothing was predicted meanwhile"
    assert predict(model, *arguments) == 0
    images = list(Sources([str(changed_folder)]))
    assert seen == images[6 if batch == 1 else 0 :]
    assert read(out / "predictions.json") == read(tmp_path / "uninterrupted" / "predictions.json")
    seen.clear()
    assert predict(model, *arguments) == 0
    assert not seen
    assert "10 images, 50 detections" in capsys.readouterr().out


def test_damaged_files_are_refused(model: Path, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    arguments = [folder, f"out={out}", "--jsonl", "--resume"]
    assert predict(model, *arguments) == 0
    begun, file = out / "predict.json", out / "predictions-0-of-1.jsonl"
    good, content = read(begun), file.read_text().splitlines(keepends=True)
    wrong = ([1], {"images": 1}, {**good["done"], "shown": "x"}, {**good["done"], "files": None})
    texts = ["", "[", "[]", "1", "{}", '{"request": []}', "[" * 100_000]
    for bad in [*texts, *(json.dumps({**good, "done": done}) for done in wrong)]:
        begun.write_text(bad)
        with pytest.raises(InputError, match=f"{begun} is damaged"):
            batch_predict._read_begun(begun)
    refused(model, arguments, f"{begun} is damaged", capsys)
    begun.write_text(json.dumps({"request": good["request"]}))
    for bad in ("\n", "\0\0\n", "[]\n", '{"id": 3}\n', content[0], content[2].replace('"annotations"', '"x"')):
        file.write_text("".join([*content[:2], bad, *content[3:]]))
        with file.open("rb") as opened, pytest.raises(InputError, match=f"{file}, line 3 is damaged"):
            list(read_lines([opened]))
    refused(model, arguments, f"{file}, line 3 is damaged", capsys)


def refused(model: Path, arguments: list[Any], text: str, capsys: Capture) -> None:
    assert predict(model, *arguments) == 2
    said = capsys.readouterr().err
    assert text in said.replace("\n", " ") or text in said.replace("\n", "")
    assert "Traceback" not in said


def test_an_unreadable_image_ends_the_prediction_or_is_listed(
    model: Path, changed_folder: Path, tmp_path: Path, whole: dict[str, Any], capsys: Capture
) -> None:
    bad = list(Sources([str(changed_folder)]))[4]
    bad.write_bytes(b"no image")
    arguments = [changed_folder, f"out={tmp_path / 'bad'}"]
    assert predict(model, *arguments) == 2
    said = capsys.readouterr().err
    assert str(bad) in said
    assert "--on-bad-image skip" in said
    assert [image["id"] for image in read(tmp_path / "bad" / "predictions.json")["images"]] == [1, 2, 3, 4]
    assert predict(model, *arguments, "--resume", "--on-bad-image", "skip", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["images"], summary["skipped"]) == (9, 1)
    content = read(tmp_path / "bad" / "predictions.json")
    assert content["images"] == [image for image in whole["images"] if image["id"] != 5]
    assert [(entry["id"], entry["file_name"]) for entry in content["skipped"]] == [(5, str(bad))]
    assert str(bad) in content["skipped"][0]["reason"]


def test_an_unreadable_first_image_leaves_no_directory(model: Path, tmp_path: Path) -> None:
    (bad := tmp_path / "bad.jpg").write_bytes(b"no image")
    arguments = [bad, f"out={tmp_path / 'out'}"]
    more = ["--jsonl", "--crops", "--save", "csv,yolo"]
    for options in ([], more):
        assert predict(model, *arguments, *options) == 2
        assert not (tmp_path / "out").exists()
    assert predict(model, *arguments, *more, "--on-bad-image", "skip") == 0
    assert (tmp_path / "out" / "predict.json").is_file()


def test_an_unreadable_first_image_is_skipped_without_further_files(model: Path, folder: Path, tmp_path: Path) -> None:
    (bad := tmp_path / "bad.png").write_bytes(b"no image")
    out = tmp_path / "out"
    assert predict(model, bad, folder / "a.png", f"out={out}", "--on-bad-image", "skip") == 0
    content = read(out / "predictions.json")
    assert [image["id"] for image in content["images"]] == [2]
    assert [(entry["id"], entry["file_name"]) for entry in content["skipped"]] == [(1, str(bad))]
    assert sorted(file.name for file in out.iterdir()) == ["predict.json", "predictions.json"]


def test_a_damaged_large_image_ends_the_prediction_or_is_listed(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read while it is predicted, and again for crops."""
    monkeypatch.setattr(large_images, "LARGE", 0)
    images = [tmp_path / f"{name}.tiff" for name in "abc"]
    for path in images:
        Image.new("RGB", (32, 24), (20, 200, 7)).save(path)
    images[1].write_bytes(images[1].read_bytes()[:-500])
    arguments = [*images, f"out={tmp_path / 'out'}", "test.batch=3", "test.tiles.size=128"]
    refused(model, arguments, f"{images[1]} is", capsys)
    assert predict(model, *arguments, "--resume", "--on-bad-image", "skip") == 0
    content = read(tmp_path / "out" / "predictions.json")
    assert [image["id"] for image in content["images"]] == [1, 3]
    assert [(entry["id"], entry["file_name"]) for entry in content["skipped"]] == [(2, str(images[1]))]

    def fail(*_: Any) -> None:
        raise InputError("damaged meanwhile")

    monkeypatch.setattr(prediction_exports, "write_crops", fail)
    arguments = [images[0], f"out={tmp_path / 'crops'}", "--crops", "--on-bad-image", "skip"]
    assert predict(model, *arguments) == 0
    assert [entry["reason"] for entry in read(tmp_path / "crops" / "predictions.json")["skipped"]] == [
        "damaged meanwhile"
    ]


def test_processes_share_the_images_each_once(
    model: Path, folder: Path, tmp_path: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Whichever process is last joins; a part of the processes can be resumed by another number of them."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    arguments = [folder, f"out={tmp_path / 'shared'}", "--resume"]
    for rank in ("0", "2"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        assert predict(model, *arguments) == 0
    assert "process 2 is done, other processes still have to predict 3 images" in " ".join(
        capsys.readouterr().out.split()
    )
    assert [record["id"] for record in lines(tmp_path / "shared")] == [1, 3, 4, 6, 7, 9, 10]
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name)
    assert predict(model, *arguments) == 0
    assert read(tmp_path / "shared" / "predictions.json") == whole


def test_each_process_says_what_it_cannot_read(
    model: Path, changed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """Of a prediction; what stops a training the processes tell each other, and one on each machine says it."""
    bad = list(Sources([str(changed_folder)]))[7]
    bad.write_bytes(b"no image")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, code in (("0", 0), ("1", 2)):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        assert predict(model, changed_folder, f"out={tmp_path / 'shared'}") == code
    said = capsys.readouterr().err
    assert said.startswith(f"error: process 1: {bad} is empty or not an image")
    assert said.count("\n") == 1
    assert cli.run(["train"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.run(["train"]) == 2
    assert capsys.readouterr().err.startswith("error: process 1: which config?")
    monkeypatch.setenv("RANK", "x")
    assert predict(model, changed_folder) == 2
    assert capsys.readouterr().err.startswith("error: RANK=x")


def test_joined_predictions_are_on_the_disk_before_the_lines_are_removed(
    model: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut takes back what was not synchronized, but not the removal of the lines."""
    synced, sync, unlink = [], os.fsync, Path.unlink

    def note_sync(file: int) -> None:
        sync(file)
        synced.append(os.fstat(file).st_ino)

    def note_removal(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".jsonl":
            assert (path.parent / "predictions.json").stat().st_ino in synced
            synced.append(-1)
        unlink(path, missing_ok)

    monkeypatch.setattr("os.fsync", note_sync)
    monkeypatch.setattr(Path, "unlink", note_removal)
    assert predict(model, folder, f"out={tmp_path / 'out'}") == 0
    assert synced[-1] == -1


def test_prefetched_items_come_in_order_and_are_bounded() -> None:
    asked: list[int] = []

    def reading(i: int) -> Any:
        asked.append(i)
        return i, Path(), torch.zeros(0)

    items = batch_predict.prefetch(reading, iter(range(1000)), 2)
    assert [next(items)[0] for _ in range(10)] == list(range(10))
    assert len(asked) <= 15
    assert [i for i, _, _ in items] == list(range(10, 1000))


def test_python_takes_the_same(model: Path, folder: Path) -> None:
    assert [one.path for one in load(model, device="cpu").stream(Sources([str(folder)]), batch=4)] == list(
        Sources([str(folder)])
    )
