"""Commands as people use them: crops, CSV and YOLO text, thresholds per class, the summary and page of doctor."""

import csv
import json
import re
import shutil
import sys
import types
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fusedet
from bad_data import write_dataset
from fusedet import cli
from fusedet import config as configs
from fusedet.api.prediction_exports import Exports, parse_formats, write_crops
from fusedet.data.findings import Finding, summarize_findings
from fusedet.data.readers.auto import read_dataset
from fusedet.data.shape_drawing import SHAPES
from fusedet.engine import trainer
from fusedet.errors import InputError
from fusedet.models.detectors import selection_options
from fusedet.models.ops.boxes import select_detections
from fusedet.types import Candidates

pytestmark = pytest.mark.usefixtures("unrendered")

Capture = pytest.CaptureFixture[str]


# -- predict


@pytest.fixture(scope="module")
def predicted(trained: Path, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All formats of the predictions of two images, with a low threshold."""
    out = tmp_path_factory.mktemp("predicted") / "out"
    images = sorted((scenes / "val").glob("*"))[:2]
    arguments = [
        *map(str, images),
        f"out={out}",
        "--save",
        "csv,yolo,coco",
        "--crops",
        "--score",
        "0.01",
        "test.score=0.001",
    ]
    assert cli.run(["predict", str(trained), *arguments, "--no-draw", "device=cpu", "data.workers=0"]) == 0
    return out


def test_csv_holds_what_the_json_holds(predicted: Path) -> None:
    content = json.loads((predicted / "predictions.json").read_text())
    with (predicted / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["annotations"]) > 0
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for row, annotation in zip(rows, content["annotations"], strict=True):
        x, y, w, h = annotation["bbox"]
        image = images[annotation["image_id"]]
        assert (row["file"], int(row["width"])) == (image["file_name"], image["width"])
        assert (row["class"], int(row["category_id"])) == (names[annotation["category_id"]], annotation["category_id"])
        assert [float(row[key]) for key in ("score", "x1", "y1", "x2", "y2")] == [
            annotation["score"],
            x,
            y,
            x + w,
            y + h,
        ]


def test_yolo_labels_are_read_back(predicted: Path, tmp_path: Path) -> None:
    """The labels are those of a YOLO dataset: this library's own reader gives the same boxes and classes."""
    content = json.loads((predicted / "predictions.json").read_text())
    names = (predicted / "classes.txt").read_text().split("\n")[:-1]
    assert names == [category["name"] for category in content["categories"]]
    (tmp_path / "images").mkdir()
    for image in content["images"]:
        shutil.copy(image["file_name"], tmp_path / "images")
    shutil.copytree(predicted / "labels", tmp_path / "labels")
    (tmp_path / "data.yaml").write_text(f"train: images\nval: images\nnames: {json.dumps(names)}\n")
    dataset = read_dataset(tmp_path, "train")
    ids = {Path(image["file_name"]).name: image["id"] for image in content["images"]}
    for image in dataset:
        own = [a for a in content["annotations"] if a["image_id"] == ids[image.path.name] and a["score"] >= 0.01]
        boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in own)]).reshape(-1, 4)
        assert image.boxes == pytest.approx(boxes, abs=1e-3)
        assert [content["categories"][k]["id"] for k in image.labels] == [a["category_id"] for a in own]


def test_crops_are_the_boxes(predicted: Path) -> None:
    content = json.loads((predicted / "predictions.json").read_text())
    shown = [a for a in content["annotations"] if a["score"] >= 0.01]
    crops = list((predicted / "crops").rglob("*.jpg"))
    assert len(crops) == len(shown) > 0
    names = {category["name"] for category in content["categories"]}
    assert {path.parent.name for path in crops} <= names


