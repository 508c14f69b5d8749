"""What the functions of `fusedet.api` and their commands refuse before they work: settings, numbers and directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fusedet
from fusedet import cli, config
from fusedet.errors import InputError


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: fusedet.check_dataset("data=x", "train.lr=1"),
            "train.lr=1 changes nothing for this command: what can",
        ),
        (lambda: fusedet.check_dataset(data="x", model={"neck": "fpn"}), "model.neck=fpn changes nothing"),
        (lambda: fusedet.browse("data=x", "test.score=0.5"), "test.score=0.5 changes nothing for this command"),
        (lambda: fusedet.info("retinanet_tiny", "train.lr=1"), "train.lr=1 changes nothing for a model's cost"),
        (lambda: fusedet.info("retinanet_tiny", "data=x"), "data=x changes nothing for a model's cost"),
        (lambda: fusedet.browse(data="x", centers=True, images=3), "leave out the number of images and the epoch"),
        (lambda: fusedet.browse(data="x", centers=True, epoch=0), "leave out the number of images and the epoch"),
        (lambda: fusedet.browse(data="x", images=0), "images=0 must be 1 or more"),
        (lambda: fusedet.browse(data="x", epoch=-1), "epoch=-1 must be 0 or more"),
        (lambda: fusedet.compare("a.json", "b.json", data="x", resamples=1), "resamples=1 must be 40 or more"),
        (lambda: fusedet.compare("a.json", "b.json", data="x", bootstrap_seed=-1), "bootstrap_seed=-1 must be 0 or"),
        (lambda: fusedet.demo(images=3), "images=3 must be 10 or more"),
        (lambda: fusedet.validate("nope"), "nope: give a run directory, a best.safetensors or a last.ckpt"),
    ],
)
def test_what_would_change_nothing_is_refused(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert text in str(error.value)


def test_an_existing_directory_is_refused_before_the_data_are_read(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="exists and is not empty"):
        fusedet.train("retinanet_tiny", data=tmp_path / "nowhere", out=tmp_path)


@pytest.mark.parametrize("schedule", config.names("schedules"))
def test_a_schedule_lowers_the_rate_before_its_last_epoch(schedule: str) -> None:
    train = config.load("retinanet_r50", [f"train.schedule={schedule}"]).train
    assert train.policy == "multistep"
    assert 0 < min(train.milestones) <= max(train.milestones) < train.epochs


def test_a_syntax_error_is_named_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  neck: [fpn\ndata: x\n")
    with pytest.raises(InputError) as error:
        config.load(file)
    assert str(error.value).startswith(f"{file} is not YAML: line 3, column 5: ")
    assert "expected ',' or ']'" in str(error.value)


def test_a_wrong_choice_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["convert", "data", "a", "b", "--to", "kitti"]) == 2
    said = capsys.readouterr().err
    assert said == "error: Invalid value for '--to': 'kitti' is not one of 'coco', 'voc', 'yolo'.\n"
    assert cli.run([]) == 2
    assert "Usage: fusedet [OPTIONS] COMMAND" in capsys.readouterr().out
