"""Prediction of videos: in Python and by the command, drawn copies, JSON lines, tracks, broken files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fusedet import cli
from fusedet.api import predict
from fusedet.api.predictor import Predictor
from fusedet.config import apply_overrides, parse
from fusedet.data import videos
from fusedet.data.video_parts import Part
from fusedet.data.videos import Video
from fusedet.errors import InputError
from fusedet.types import BatchDetections
from making_videos import HEIGHT, SIDE, UNEVEN, WIDTH, make_video

pytest.importorskip("av")
from test_videos import milliseconds, read, read_sound, read_to_error, to_array

Capture = pytest.CaptureFixture[str]


class Square:
    """A detector of the bright square: its exact box, and a faint box at the image's corner."""

    def __init__(self) -> None:
        self.selection: dict[str, Any] = {}
        self.neck = SimpleNamespace(levels=SimpleNamespace(strides=(8, 16, 32)))
        self.backbone = SimpleNamespace(scale=torch.zeros(1))
        self.counts: list[int] = []

    def detect(self, images: Tensor, sizes: Tensor, padded: bool = True) -> BatchDetections:
        self.counts.append(len(images))
        boxes, scores = torch.zeros(len(images), 2, 4), torch.tensor([[0.9, 0.1]]).repeat(len(images), 1)
        counts = torch.zeros(len(images)).long()
        for i, image in enumerate(images):
            y, x = (image.float().mean(0) > 210).nonzero().unbind(1)
            if len(y):
                boxes[i] = torch.tensor([[x.min(), y.min(), x.max() + 1, y.max() + 1], [0, 0, 5, 5]])
                counts[i] = 2
        labels = torch.tensor([[1, 0]]).repeat(len(images), 1)
        return BatchDetections(boxes, scores, labels, counts)


def make_predictor(*overrides: str) -> Predictor:
    """A predictor that sees frames at their own scale."""
    detector: Any = Square()
    config = parse(apply_overrides({}, [f"data.size=[{HEIGHT},{WIDTH}]", *overrides]))
    return Predictor(detector, config, ["cat", "dog"], [3, 7], Path(__file__))