def test_crops_by_hand(tmp_path: Path) -> None:
    image = torch.arange(3 * 20 * 30, dtype=torch.int64).reshape(3, 20, 30).to(torch.uint8)
    prediction = fusedet.Prediction(
        boxes=torch.tensor(
            [[2.5, 3.2, 10.1, 9.0], [-5.0, -5.0, 4.0, 4.0], [50.0, 5.0, 60.0, 9.0], [0.0, 0.0, 9.0, 9.0]]
        ),
        scores=torch.tensor([0.9, 0.8, 0.7, 0.1]),
        labels=torch.tensor([0, 1, 0, 0]),
        image=image,
        names=("a/b..", "cat"),
    )
    write_crops(prediction, tmp_path, "x", 0.5)
    files = {str(path.relative_to(tmp_path)): Image.open(path).size for path in tmp_path.rglob("*.jpg")}
    assert files == {"a_b/x-1.jpg": (9, 6), "cat/x-2.jpg": (4, 4)}, "clipped, not outside, not below the threshold"


def test_copies_longer_than_jpeg_allows_are_reduced(tmp_path: Path) -> None:
    prediction = fusedet.Prediction(
        boxes=torch.tensor([[0.0, 0.0, 65_600.0, 4.0]]),
        scores=torch.tensor([0.9]),
        labels=torch.tensor([0]),
        image=torch.zeros(3, 4, 65_600, dtype=torch.uint8),
        names=("cat",),
    )
    exports = Exports(0.5, drawn=True, save=(), crops=True)
    exports.create_folders(tmp_path)
    exports.write_image_files(prediction, "x", tmp_path)
    for file in ("images/x.jpg", "crops/cat/x-1.jpg"):
        assert Image.open(tmp_path / file).size == (65_500, 4)


def test_formats() -> None:
    assert parse_formats([]) == ("coco",)
    assert parse_formats(["csv,yolo", "coco"]) == ("coco", "csv", "yolo")
    with pytest.raises(InputError, match=r"unknown format 'cvs' of --save: did you mean 'csv'"):
        parse_formats(["cvs"])


def test_table_of_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    prediction = fusedet.Prediction(
        boxes=torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 9.0, 8.0]]),
        scores=torch.tensor([0.75, 0.5]),
        labels=torch.tensor([1, 0]),
        names=("cat", "dog"),
        category_ids=(3, 7),
        path=Path("a.jpg"),
    )
    made: list[Any] = []
    pandas = types.ModuleType("pandas")
    pandas.DataFrame = lambda columns, index: made.append((columns, list(index)))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pandas", pandas)
    prediction.to_pandas()
    columns, index = made[0]
    assert index == [0, 1]
    assert list(columns) == ["file", "x1", "y1", "x2", "y2", "score", "label", "class", "category_id"]
    assert (columns["class"], columns["category_id"]) == (["dog", "cat"], [7, 3])
    assert columns["y2"].tolist() == [4, 8]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pip install pandas"):
        prediction.to_pandas()


def test_table_with_pandas() -> None:
    pytest.importorskip("pandas")
    empty = fusedet.Prediction(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), names=("a",))
    assert list(empty.to_pandas().shape) == [0, 9]


def test_a_prediction_with_a_range_resumes(trained: Path, scenes: Path, tmp_path: Path) -> None:
    image = sorted((scenes / "val").glob("*"))[0]
    arguments = ["predict", str(trained), str(image), f"out={tmp_path / 'out'}", "data.range=[0,4095]", "--no-draw"]
    assert cli.run([*arguments, "device=cpu", "data.workers=0"]) == 0
    assert cli.run([*arguments, "device=cpu", "data.workers=0", "--resume"]) == 0
    assert cli.run([*arguments, "device=cpu", "data.workers=0", "--resume", "data.range=[0,1023]"]) == 2


# -- a threshold per class


def test_thresholds_by_class_name() -> None:
    settings = configs.Test(score={"person": 0.5, "default": 0.3})
    assert selection_options(settings, ("dog", "person"))["score"] == [0.3, 0.5]
    assert selection_options(settings)["score"] == 0.3, "without names the lowest"
    assert selection_options(configs.Test(score={"dog": 0.5}), ("dog", "person"))["score"] == [0.5, 0.05]
    assert selection_options(configs.Test(score=0.2), ("dog", "person"))["score"] == 0.2
    with pytest.raises(InputError, match=r"unknown class 'persom' of test\.score: did you mean 'person'"):
        selection_options(configs.Test(score={"persom": 0.5}), ("dog", "person"))


