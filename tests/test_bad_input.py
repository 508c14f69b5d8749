"""Wrong input: one sentence on stderr that names what is wrong and what would be right, its exit code, nothing lost."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import save_file

from fusedet import cli
from fusedet.data.synthetic import generate_dataset
from fusedet.engine import checkpoint
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

Capture = pytest.CaptureFixture[str]


def complaint(capsys: Capture, *arguments: object, code: int = 2) -> str:
    """The one line on stderr with which a command fails."""
    capsys.readouterr()
    exit_code = cli.run([str(argument) for argument in arguments])
    result, said = capsys.readouterr()
    assert exit_code == code, said
    assert "results:" not in result, "there is nothing where it points"
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, f"one line, got {said}"
    assert said.endswith("\n")
    return said


def train(data: object, out: Path, *more: object) -> list[str]:
    return ["train", "retinanet_tiny", f"data={data}", f"out={out}", *SMALL, *map(str, more)]


def has(said: str, *texts: object) -> None:
    for text in texts:
        assert str(text) in said


def edited(scenes: Path, tmp_path: Path, edit: Callable[[dict[str, Any], Path], None], split: str = "train") -> Path:
    """Copy the data and edit the json of one split; `edit` also gets the split's image directory."""
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    file = data / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    edit(content, data / split)
    file.write_text(json.dumps(content))
    return data


# -- data that is not there or not data


def test_wrong_path_and_empty_folder(capsys: Capture, tmp_path: Path) -> None:
    out = tmp_path / "out"
    has(complaint(capsys, *train("/no/where", out)), "/no/where does not exist", "a folder, a COCO json or a YOLO yaml")
    (tmp_path / "empty").mkdir()
    for command in (
        train(tmp_path / "empty", out),
        ["doctor", f"data={tmp_path / 'empty'}"],
        ["browse", f"data={tmp_path / 'empty'}"],
    ):
        has(complaint(capsys, *command), tmp_path / "empty", "is an empty folder")
    has(complaint(capsys, "train", "retinanet_tiny"), "add data=PATH")
    has(complaint(capsys, "convert", "data", "/no/where", out, "--to", "yolo"), "/no/where does not exist")
    assert not out.exists()