@pytest.fixture
def square(monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """The predictor that the command loads as any run."""
    predictor = make_predictor("test.batch=3")
    monkeypatch.setattr(predict, "load", lambda run, *texts, **options: predictor)
    return predictor


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# -- in Python


@pytest.mark.parametrize("batch", [1, 3])
def test_stream_of_a_video(batch: int, tmp_path: Path) -> None:
    predictor = make_predictor()
    file = make_video(tmp_path / "a.mp4", UNEVEN)
    pairs = list(predictor.stream(file, batch, every=2, start=0.2, end="0:01"))
    assert [frame.index for frame, _ in pairs] == [3, 5, 7, 9]
    for frame, detections in pairs:
        left = 2 * frame.index
        assert detections.boxes[0].tolist() == pytest.approx([left, 16, left + SIDE, 16 + SIDE], abs=1)
        assert detections.names == ("cat", "dog")
        assert detections.track_ids is None
        assert detections.path == file
        assert detections.image is frame.image
    detector: Any = predictor.detector
    assert detector.counts == [batch] * (4 // batch) + [1] * (4 % batch)


def test_stream_in_tiles(tmp_path: Path) -> None:
    predictor = make_predictor("test.tiles.size=64", "test.tiles.whole=false")
    (_, detections), *_ = predictor.stream(make_video(tmp_path / "a.mp4", [0]), 2)
    assert [0, 16, SIDE, 16 + SIDE] in detections.boxes.round().int().tolist()


def test_stream_ends_at_the_break(tmp_path: Path) -> None:
    file = make_video(tmp_path / "a.mkv", range(0, 4000, 40))
    file.write_bytes(file.read_bytes()[:-4000])
    pairs, error = read_to_error(make_predictor().stream(str(file), 64))
    assert "is truncated or damaged" in error
    seen = [frame.index for frame, _ in pairs]
    assert seen
    assert seen == list(range(len(seen)))


def test_tracks(tmp_path: Path) -> None:
    """The square keeps its number from its second frame on; the faint box starts no track."""
    pytest.importorskip("trackers")
    pairs = list(make_predictor().stream(make_video(tmp_path / "a.mp4"), track=0.3))
    ids = [detections.track_ids.tolist() for _, detections in pairs if detections.track_ids is not None]
    assert ids[1:] == [[1, -1]] * 19
    first = pairs[5][1]
    assert [row.get("track_id") for row in first.to_coco()] == [1, None]
    plain = first.__class__(**{**vars(first), "track_ids": None})
    assert np.any(np.asarray(first.plot()) != np.asarray(plain.plot())), "the tag has the number"


def test_tracks_need_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(InputError, match=r'tracks need the package trackers: pip install "fusedet\[track\]"'):
        next(make_predictor().stream(make_video(tmp_path / "a.mp4", [0]), track=0.3))


def test_the_command_needs_the_package_before_it_writes(
    square: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """With --on-bad-image skip no video is skipped for it, and the same out= can be used after the installation."""
    monkeypatch.setitem(sys.modules, "trackers", None)
    file, out = make_video(tmp_path / "a.mp4", [0]), tmp_path / "out"
    assert cli.run(["predict", "RUN", str(file), "--track", "--on-bad-image", "skip", f"out={out}"]) == 2
    assert capsys.readouterr().err == 'error: tracks need the package trackers: pip install "fusedet[track]"\n'
    assert not out.exists()


def test_a_skipped_video_is_no_image(square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    file = make_video(tmp_path / "b.mp4", [0])
    arguments = [
        "predict",
        "RUN",
        str(tmp_path / "a.mp4"),
        str(file),
        "--on-bad-image",
        "skip",
        f"out={tmp_path / 'out'}",
    ]
    assert cli.run(arguments) == 0
    text = capsys.readouterr().out
    assert "a.mp4 is no video that can be read" in text
    assert "could not be read, listed" not in text


@pytest.mark.parametrize("score", ["-0.1", "1.5", "nan"])
def test_scores_outside_0_to_1(score: str, square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    assert cli.run(["predict", "RUN", str(tmp_path), "--score", score]) == 2
    assert capsys.readouterr().err == f"error: score={score} must be 0 to 1\n"


# -- the command


def test_the_command_on_images_and_videos(square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    make_video(tmp_path / "in" / "a.mp4", UNEVEN, sound="aac")
    make_video(tmp_path / "in" / "b" / "a.mkv", [0, 40])
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[5:20, 10:30] = 255
    Image.fromarray(pixels).save(tmp_path / "in" / "c.png")
    out = tmp_path / "out"
    assert cli.run(["predict", "RUN", str(tmp_path / "in"), f"out={out}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    frames = len(UNEVEN) + 2
    expected = {"images": 1, "videos": 2, "frames": frames, "detections": 2 * (frames + 1), "shown": frames + 1}
    assert result | expected == result
    assert result["skipped"] == result["left"] == 0
    (image,) = json.loads((out / "predictions.json").read_text())["images"]
    assert Path(image["file_name"]).name == "c.png"
    assert {file.name for file in (out / "videos").iterdir()} == {"a.jsonl", "a.mp4", "a-2.jsonl", "a-2.mp4"}
    lines = read_lines(out / "videos" / "a.jsonl")
    assert [line["frame"] for line in lines] == list(range(len(UNEVEN)))
    assert [line["time"] for line in lines] == pytest.approx([time / 1000 for time in UNEVEN], abs=1e-3)
    assert (lines[0]["height"], lines[0]["width"], lines[0]["shown"]) == (HEIGHT, WIDTH, 1)
    best = lines[4]["annotations"][0]
    assert (best["category_id"], best["image_id"]) == (7, 4)
    assert best["bbox"] == pytest.approx([8, 16, SIDE, SIDE], abs=1)
    drawn, plain = read(out / "videos" / "a.mp4"), read(tmp_path / "in" / "a.mp4")
    assert milliseconds(drawn) == UNEVEN
    assert np.abs(to_array(drawn[3].image).astype(int) - to_array(plain[3].image)).max() > 60, "a box is drawn"
    sounds = [[data for _, data in read_sound(folder / "a.mp4")] for folder in (out / "videos", tmp_path / "in")]
    assert sounds[0] == sounds[1]


def test_the_command_prints_what_it_did(square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    file = make_video(tmp_path / "a.mp4", UNEVEN)
    options = ["--every", "5", "--from", "0:00.2", "--to", "1.5", "--no-draw", "--save", "csv,yolo", "--crops"]
    assert cli.run(["predict", "RUN", str(file), f"out={tmp_path / 'out'}", *options]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0] == "3 frames of 1 video, 6 detections, 3 of them with a score of 0.3 or more"
    folder = tmp_path / "out" / "videos"
    assert [line["frame"] for line in read_lines(folder / "a.jsonl")] == [3, 8, 13]
    assert not (folder / "a.mp4").exists()
    header, *rows = (folder / "a.csv").read_text().splitlines()
    assert header.endswith("x1,y1,x2,y2,frame,time,track_id")
    assert len(rows) == 6
    assert rows[2].endswith(",8,0.9,")
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    labels = sorted((tmp_path / "out" / "labels").iterdir())
    assert [label.name for label in labels] == ["a-000003.txt", "a-000008.txt", "a-000013.txt"]
    assert labels[0].read_text().startswith("1 ")
    assert len(list((tmp_path / "out" / "crops" / "dog").iterdir())) == 3


def test_a_broken_video_keeps_what_was_done(square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    broken = make_video(tmp_path / "a.mkv", range(0, 4000, 40))
    broken.write_bytes(broken.read_bytes()[:-5000])
    whole = make_video(tmp_path / "b.mp4", [0, 40])
    (tmp_path / "c.mp4").write_bytes(b"nothing")
    arguments = ["predict", "RUN", str(broken), str(tmp_path / "c.mp4"), str(whole)]
    assert cli.run([*arguments, f"out={tmp_path / 'one'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.mkv is truncated or damaged at " in line
    done = read_lines(tmp_path / "one" / "videos" / "a.jsonl")
    assert f"{len(done)} frames before it are in" in line
    assert line.endswith("with --on-bad-image skip the others are predicted")
    assert len(read(tmp_path / "one" / "videos" / "a.mp4")) == len(done) > 10
    assert cli.run([*arguments, f"out={tmp_path / 'two'}", "--on-bad-image", "skip", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["videos"], result["frames"], result["skipped"]) == (2, len(done) + 2, 1)
    assert "a.mkv is truncated" in result["notes"][0]
    assert "c.mp4 is no video" in result["notes"][1]


@pytest.mark.parametrize(("content", "options"), [(b"nothing", []), (b"", ["--save", "yolo"]), (None, ["--from", "5"])])
def test_a_single_video_that_cannot_be_read_leaves_nothing(
    content: bytes | None, options: list[str], square: Predictor, tmp_path: Path, capsys: Capture
) -> None:
    file, out = tmp_path / "a.mp4", tmp_path / "out"
    if content is None:
        make_video(file)
    else:
        file.write_bytes(content)
    assert cli.run(["predict", "RUN", str(file), f"out={out}", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a.mp4 " in line
    assert "--on-bad-image" not in line, "there are no others"
    assert not (out / "videos").exists()
    make_video(file)
    assert cli.run(["predict", "RUN", str(file), f"out={out}", "--no-draw"]) == 0


def test_a_single_image_that_cannot_be_read(square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    assert cli.run(["predict", "RUN", str(tmp_path / "a.png"), f"out={tmp_path / 'out'}"]) == 2
    assert "--on-bad-image" not in capsys.readouterr().err


def test_tracks_of_the_command(square: Predictor, tmp_path: Path) -> None:
    pytest.importorskip("trackers")
    file = make_video(tmp_path / "a.mp4")
    assert cli.run(["predict", "RUN", str(file), f"out={tmp_path / 'out'}", "--track", "--no-draw"]) == 0
    last = read_lines(tmp_path / "out" / "videos" / "a.jsonl")[-1]
    assert [row.get("track_id") for row in last["annotations"]] == [1, None]


def test_an_interrupted_stream_is_complete(square: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends a camera: the video and the lines up to there can be read."""
    file = make_video(tmp_path / "a.mp4")
    original = videos.Video.read

    def stopped(self: Video, part: Part, on_sound: Any = None) -> Any:
        for frame in original(self, part, on_sound):
            if frame.index == 6:
                raise KeyboardInterrupt
            yield frame

    monkeypatch.setattr(videos.Video, "read", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict.predict("RUN", file, out=tmp_path / "out")
    monkeypatch.undo()
    assert len(read(tmp_path / "out" / "videos" / "a.mp4")) == 6
    assert len(read_lines(tmp_path / "out" / "videos" / "a.jsonl")) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resume"], "--resume continues the prediction of images"),
        (["--from", "x"], "from=x must be seconds"),
        (["--from", "2", "--to", "1"], "to=1 must be later than from=2"),
    ],
)
def test_wrong_options(options: list[str], message: str, square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    file = make_video(tmp_path / "a.mp4", [0])
    assert cli.run(["predict", "RUN", str(file), f"out={tmp_path / 'out'}", *options]) == 2
    assert message in capsys.readouterr().err


def test_options_of_videos_without_a_video(square: Predictor, tmp_path: Path, capsys: Capture) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    assert cli.run(["predict", "RUN", str(tmp_path / "a.png"), "--every", "2", f"out={tmp_path / 'out'}"]) == 2
    assert "--every, --from, --to and --track are for videos: none is among the sources" in capsys.readouterr().err


def test_other_channels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "load", lambda run, *texts, **options: make_predictor("data.channels=4"))
    with pytest.raises(InputError, match=r"videos have 3 channels, the model takes data\.channels=4"):
        predict.predict("RUN", make_video(tmp_path / "a.mp4", [0]), out=tmp_path / "out")