@pytest.mark.parametrize("value", ["2", "-0.1", "{person: 1.5}", "{person: a}", "abc", "[0.5]", "null"])
def test_malformed_thresholds(value: str) -> None:
    with pytest.raises(InputError, match=r"test\.score"):
        fusedet.resolve_config("retinanet_r18_small", [f"test.score={value}"])


def test_detections_of_each_class_reach_its_threshold() -> None:
    torch.manual_seed(0)
    corners = torch.rand(1, 40, 2) * 90
    candidates = Candidates(torch.cat([corners, corners + 5], dim=2), torch.rand(1, 40, 3))
    sizes = torch.tensor([[100, 100]])

    def select(score: Any) -> set[tuple[int, float]]:
        detected = select_detections(candidates, sizes, [40], score=score, iou=1.0)
        count = int(detected.counts[0])
        return set(zip(detected.labels[0, :count].tolist(), detected.scores[0, :count].tolist()))

    limits = [0.2, 0.9, 0.5]
    everything = select(0.1)
    assert select(limits) == {(label, score) for label, score in everything if score > limits[label]}
    assert select([0.1] * 3) == everything


def test_thresholds_of_a_run(trained: Path, scenes: Path) -> None:
    """In `load` by the model's own class names; in `val` too."""
    name = fusedet.load(trained).names[0]
    image = sorted((scenes / "val").glob("*"))[0]
    everything = fusedet.load(trained, "test.score=0.001", "test.nms=1").predict(image)
    strict = fusedet.load(trained, f"test.score={{{name}: 1, default: 0.001}}", "test.nms=1").predict(image)
    assert isinstance(everything, fusedet.Prediction)
    assert isinstance(strict, fusedet.Prediction)
    assert (everything.labels == 0).any() or len(everything) > 0
    assert not (strict.labels == 0).any()
    with pytest.raises(InputError, match=r"unknown class 'no such' of test\.score"):
        fusedet.load(trained, "test.score={no such: 0.5}")


# -- config, info, val, cam, train


@pytest.mark.parametrize(
    "arguments",
    [
        ("model.neck={type: fpn, bogus: 1}",),
        ("model.head={type: retina, foo: 1}",),
        ("model.neck=fpnn",),
        ("train.monitor=APP",),
        ("model.head=fpn",),
    ],
)
def test_config_refuses_what_train_refuses(arguments: tuple[str, ...], capsys: Capture, tmp_path: Path) -> None:
    assert cli.run(["config", "retinanet_r18_small", *arguments]) == 2
    refused = capsys.readouterr()
    assert not refused.out
    assert cli.run(["train", "retinanet_r18_small", *arguments, "data=nowhere", f"out={tmp_path / 'o'}"]) == 2
    assert capsys.readouterr().err == refused.err


def test_config_builds_no_model_of_a_run(trained: Path, tmp_path: Path, capsys: Capture) -> None:
    """A run may be somebody else's: a class that its config names is printed and not imported."""
    run = shutil.copytree(trained, tmp_path / "run")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"neck: fpn|neck:\n    type: fpn", "neck: 'nowhere.at_all:Neck'", text))
    assert cli.run(["config", str(run)]) == 0
    assert "nowhere.at_all:Neck" in capsys.readouterr().out


def test_config_prints_what_a_run_would_have(capsys: Capture) -> None:
    assert cli.run(["config", "retinanet_r18_small", "train.epochs=7"]) == 0
    assert "epochs: 7" in capsys.readouterr().out


@pytest.mark.parametrize("name", [pytest.param("best.safetensors", marks=pytest.mark.slow), "last.ckpt"])
def test_info_of_a_checkpoint(trained: Path, name: str) -> None:
    whole, own = fusedet.info(trained), fusedet.info(trained / name)
    assert own.classes == whole.classes == len(SHAPES)
    assert own.cost == whole.cost
    assert own.model.endswith(name)