def test_json_that_is_not_coco(capsys: Capture, tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text('{"images": [], "categories": []}')
    has(complaint(capsys, *train(file, tmp_path / "out")), file, "has no classes")
    assert not (tmp_path / "out").exists()


def test_unknown_category_id(capsys: Capture, scenes: Path, tmp_path: Path) -> None:
    data = edited(scenes, tmp_path, lambda content, _: content["annotations"][0].update(category_id=99))
    has(
        complaint(capsys, *train(data, tmp_path / "out")),
        "annotation 1 has the category id 99",
        "'categories' does not list",
    )
    assert cli.run(["doctor", f"data={data}"]) == 1
    said = capsys.readouterr().out
    has(said, "train: cannot be read", "category id 99", "val: 8 images")


def test_class_names_that_differ(capsys: Capture, scenes: Path, tmp_path: Path) -> None:
    data = edited(scenes, tmp_path, lambda content, _: content["categories"][0].update(name="di[s]c"), "val")
    has(complaint(capsys, *train(data, tmp_path / "out")), "only train has circle", "only val has di[s]c")
    assert cli.run(["doctor", f"data={data}"]) == 1
    has(capsys.readouterr().out, "only train has circle", "only val has di[s]c")
    assert not (tmp_path / "out").exists()


# -- images


def truncated(content: dict[str, Any], images: Path) -> None:
    file = images / content["images"][1]["file_name"]
    file.write_bytes(file.read_bytes()[:400])


def test_an_image_that_cannot_be_read(capsys: Capture, scenes: Path, tmp_path: Path) -> None:
    data, out, right = edited(scenes, tmp_path, truncated), tmp_path / "out", "truncated or damaged"
    has(complaint(capsys, *train(data, out)), data / "train" / "000001.jpg", right)
    assert not out.exists() or (out / "last.ckpt").is_file(), (
        "once the image is mended: the same command, or --resume where steps were done"
    )
    assert cli.run(["doctor", f"data={data}", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert report["val"]["errors"] == []
    (error,) = report["train"]["errors"]
    has(error, data / "train" / "000001.jpg", right)


def test_predict_keeps_earlier_predictions_at_a_bad_image(
    capsys: Capture, trained: Path, scenes: Path, tmp_path: Path
) -> None:
    images = Path(shutil.copytree(scenes / "val", tmp_path / "images"))
    bad = sorted(images.iterdir())[-1]
    bad.write_bytes(b"")
    has(complaint(capsys, "predict", trained, images, f"out={tmp_path / 'out'}"), bad, "not an image")
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 7


# -- boxes and classes


def faulty(content: dict[str, Any], _: Path) -> None:
    rows = content["annotations"]
    rows[0]["bbox"] = [float("nan"), 1, 2, 3]
    rows[1]["bbox"] = [1, 1, -5, 4]
    rows[2]["bbox"] = [5, 5, 0, 4]
    rows[3]["bbox"] = [5000, 5, 4, 4]
    rows[4]["bbox"][0] = -3
    rows.append(rows[5] | {"id": 999})


def test_bad_boxes_are_counted_and_trained_around(capsys: Capture, scenes: Path, tmp_path: Path) -> None:
    data = edited(scenes, tmp_path, faulty)
    sentences = (
        "NaN or infinite coordinates: dropped: 1",
        "negative width or height: dropped: 1",
        "boxes without area: not trained on: 1",
    )
    sentences += ("wholly outside their image: not trained on: 1", "partly outside their image: clipped in training: 1")
    assert cli.run(train(data, tmp_path / "out")) == 0
    has(capsys.readouterr().out, *sentences)
    assert cli.run(["doctor", f"data={data}"]) == 0, "warnings do not stop a training"
    has(capsys.readouterr().out, *sentences, "boxes that duplicate another", "this data can be trained on")


def test_a_class_without_objects_is_reported(capsys: Capture, scenes: Path, tmp_path: Path) -> None:
    def without_squares(content: dict[str, Any], _: Path) -> None:
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 3]

    data = edited(scenes, tmp_path, without_squares)
    assert cli.run(train(data, tmp_path / "out")) == 0
    has(capsys.readouterr().out, "no training annotation of square: it will not be detected")
    assert cli.run(["doctor", f"data={data}"]) == 0
    has(capsys.readouterr().out, "no annotation of class square")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_any_object(capsys: Capture, scenes: Path, tmp_path: Path, split: str) -> None:
    data = edited(scenes, tmp_path, lambda content, _: content["annotations"].clear(), split)
    has(complaint(capsys, *train(data, tmp_path / "out")), f"instances_{split}.json has no objects")
    assert not (tmp_path / "out").exists()
    assert cli.run(["doctor", f"data={data}"]) == 1


def test_val_without_annotations(capsys: Capture, trained: Path, scenes: Path, tmp_path: Path) -> None:
    data = edited(scenes, tmp_path, lambda content, _: content.pop("annotations"), "val")
    has(
        complaint(capsys, "val", trained, f"data={data}", f"out={tmp_path / 'out'}"),
        "has no objects to score by",
        "use fusedet predict",
    )
    assert not (tmp_path / "out").exists()


# -- configs


@pytest.mark.parametrize(
    ("override", "right"),
    [
        ("trian.epochs=3", "did you mean 'train'?"),
        ("model.head.norm=true", "norm=true needs channels in multiples of 32, got 16"),
        ("model.neck=[]", "at least one neck"),
        ("model.roi=faster", "unknown key 'type' of model.roi"),
        ("model.backbone.name=vit_tiny_patch16_224", "a pyramid needs 8, 16 and 32"),
        ("model.pyramid.channels=0", "model.pyramid.channels=0 must be 1 or more"),
        ("train.monitor=APX", "did you mean 'AP'?"),
        ("train.loggers=[tensorbord]", "did you mean 'tensorboard'?"),
        ("train.precision=fp8", "did you mean 'fp32'?"),
        ("train.precision=fp16", "use bf16 or fp32"),
        ("data.size=[10,20]", "a short side of at least 32 pixels"),
        ("data.size=[96,64]", "short <= longest"),
        ("data.flip=2", "0 to 1"),
        ("data.images=/no/where", "/no/where"),
        ("data.val=tset", "has no split 'tset': it has train, val"),
        ("test.score=3", "test.score=3 must be 0 to 1"),
        ("device=gpu", "write auto, cpu, cuda"),
    ],
)
def test_wrong_options(capsys: Capture, scenes: Path, tmp_path: Path, override: str, right: str) -> None:
    said = complaint(capsys, *train(scenes, tmp_path / "out", override))
    has(said, right)
    assert len(said) < 1000, "a user reads it"
    assert not (tmp_path / "out").exists()


def test_unknown_models(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("train", "info", "config"):
        has(complaint(capsys, command, "retinanet_r5"), "unknown config 'retinanet_r5': did you mean 'retinanet_r50'?")
        has(complaint(capsys, command, "mine.yaml"), "there is no config file mine.yaml")
        has(complaint(capsys, command, "retinanet_r18", "retinanet_r50"), "one config at a time")
    for command in ("info", "doctor", "browse"):
        has(complaint(capsys, command, tmp_path), "is not a run directory", f"did you mean data={tmp_path}?")
    said = complaint(capsys, "train")
    has(said, "which config?", "fusedet info lists")
    assert len(said) < 200, "not all of them"
    has(complaint(capsys, "info", "retinanet_tiny", "--classes", 0), "at least one class")
    assert not any(tmp_path.iterdir()), "not even a runs folder"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_missing(capsys: Capture, trained: Path, scenes: Path, tmp_path: Path) -> None:
    for arguments in (train(scenes, tmp_path / "out"), ["val", trained], ["predict", trained, scenes / "val"]):
        has(complaint(capsys, *arguments, "device=cuda"), "device=cuda is not there", "use device=cpu or device=auto")


# -- folders and files of runs


def test_an_output_folder_that_exists(capsys: Capture, trained: Path, scenes: Path, tmp_path: Path) -> None:
    out = tmp_path / "full"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    commands = (["val", trained], ["predict", trained, scenes / "val"], ["demo"])
    for arguments in (train(scenes, out), *([*command, f"out={out}"] for command in commands)):
        has(complaint(capsys, *arguments), f"out={out} exists and is not empty", "choose another")
    has(complaint(capsys, "convert", "data", scenes, out, "--to", "voc"), "nothing is overwritten")
    image = tmp_path / "b.png"
    image.write_text("keep me")
    has(complaint(capsys, "browse", f"data={scenes}", f"out={image}"), "exists: nothing is overwritten")
    assert [p.name for p in out.iterdir()] == ["mine.txt"]
    assert image.read_text() == "keep me"


def test_images_of_the_data_are_numbered(
    capsys: Capture, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        (["--images", "1"], "1 image: "),
        (["--images", "2"], "2 images: "),
        (["--centers"], ""),
        (["--centers"], ""),
    ):
        assert cli.run(["browse", f"data={scenes}", "data.workers=0", *arguments]) == 0
        assert said in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["browse-2.png", "browse.png", "centers-2.png", "centers.png"]


def test_names_are_checked_before_the_data(
    capsys: Capture, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the data were read")

    monkeypatch.setattr("fusedet.api.train_inputs.read_split", never)
    for override in ("model.neck=fpm", "model.backbone.name=resnet51", "model.head.conv=2", "train.monitor=ap"):
        has(complaint(capsys, *train(scenes, tmp_path / "out", override)), "unknown")


def test_a_folder_that_cannot_be_made(capsys: Capture, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    has(complaint(capsys, *train(scenes, tmp_path / "file" / "out")), "out=", "cannot be created")


def test_resuming_what_cannot_be_resumed(capsys: Capture, run_copy: Path, tmp_path: Path) -> None:
    has(complaint(capsys, "train", "retinanet_tiny", f"out={tmp_path / 'none'}", "--resume"), "holds no run to resume")
    (tmp_path / "empty").mkdir()
    has(complaint(capsys, "train", tmp_path / "empty", "--resume"), "is not a run directory")
    before = {p.name: p.read_bytes() for p in run_copy.iterdir()}
    has(
        complaint(capsys, "train", run_copy, "--resume", "train.epochs=2", "train.batch=2"),
        "batches per epoch was 2 and is now 4",
    )
    has(complaint(capsys, "train", run_copy, "--resume", "model.pyramid.channels=8"), "does not fit this model")
    assert {p.name: p.read_bytes() for p in run_copy.iterdir()} == before


def test_a_checkpoint_of_other_classes(capsys: Capture, trained: Path, scenes: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(scenes, tmp_path / "two"))
    for split in ("train", "val"):
        file = data / "annotations" / f"instances_{split}.json"
        content = json.loads(file.read_text())
        content["categories"] = content["categories"][:2]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] <= 2]
        file.write_text(json.dumps(content))
    has(
        complaint(capsys, "val", trained, f"data={data}"),
        "knows the 6 classes circle, triangle",
        "has the 2 classes",
        "same class names",
    )


def test_files_that_are_no_checkpoints(capsys: Capture, run_copy: Path, scenes: Path, tmp_path: Path) -> None:
    has(complaint(capsys, "predict", "/no/where", scenes / "val"), "no checkpoint exists at /no/where")
    has(complaint(capsys, "predict", "nope", scenes / "val"), "no checkpoint exists at nope")
    has(complaint(capsys, "val", "last.ckpt"), "no checkpoint exists at last.ckpt")
    for command in (["predict", "retinanet_r5O", scenes / "val"], ["val", "retinanet_r5O"], ["app", "retinanet_r5O"]):
        said = complaint(capsys, *command)
        has(
            said, "unknown run, checkpoint or published weights 'retinanet_r5O': did you mean 'mmdet/retinanet_r50_fpn_"
        )
    (tmp_path / "empty").mkdir()
    has(complaint(capsys, "val", tmp_path / "empty"), "holds no checkpoint: best.safetensors or last.ckpt is missing")
    strange = tmp_path / "strange.safetensors"
    save_file({"a": torch.zeros(3)}, strange)
    has(complaint(capsys, "val", strange), strange, "is not a fusedet checkpoint", "config")
    has(complaint(capsys, "predict", run_copy / "config.yaml", scenes / "val"), "is not a fusedet checkpoint")


def test_predict_without_images(capsys: Capture, trained: Path, scenes: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    has(complaint(capsys, "predict", trained), "which images?")
    has(
        complaint(capsys, "predict", trained, "/no/where.jpg"),
        "there is no image, video, folder or pattern /no/where.jpg",
    )
    has(complaint(capsys, "predict", trained, tmp_path / "empty"), "matches no image")
    has(complaint(capsys, "predict", trained, f"{tmp_path}/*.xyz"), "*.xyz matches no image")
    capsys.readouterr()
    assert cli.run(["predict", str(trained), str(scenes / "val"), "--precision", "fp16"]) == 2
    has(" ".join(capsys.readouterr().err.replace("│", " ").split()), "'fp16' is not one of 'fp32', 'bf16'")
    for command, more in (("predict", "data.workers, "), ("cam", "")):
        said = complaint(capsys, command, trained, scenes / "val", "model.neck=fpn")
        settable = f"what can be set here is test, data.size, data.antialias, data.range, {more}device, out"
        has(said, f"changes nothing for a trained model: {settable}")


def test_an_empty_word_is_not_the_current_folder(
    capsys: Capture, trained: Path, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell makes one of "$IMAGES" where the variable is not set."""
    image, out = next((scenes / "val").iterdir()), f"out={tmp_path / 'made'}"
    monkeypatch.chdir(scenes)
    for command in ("predict", "cam"):
        has(complaint(capsys, command, trained, "", out), "folder or pattern ''")
    has(complaint(capsys, "cam", "", image, out), "no checkpoint")
    has(complaint(capsys, "cam", trained, image, "--beside", "", out), "no checkpoint")
    has(complaint(capsys, "val", trained, "data=", out), "add data=PATH")
    assert not (tmp_path / "made").exists()


def test_results_that_do_not_fit(capsys: Capture, trained: Path, scenes: Path, tmp_path: Path) -> None:
    results = trained / "val.bbox.json"
    has(complaint(capsys, "val", results), "add data=PATH")
    has(complaint(capsys, "val", "/no/where.json", f"data={scenes}"), "/no/where.json")
    has(complaint(capsys, "val", results, f"data={scenes}", "--split", "train"), "image_id", "the same data")
    has(
        complaint(capsys, "val", scenes / "annotations" / "instances_val.json", f"data={scenes}"),
        "must hold a list of results",
    )
    has(complaint(capsys, "val", trained, "--split", "tset"), "has no split 'tset'")
    assert cli.run(["val", str(trained), "--evaluator", "cocoeval"]) == 2
    has(" ".join(capsys.readouterr().err.replace("│", " ").split()), "'cocoeval' is not one of 'fusedet'")
    has(complaint(capsys, "val", trained, "stray"), "stray is one too many", "settings are written key=value")
    has(complaint(capsys, "val", trained, "train.epochs=3"), "changes nothing for a trained model")
    (tmp_path / "bad.json").write_text('[{"image_id": 9, "category_id": 1, "bbox": [1, 2, 3, 4]}]')
    has(complaint(capsys, "val", tmp_path / "bad.json", f"data={scenes}"), "result 0 lacks 'score'")


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ("val RUN --resamples 50", "val without --tiles-help does not use --resamples: leave out --resamples"),
        ("ablate necks --dry-run --budget xx --parallel 2", "--dry-run does not use --budget and --parallel"),
        ("ablate necks --power --launcher slurm", "--power does not use --launcher"),
        ("ablate --schema --json", "--schema does not use --json"),
        ("info --classes 3", "classes=3 belongs to a config"),
    ],
)
def test_options_that_a_mode_does_not_use(capsys: Capture, trained: Path, arguments: str, refused: str) -> None:
    has(
        complaint(capsys, *(str(trained) if argument == "RUN" else argument for argument in arguments.split())), refused
    )


@pytest.mark.parametrize("arguments", ["train retinanet_tiny data=DATA", "ablate necks data=DATA out=OUT"])
def test_a_wrong_number_of_processes(
    capsys: Capture, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    given = arguments.replace("DATA", str(scenes)).replace("OUT", str(tmp_path / "out"))
    has(complaint(capsys, *given.split()), "WORLD_SIZE=x", "must be whole numbers with RANK below WORLD_SIZE")
    assert not (tmp_path / "out").exists()


# -- pretrained weights


def test_weights_that_cannot_be_fetched(
    capsys: Capture, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    said = complaint(capsys, *train(scenes, tmp_path / "out", "model.backbone.pretrained=true"))
    has(said, "test_resnet", "model.backbone.weights=FILE", "model.backbone.pretrained=false")
    assert not (tmp_path / "out").exists()


def test_local_files_that_are_no_weights(capsys: Capture, scenes: Path, tmp_path: Path) -> None:
    def refuse(file: Path) -> str:
        return complaint(capsys, *train(scenes, tmp_path / "out", f"model.backbone.weights={file}"))

    file = tmp_path / "w.pth"
    has(refuse(file), file, "there is no such file")
    file.write_text("hello")
    has(refuse(file), file, "cannot be read as a state dict")
    torch.save([1, 2], file)
    has(refuse(file), file, "cannot be read as a state dict")
    torch.save({"a": torch.zeros(3)}, file)
    has(refuse(file), file, "lacks", "of 'test_resnet': conv1.0.weight, conv1.1.weight", "holds a:", "timm's names")
    whole = timm.create_model("test_resnet").state_dict()
    partial = {key: torch.rand(value.shape) for key, value in whole.items() if key != "bn1.running_var"}
    torch.save(partial, file)
    has(refuse(file), file, "lacks 1 of the", "of 'test_resnet': bn1.running_var;")
    torch.save(whole | {"bn1.weight": torch.ones(1)}, file)
    has(refuse(file), file, "holds no weights of 'test_resnet'", "size mismatch")
    assert not (tmp_path / "out").exists()


# -- while training


def test_a_full_disk_leaves_the_previous_checkpoint_whole(capsys: Capture, run_copy: Path) -> None:
    resource = pytest.importorskip("resource")
    before = (run_copy / "last.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # no file can grow beyond it, as on a full disk
    try:
        said = complaint(capsys, "train", run_copy, "--resume", "train.epochs=2", code=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    has(said, "cannot be written", "what was there before is still whole")
    assert (run_copy / "last.ckpt").read_bytes() == before
    assert not list(run_copy.glob(".*")), "no half file is left"
    assert cli.run(["train", str(run_copy), "--resume", "train.epochs=2"]) == 0


def test_a_full_disk_elsewhere(capsys: Capture, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "worst.png")

    monkeypatch.setattr("fusedet.visualization.plot_precision_recall", full)
    has(complaint(capsys, "val", trained, f"out={tmp_path / 'out'}", code=4), "worst.png: No space left on device")


def test_a_loss_that_is_not_finite(capsys: Capture, run_copy: Path) -> None:
    before = checkpoint.load(run_copy / "last.ckpt")
    arguments = ["train", run_copy, "--resume", "train.epochs=9", "train.lr=1e30", "train.clip_norm=null"]
    said = complaint(capsys, *arguments, code=3)
    has(said, "is nan at step 4, images", "lower the learning rate", "what was saved before is still whole")
    assert "loss_cls" in said or "loss_box" in said
    after = checkpoint.load(run_copy / "last.ckpt")
    assert all(torch.equal(after["model"][k], before["model"][k]) for k in before["model"])
    assert cli.run(["train", str(run_copy), "--resume"]) == 0, "it can go on with a better rate"


def test_generated_data_is_never_overwritten(scenes: Path, tmp_path: Path) -> None:
    shutil.copytree(scenes, tmp_path / "data")
    with pytest.raises(ValueError, match="give a new or empty folder"):
        generate_dataset(tmp_path / "data", images=10)
