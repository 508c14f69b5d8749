"""The commands from one command line and one Python call, on tiny data."""

import errno
import io
import json
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import typer
from PIL import Image

import fusedet
from fusedet import cli, config, evaluation
from fusedet.ablation.command import Launcher
from fusedet.api.convert_dataset import DatasetFormat
from fusedet.api.predict import OnBadImage
from fusedet.api.predictor import Precision
from fusedet.data import synthetic
from fusedet.data.readers.auto import read_dataset
from fusedet.data.shape_drawing import SHAPES
from fusedet.engine import checkpoint
from fusedet.engine.signals import Interrupted
from fusedet.errors import DivergenceError, InputError, StorageError
from fusedet.models.profiling import count_cost
from fusedet.types import BatchDetections, Detections
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "AR1", "AR10", "AR100")


def spoken(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command line that goes well prints."""
    capsys.readouterr()
    code = cli.run([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    """The same with --json."""
    return json.loads(spoken(capsys, *arguments, "--json"))


# -- train


def test_files_of_a_run(trained: Path) -> None:
    files = {path.name for path in trained.iterdir()}
    assert files >= {
        "config.yaml",
        "last.ckpt",
        "best.safetensors",
        "metrics.csv",
        "metrics.json",
        "run.json",
        "val.bbox.json",
    }
    assert files >= {"precision_recall.png", "confusion.png", "sizes.png", "worst.png", "training.png"}
    about = json.loads((trained / "run.json").read_text())
    assert set(about["data"]) == {"train", "val"}
    assert "torch" in about["versions"]
    results = json.loads((trained / "val.bbox.json").read_text())
    assert {r["category_id"] for r in results} <= set(range(1, 7))
    assert results
    assert {r["image_id"] for r in results} <= set(range(9, 17))


def test_a_run_can_be_repeated_from_its_config(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    text = spoken(capsys, "train", trained / "config.yaml", f"out={tmp_path / 'again'}")
    assert re.findall(r"fusedet (\w+) " + re.escape(str(tmp_path / "again")), text) == ["val", "predict", "export"]
    said = run_json(capsys, "train", trained, f"out={tmp_path / 'third'}")
    assert said["out"] == str(tmp_path / "third")
    assert {"AP", "AP50", "APs", "classes", "stamp"} <= said.keys()
    first, _ = checkpoint.load_weights(trained / "last.ckpt")
    for name in ("again", "third"):
        weights, _ = checkpoint.load_weights(tmp_path / name / "last.ckpt")
        assert weights.keys() == first.keys()
        assert all(torch.equal(weights[key], first[key]) for key in first)


def test_resume_by_run_directory_or_out(capsys: pytest.CaptureFixture[str], run_copy: Path) -> None:
    spoken(capsys, "train", run_copy, "--resume", "train.epochs=2")
    assert config.load(run_copy / "config.yaml").train.epochs == 2, "the config is the one that the weights come from"
    spoken(capsys, "train", "retinanet_tiny", *SMALL, f"out={run_copy}", "--resume", "train.epochs=3")
    assert checkpoint.load(run_copy / "last.ckpt")["epoch"] == 3
    steps = [row.split(",")[1] for row in (run_copy / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == sorted(steps)
    assert steps[-1] == "6"


def test_starting_from_weights(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned"
    spoken(
        capsys,
        "train",
        trained,
        f"out={out}",
        f"train.weights={trained}",
        "train.lr=1e-12",
        "model.backbone.norm_eval=true",
    )
    before, _ = checkpoint.load_weights(trained / "best.safetensors")
    after, _ = checkpoint.load_weights(out / "last.ckpt")
    torch.testing.assert_close(dict(after), dict(before), atol=1e-6, rtol=0)


def test_starting_from_weights_of_other_classes(
    capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
) -> None:
    """Rows of classes with equal names are kept and named; all other layers are loaded."""
    data = synthetic.generate_dataset(tmp_path / "data", images=10, size=(64, 96))
    for file in data.rglob("instances_*.json"):
        content = json.loads(file.read_text())
        content["categories"], known = content["categories"][:2], {c["id"] for c in content["categories"][:2]}
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] in known]
        file.write_text(json.dumps(content))
    options = [f"train.weights={trained}", "train.lr=1e-12", "model.backbone.norm_eval=true"]
    said = spoken(capsys, "train", trained, f"data={data}", f"out={tmp_path / 'tuned'}", *options)
    assert "has the 6 classes circle, triangle" in said
    said_of = "the weights that depend on classes are taken over by name: circle, triangle keep what was learned"
    assert f"{said_of} (head.cls.weight, head.cls.bias)" in said
    before, _ = checkpoint.load_weights(trained / "best.safetensors")
    after, meta = checkpoint.load_weights(tmp_path / "tuned" / "last.ckpt")
    assert len(json.loads(meta["names"])) == 2
    for key, value in before.items():
        if not key.startswith("head.cls."):
            torch.testing.assert_close(after[key], value, atol=1e-6, rtol=0)
    for key in ("head.cls.weight", "head.cls.bias"):  # of every anchor the first two of six classes
        rows = before[key].unflatten(0, (-1, 6))[:, :2].flatten(0, 1)
        torch.testing.assert_close(after[key], rows, atol=1e-6, rtol=0)


# -- val


def test_val_of_run_checkpoint_and_results_agree(
    capsys: pytest.CaptureFixture[str], trained: Path, scenes: Path, tmp_path: Path
) -> None:
    by_training = json.loads((trained / "metrics.json").read_text())
    results = json.loads((trained / "val.bbox.json").read_text())
    sources = {"run": [trained], "best": [trained / "best.safetensors"], "last": [trained / "last.ckpt"]}
    sources["results"] = [trained / "val.bbox.json", f"data={scenes}"]
    for name, arguments in sources.items():
        result = run_json(capsys, "val", *arguments, f"out={tmp_path / name}")
        assert [result[k] for k in METRICS] == pytest.approx([by_training[k] for k in METRICS], abs=1e-6), name
        again = json.loads((tmp_path / name / "val.bbox.json").read_text())
        # training scores with batch norms, val with folded ones: near ties may change places
        assert [r["image_id"] for r in again] == [r["image_id"] for r in results], name
        assert [r["score"] for r in again] == pytest.approx([r["score"] for r in results], abs=1e-5), name
        now, before = (
            Counter((r["image_id"], r["category_id"]) for r in results_of_run) for results_of_run in (again, results)
        )
        moved = Counter(image for image, _ in (now - before).elements())
        assert max(moved.values(), default=0) <= 1, f"{name}: only the last of 100 may be another one"
        assert result["stamp"]["data"] == by_training["stamp"]["data"]


def test_val_options(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    arguments = ["val", trained, "--voc", "--split", "train", "--evaluator", "pycocotools", f"out={tmp_path / 'v'}"]
    result = run_json(capsys, *arguments, "test.max_det=7")
    assert "VOC_AP" in result
    assert result["stamp"]["detections"] == 8 * 7
    assert result["stamp"]["evaluator"].startswith("pycocotools")
    said = spoken(capsys, "val", trained, f"out={tmp_path / 'w'}")
    assert f"next: fusedet predict {trained} " in said
    assert "best.safetensors on val of" in said.replace("\n", "")
    assert "IoU 0.75" in said
    assert "worst images" in said


def test_val_of_perfect_results(capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path) -> None:
    truth = json.loads((scenes / "annotations/instances_val.json").read_text())["annotations"]
    results = tmp_path / "perfect.json"
    results.write_text(
        json.dumps([{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in truth])
    )
    result = run_json(capsys, "val", results, f"data={scenes}")
    assert result["AP"] == pytest.approx(1)
    assert not (Path(result["out"]) / "worst.png").exists(), "there is no image with a mistake"


# -- predict


def test_predict_writes_coco_with_original_sizes_and_ids(
    capsys: pytest.CaptureFixture[str], run_copy: Path, scenes: Path
) -> None:
    said = run_json(capsys, "predict", run_copy, scenes / "val", "test.batch=3", "--score", 0)
    content = json.loads(Path(said["files"]["predictions"]).read_text())
    assert said["images"] == len(content["images"]) == 8
    assert said["detections"] == len(content["annotations"]) == said["shown"]
    for image in content["images"]:
        assert Image.open(image["file_name"]).size == (image["width"], image["height"])
    assert [c["name"] for c in content["categories"]] == list(SHAPES)
    assert [c["id"] for c in content["categories"]] == [1, 2, 3, 4, 5, 6]
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for one in content["annotations"]:
        x, y, w, h = one["bbox"]
        width, height = sizes[one["image_id"]]
        assert min(x, y, w, h) >= -1e-3
        assert x + w <= width + 1e-3
        assert y + h <= height + 1e-3
    assert Path(said["files"]["images"]) == run_copy / "predict" / "images"
    assert len(list((run_copy / "predict" / "images").iterdir())) == 8
    again = run_json(capsys, "predict", run_copy, scenes / "val", "--no-draw")
    assert Path(again["files"]["predictions"]).parent == run_copy / "predict-2", "nothing is overwritten"


def test_predict_takes_files_globs_and_a_list(
    capsys: pytest.CaptureFixture[str], trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = sorted((scenes / "val").iterdir())[:2]
    plain = ["--no-draw", "device=cpu"]
    assert run_json(capsys, "predict", trained / "last.ckpt", one, f"out={tmp_path / 'a'}", *plain)["images"] == 1
    assert (
        run_json(capsys, "predict", trained, f"{scenes}/val/*.jpg", one, f"out={tmp_path / 'b'}", *plain)["images"] == 8
    )
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{one}\n\n{two}\n"))
    said = run_json(capsys, "predict", trained, "-", f"out={tmp_path / 'c'}", "--precision", "bf16", *plain)
    assert said["images"] == 2
    assert "images" not in said["files"]
    text = spoken(capsys, "predict", trained, one, f"out={tmp_path / 'd'}", "test.max_det=3")
    assert "3 detections" in text
    assert f"next: fusedet export {trained} " in text


def test_brackets_in_names_are_no_markup(
    capsys: pytest.CaptureFixture[str], trained: Path, scenes: Path, tmp_path: Path
) -> None:
    out = tmp_path / "[red] [/b] :smile:"
    assert str(out) in spoken(capsys, "predict", trained, sorted((scenes / "val").iterdir())[0], f"out={out}")
    assert cli.run(["predict", str(trained), str(out / "[1, 2].jpg")]) == 2
    assert str(out / "[1, 2].jpg") in capsys.readouterr().err


# -- Python


@pytest.fixture(scope="module")
def model(trained: Path) -> fusedet.Predictor:
    return fusedet.load(trained, device="cpu")


def test_predict_takes_every_kind_of_image(model: fusedet.Predictor, scenes: Path) -> None:
    path = sorted((scenes / "val").iterdir())[0]
    image = Image.open(path).convert("RGB")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    expected = model.predict(path)
    for source in (str(path), path.read_bytes(), image, array, tensor, tensor.float() / 255):
        result = model.predict(source)
        torch.testing.assert_close(result.boxes, expected.boxes)
        assert torch.equal(result.labels, expected.labels)
    assert expected.path == path


def test_predict_returns_one_or_a_list(model: fusedet.Predictor, scenes: Path) -> None:
    paths = sorted((scenes / "val").iterdir())[:3]
    single = [model.predict(path) for path in paths]
    assert all(isinstance(one, Detections) for one in single)
    assert isinstance(model.predict(paths[:1]), list)
    assert model.predict([]) == []
    for batch in (1, 2, 3):
        for a, b in zip(model.predict(paths, batch=batch), single, strict=True):
            torch.testing.assert_close(a.scores, b.scores, atol=1e-4, rtol=1e-3)
            assert a.path == b.path


def test_formats_of_a_prediction(model: fusedet.Predictor, scenes: Path, tmp_path: Path) -> None:
    path = sorted((scenes / "val").iterdir())[0]
    result = model.predict(path)
    assert len(result) > 0
    assert result.to_dict().keys() == {"boxes", "scores", "labels"}
    first = result.to_coco(5)[0]
    x1, y1, x2, y2 = result.boxes[0].tolist()
    assert first["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])
    assert (first["image_id"], first["category_id"]) == (5, int(result.labels[0]) + 1)
    assert result.plot(tmp_path / "drawn.png").size == Image.open(path).size
    assert (tmp_path / "drawn.png").is_file()
    pytest.importorskip("supervision")
    assert result.to_supervision().xyxy.shape == (len(result), 4)


def test_boxes_are_in_original_pixels(model: fusedet.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fake(images: torch.Tensor, sizes: torch.Tensor, padded: bool = True) -> BatchDetections:
        seen.append(tuple(sizes[0].tolist()))
        h, w = sizes[0].tolist()
        boxes = torch.tensor([[[0.0, 0.0, w, h], [w / 4, h / 2, w / 2, h], [0, 0, 0, 0]]])
        return BatchDetections(boxes, torch.tensor([[0.9, 0.8, 0]]), torch.tensor([[0, 1, 0]]), torch.tensor([2]))

    monkeypatch.setattr(model.detector, "detect", fake)
    for height, width in ((40, 50), (400, 500), (64, 96), (200, 77)):
        result = model.predict(np.zeros((height, width, 3), np.uint8))
        expected = [[0, 0, width, height], [width / 4, height / 2, width / 2, height]]
        torch.testing.assert_close(result.boxes, torch.tensor(expected), atol=1e-3, rtol=1e-5)
    assert seen[0] == seen[1], "the network sees images of one shape at one size"


def test_load_takes_overrides_of_the_test(trained: Path, scenes: Path) -> None:
    path = sorted((scenes / "val").iterdir())[0]
    assert len(fusedet.load(trained, "test.max_det=2", device="cpu").predict(path)) == 2
    assert not fusedet.load(trained, "data.antialias=false", device="cpu").transforms[0].antialias
    with pytest.raises(fusedet.InputError, match="changes nothing for a trained model"):
        fusedet.load(trained, "model.neck=fpn")
    with pytest.raises(fusedet.InputError, match=r"did you mean 'test.max_det'"):
        fusedet.load(trained, "test.max_dets=2")


def test_create_model_is_the_command_line(trained: Path) -> None:
    model = fusedet.create_model("retinanet_tiny", *SMALL, num_classes=6)
    sections = {"backbone": {"name": "test_resnet"}, "pyramid": {"channels": 16}, "head": {"convs": 1, "norm": False}}
    same = fusedet.create_model("retinanet_tiny", num_classes=6, model=sections)
    weights, _ = checkpoint.load_weights(trained / "best.safetensors")
    for one in (model, same):
        assert {k: v.shape for k, v in one.state_dict().items()} == {k: v.shape for k, v in weights.items()}


# -- info


def test_multiply_adds_of_a_convolution_by_hand() -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.head = torch.nn.Conv2d(8, 5, 1, bias=False).requires_grad_(False)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.backbone(images.float()))

        def detect(self, images: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
            return self(images)

    result = count_cost(Small(), 32, 64)
    assert result["parts"]["backbone"] == {
        "parameters": 3 * 8 * 9 + 8,
        "trainable": 3 * 8 * 9 + 8,
        "multiply_adds": 16 * 32 * 8 * 3 * 9,
    }
    assert result["parts"]["head"] == {"parameters": 40, "trainable": 0, "multiply_adds": 16 * 32 * 40}
    assert result["multiply_adds"] == 16 * 32 * (8 * 27 + 40)


@pytest.mark.parametrize(("name", "said"), [("mask_rcnn_tiny", True), ("faster_rcnn_tiny", False)])
def test_info_says_how_branches_are_counted(capsys: pytest.CaptureFixture[str], name: str, said: bool) -> None:
    text = " ".join(spoken(capsys, "info", name).split())
    assert ("branches (masks, grids) are those of test.max_det detections" in text) == said
    for part in ("backbone", "neck", "head", "all"):
        assert part in text


def test_info_counts_branches_for_as_many_detections_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    counts = [run_json(capsys, "info", "mask_rcnn_tiny", f"test.max_det={n}")["parts"]["branches"] for n in (100, 10)]
    assert counts[0]["multiply_adds"] == 10 * counts[1]["multiply_adds"] > 0
    assert counts[0]["parameters"] == counts[1]["parameters"]


def test_info(capsys: pytest.CaptureFixture[str], trained: Path) -> None:
    result = run_json(capsys, "info", "retinanet_r50")
    assert result["trainable"] == 37_743_348
    assert result["image"] == [800, 1344]
    assert sum(part["multiply_adds"] for part in result["parts"].values()) == result["multiply_adds"]
    of_model = [setting for setting in SMALL if setting.startswith(("model.", "data.size"))]
    small = run_json(capsys, "info", "retinanet_tiny", *of_model, "--classes", 6)
    of_run = run_json(capsys, "info", trained)
    assert small["parts"] == of_run["parts"], "a run directory is a config too, of its own six classes"
    assert "retinanet_r50" in run_json(capsys, "info")["models"]
    assert "2x_ms" in spoken(capsys, "info")


# -- the other commands


def test_doctor_counts_by_hand(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    boxes = {
        1: [[10, 10, 20, 10], [10, 10, 20, 10], [50, 50, 100, 80]],
        2: [[0, 0, 200, 150], [5, 5, 0, 9], [300, 9, 5, 5]],
        3: [],
    }
    rows = [
        {"id": 10 * i + k, "image_id": i, "category_id": 7, "bbox": box}
        for i, many in boxes.items()
        for k, box in enumerate(many)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "width": 200, "height": 150} for i in (1, 2, 3, 4, 5)]
    content = {
        "images": images,
        "annotations": rows,
        "categories": [{"id": 7, "name": "car"}, {"id": 9, "name": "bus"}],
    }
    for name in ("train.json", "val.json"):
        (tmp_path / name).write_text(json.dumps(content))
    for i, size in (
        (1, (200, 150)),
        (2, (200, 150)),
        (3, (100, 150)),
    ):  # the third is not as stated, the fifth is not there
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    assert cli.run(["doctor", f"data={tmp_path}", "data.size=[75,200]", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert report["train"] == report["val"]
    result = report["train"]["statistics"]
    assert (result["images"], result["empty_images"], result["classes"]) == (5, 3, {"bus": 0, "car": 6})
    # small: 20 x 10 twice, and the two of no area or outside (5 x 5)
    assert result["sizes"] == {"small": 4, "medium": 1, "large": 1}
    assert result["smallest"]["network_side"] == pytest.approx(2.5), "5 pixels in an image shrunk from 150 to 75"
    warnings = " | ".join(report["train"]["warnings"])
    for sentence in (
        "without area: not trained on: 1",
        "wholly outside their image: not trained on: 1",
        "same image: kept: 1",
    ):
        assert sentence in warnings
    assert "no annotation of class bus" in warnings
    assert "larger data.size keeps it visible" in warnings
    wrong_size, damaged, missing = report["train"]["errors"]
    assert "3.png is 100x150 pixels, but its annotation says 200x150" in wrong_size
    assert "4.png" in damaged
    assert "5.png does not exist" in missing
    assert cli.run(["doctor", f"data={tmp_path}", "--no-decode"]) == 0, "annotations alone are fit to train on"
    assert "5 images (3 without annotations), 6 annotations" in capsys.readouterr().out


def test_browse(capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path) -> None:
    target = tmp_path / "images" / "seen.png"
    arguments = ["browse", f"data={scenes}", "data.size=[64,96]"]
    assert run_json(capsys, *arguments, f"out={target}", "--images", 5) == {"image": str(target), "images": 5}
    assert Image.open(target).width > 64
    spoken(capsys, *arguments, f"out={tmp_path / 'b.png'}", "--split", "val", "--images", 99, "--epoch", 3)


def test_convert(capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path) -> None:
    report = run_json(capsys, "convert", "data", scenes, tmp_path / "yolo", "--to", "yolo")
    assert {split: row["images"] for split, row in report["splits"].items()} == {"train": 8, "val": 8}
    before, after = read_dataset(scenes, "val"), read_dataset(tmp_path / "yolo", "val")
    torch.testing.assert_close(after.boxes, before.boxes, atol=1e-6, rtol=0)
    assert "next: fusedet train" in spoken(
        capsys, "convert", "data", tmp_path / "yolo", tmp_path / "voc", "--to", "voc"
    )


def test_config_prints_what_train_would_use(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(spoken(capsys, "config", "retinanet_tiny", *SMALL))
    assert config.load(file) == config.load("retinanet_tiny", SMALL)
    assert spoken(capsys, "config", trained).endswith("out: null\n")


def test_demo(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = spoken(capsys, "demo", "--images", 10, f"out={tmp_path / 'd'}", *SMALL)
    assert "AP by object size" in said
    assert (tmp_path / "d/predictions.png").is_file()
    commands = re.findall(r"fusedet predict (\S+) (\S+)", said)
    assert commands == [(str(tmp_path / "d/run"), str(tmp_path / "d/data/val"))]
    assert f"fusedet export {tmp_path / 'd/run'} " in said
    spoken(capsys, "predict", *commands[0], "--no-draw")


# -- help and exit codes


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    """It would take seconds, and pydantic with the declarations of the settings half of one."""
    heavy = "{'torch', 'numpy', 'pydantic', 'fusedet.config'}"
    code = f"import sys; from fusedet import cli; cli.run({arguments}); print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "set()", done.stderr


def commands() -> dict[str, Any]:
    """All commands by their arguments."""
    root = typer.main.get_command(cli.app)
    convert = root.commands.pop("convert")
    return root.commands | {f"convert {name}": command for name, command in convert.commands.items()}


def test_every_command_has_help_with_two_examples(capsys: pytest.CaptureFixture[str]) -> None:
    overview = spoken(capsys, "-h")
    assert "Exit codes: 0 success; 1 doctor reports errors; 2 wrong input" in " ".join(overview.split())
    assert {arguments.split()[0] for arguments in commands()} >= {
        *("train", "val", "predict", "info", "doctor", "browse"),
        *("compare", "ablate", "cam", "convert", "demo", "config"),
    }
    for arguments, command in commands().items():
        assert f" {arguments.split()[0]} " in overview
        summary, paragraph, *_ = command.help.split("\n\n")
        assert summary.endswith(".")
        assert len(summary) < 60, "it is not cut off in a terminal of 80 columns"
        assert paragraph
        said = " ".join(spoken(capsys, *arguments.split(), "-h").split())
        assert summary in said
        examples = re.findall(r"\$ fusedet (.+?)(?= \$ fusedet| Settings: |$)", said)
        assert len(examples) == 2
        for example in examples:
            assert example.startswith(arguments)
            command.make_context(arguments, shlex.split(example.partition(" > ")[0])[len(arguments.split()) :])


def test_commands_print_the_json_schemas(capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(spoken(capsys, "config", "--schema"))["title"] == "fusedet config"
    assert json.loads(spoken(capsys, "ablate", "--schema"))["title"] == "fusedet ablation table"


def test_train_help_lists_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    said = spoken(capsys, "train", "-h")
    for section, values in config.Config().tree().items():
        for name in values if isinstance(values, dict) else [""]:
            assert f" {section}.{name}".rstrip(".") in said


@pytest.mark.parametrize(
    ("command", "option", "choices"),
    [
        ("val", "evaluator", evaluation.EVALUATORS),
        ("predict", "precision", get_args(Precision)),
        ("predict", "on_bad_image", get_args(OnBadImage)),
        ("convert_data", "to", get_args(DatasetFormat)),
        ("ablate", "launcher", get_args(Launcher)),
    ],
)
def test_choices_are_those_of_the_functions(command: str, option: str, choices: tuple[str, ...]) -> None:
    module = cli.conversions if command.startswith("convert") else cli.commands
    assert get_args(get_type_hints(getattr(module, command))[option]) == choices


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a"), 2),
        (DivergenceError("a"), 3),
        (StorageError("a"), 4),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 4),
        (OSError(errno.EACCES, "Permission denied", "f"), 2),
        (KeyboardInterrupt(), 130),
        (Interrupted("a", signal.SIGTERM), 143),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fusedet.api.train_inputs.resolve_checked_config", fail)
    assert cli.run(["config"]) == code


# -- Python


def test_every_public_name_exists() -> None:
    assert all(getattr(fusedet, name) is not None for name in fusedet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        _ = fusedet.trian


def test_settings_by_keyword_are_those_by_text() -> None:
    sections = {"model": {"neck": [{"type": "fpn"}, "smsl"]}, "train": {"lr": 1e-5, "milestones": (1, 2)}}
    by_keyword = fusedet.resolve_config("retinanet_r50", settings={**sections, "data": Path("a b"), "device": "cpu"})
    texts = ["model.neck=[fpn,smsl]", "train.lr=0.00001", "train.milestones=[1,2]", "data=a b", "device=cpu"]
    assert by_keyword == fusedet.resolve_config("retinanet_r50", texts)
    assert fusedet.resolve_config(by_keyword, ["train.epochs=3"]).train.epochs == 3
    with pytest.raises(InputError, match=r"did you mean 'train.epochs'"):
        fusedet.resolve_config("retinanet_r50", settings={"train": {"epoch": 3}})


def test_validate_in_python_is_val(capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path) -> None:
    said = run_json(capsys, "val", trained, f"out={tmp_path / 'a'}")
    capsys.readouterr()
    result = fusedet.validate(trained, out=tmp_path / "b", test={"batch": 2})
    assert capsys.readouterr() == ("", ""), "functions print nothing"
    assert result.metrics["AP"] == pytest.approx(said["AP"], abs=1e-6)
    assert result.files.keys() == said["files"].keys()
    assert "IoU 0.75" in str(result)
    with pytest.raises(InputError, match="changes nothing for a trained model"):
        fusedet.validate(trained, train={"epochs": 3})


def test_predict_in_python(trained: Path, scenes: Path, tmp_path: Path) -> None:
    result = fusedet.predict(trained, scenes / "val", out=tmp_path / "out", draw=False, data={"workers": 0})
    assert result.counts["images"] == 8
    assert len(json.loads(result.files["predictions"].read_text())["images"]) == 8


def test_check_dataset_in_python(scenes: Path) -> None:
    result = fusedet.check_dataset(data=scenes)
    assert result.ok
    assert "this data can be trained on" in str(result)