def test_val_refuses_unknown_arguments(trained: Path, scenes: Path, capsys: Capture) -> None:
    for word in ("extra", "street.jpg", "vall"):
        assert cli.run(["val", str(trained), word]) == 2
        assert word in capsys.readouterr().err
    assert cli.run(["val", str(trained), str(scenes)]) == 2, "a path that exists is no dataset of val without data="


@pytest.mark.slow
def test_cam_goes_on_past_an_image_without_detections(
    trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedet.api.predictor import Predictor

    images = sorted((scenes / "val").glob("*"))[:2]
    original = Predictor.predict
    calls = iter([False, True])

    def predict(self: Predictor, source: Any, batch: int = 1) -> Any:
        detected = original(self, source, batch)
        assert isinstance(detected, fusedet.Prediction)
        if next(calls):
            return detected
        empty = torch.zeros(0)
        return fusedet.Prediction(empty.reshape(0, 4), empty, empty.long(), names=self.names, image=detected.image)

    monkeypatch.setattr(Predictor, "predict", predict)
    result = fusedet.cam(trained, images, score=0.0, out=tmp_path / "cam")
    assert list(result.images) == [str(images[1])]
    assert list(result.skipped) == [str(images[0])]
    assert "skipped: " in str(result)
    assert "detects nothing" in result.to_dict()["skipped"][str(images[0])]
    calls = iter([False, False])
    with pytest.raises(InputError, match=r"none of 2 images has a detection, the first: .*detects nothing"):
        fusedet.cam(trained, images, score=0.0, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_no_best_weights_without_a_value_of_the_metric(trained: Path, scenes: Path, tmp_path: Path) -> None:
    """A metric that the split does not have chooses no weights: the result is that of the last ones, and says so."""
    data = shutil.copytree(scenes, tmp_path / "data")
    file = next(data.glob("annotations/*val*.json"))
    content = json.loads(file.read_text())
    for annotation in content["annotations"]:
        annotation["area"] = 50.0  # no large object
    file.write_text(json.dumps(content))
    said: list[str] = []
    config = fusedet.resolve_config(trained, [f"data={data}", "train.monitor=APl", f"out={tmp_path / 'run'}"])
    result = fusedet.train(config, say=said.append, quiet=True)
    assert not (tmp_path / "run/best.safetensors").exists()
    assert "last weights on val" in result.title
    assert "best weights" not in result.title
    assert any("train.monitor=APl had no value on val" in line for line in said)


@pytest.mark.parametrize(("warmup", "is_named"), [(1000, True), (1, False)])
def test_a_warm_up_longer_than_the_training_is_named(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warmup: int, is_named: bool
) -> None:
    """Before the first step, at which this training is stopped."""

    def stop(run: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "fit", stop)
    said: list[str] = []
    config = fusedet.resolve_config(
        trained, [f"train.warmup_steps={warmup}", "train.epochs=1", f"out={tmp_path / 'run'}"]
    )
    with pytest.raises(KeyboardInterrupt):
        fusedet.train(config, say=said.append, quiet=True)
    assert any(line.startswith("train.warmup_steps=1000, but the training has ") for line in said) == is_named


# -- doctor


def make_findings() -> dict[str, list[Finding]]:
    train = [Finding("warning", f"m{i}", f"kind {i}", i + 1, f"f{i}.jpg", f"do {i}") for i in range(14)]
    train += [Finding("error", "a.jpg is bad", "bad images", 1, "a.jpg", "repair them")] * 3
    train.append(Finding("warning", "background", "background", 999, "b.jpg", "nothing", is_harmless=True))
    return {"train": train, "val": [Finding("warning", "m", "kind 2", 40, "v.jpg", "do 2")]}


def test_summary_has_ten_lines_the_worst_first() -> None:
    summary = summarize_findings(make_findings(), [Finding("error", "differ", "classes differ", 1, "x.json", "y")], 10)
    assert len(summary) == 10
    assert [f.severity for f in summary[:3]] == ["error", "error", "warning"]
    assert summary[0].message == "bad images (train): 3, such as a.jpg; repair them"
    assert summary[2].message == "kind 2 (train, val): 43, such as f2.jpg; do 2"
    assert [f.count for f in summary[2:9]] == [43, 14, 13, 12, 11, 10, 9]
    assert summary[9].message == "and 8 other kinds of findings, listed above"
    everything = summarize_findings(make_findings(), [], 100)
    assert everything[-1].kind == "background", "harmless findings come last"


def test_doctor_ends_with_its_summary(tmp_path: Path, capsys: Capture) -> None:
    root = write_dataset(tmp_path / "data", "coco")
    (root / "train/p1.jpg").write_bytes(b"")
    (root / "train/p2.jpg").unlink()
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [-20, 5, 40, 20]
    file.write_text(json.dumps(content))
    assert cli.run(["doctor", f"data={root}"]) == 1
    out = capsys.readouterr().out
    summary = out[out.index("summary, the worst first") :].splitlines()[1:-1]
    assert [line.split()[0] for line in summary] == ["error", "error", "warning"]
    assert re.fullmatch(
        r"  error images that cannot be read \(train\): 1, such as .*p1\.jpg; repair or remove them", summary[0]
    )
    assert "images that do not exist (train): 1, such as" in summary[1]
    assert re.search(r"boxes partly outside .* \(train\): 1, such as .*p0\.jpg; correct them", summary[2])
    assert cli.run(["doctor", f"data={root}", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert [entry["severity"] for entry in said["summary"]] == ["error", "error", "warning"]
    assert said["ok"] is False


class Page(HTMLParser):
    """The texts and images of a page."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = dict(attributes)
        if tag == "img":
            self.images.append(values["src"] or "")
        self.links += [value for key, value in attributes if key in ("href", "src") and value]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_page_of_a_dataset(tmp_path: Path, capsys: Capture) -> None:
    root = write_dataset(tmp_path / "data", "coco")
    shutil.copy(root / "train/p0.jpg", root / "val/p6.jpg")
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["bbox"] = [-20, 5, 40, 20]
    content["annotations"][1]["bbox"] = [900, 900, 5, 5]
    content["categories"][1]["name"] = "<b>dog</b>"
    file.write_text(json.dumps(content))
    val = root / "annotations/instances_val.json"
    val.write_text(val.read_text().replace('"dog"', '"<b>dog</b>"'))
    page = tmp_path / "out" / "page.html"
    assert cli.run(["doctor", f"data={root}", "--report", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text()
    parsed = Page(text)
    joined = "\n".join(parsed.texts)
    for line in (
        "Summary, the worst first",
        "Annotations by class",
        "Annotations by size",
        "Smallest annotations",
        "Largest annotations",
        "Suspects: boxes wholly outside their image: not trained on (1)",
        "Suspects: boxes partly outside their image: clipped in training (1)",
        "validation images with the content of training images: 1 of 2",
        "<b>dog</b>",
    ):
        assert line in joined, line
    assert "<b>dog" not in text, "names are escaped"
    assert len(parsed.images) >= 2 * (8 + 4) + 2, "eight objects of train, four of val, two suspects"
    assert all(link.startswith(("data:image/jpeg;base64,", "data:,")) for link in parsed.links), (
        "the page loads nothing"
    )
    assert '<meta name="viewport"' in text, "the frame is that of all pages"
    assert cli.run(["doctor", f"data={root}", "--report", str(page)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert cli.run(["doctor", f"data={root}", "--report", str(tmp_path / "page.pdf")]) == 2


def test_page_of_unreadable_data(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", "coco")
    for file in (root / "train").iterdir():
        file.unlink()
    (root / "annotations/instances_val.json").write_text("{")
    page = tmp_path / "page.html"
    result = fusedet.check_dataset(data=root, report=page)
    assert not result.ok
    assert "would stop a training" in page.read_text()
