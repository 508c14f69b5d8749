"""Published weights by name: listed, fetched from a mirror, checked, converted once, and taken by every command."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import detection, get_weight

import fusedet
from file_server import serve
from fusedet import cli, config, interop
from fusedet.api import weights_cache
from fusedet.api.load_model import weights_file
from fusedet.api.settings import resolve_config, training_config
from fusedet.api.starting_weights import adapt_class_rows, match_class_names
from fusedet.api.train_inputs import make_detector
from fusedet.data.shape_drawing import SHAPES
from fusedet.data.splits import read_split
from fusedet.engine import checkpoint
from fusedet.errors import InputError
from fusedet.interop.published_weights import PublishedWeights, is_published_name, list_published_weights
from fusedet.models.detectors import build_detector
from test_interop_torchvision import fill_weights, make_dense_backbone

pytestmark = pytest.mark.usefixtures("unrendered")
NAME = "torchvision/fcos_resnet50_fpn"
Publish = Callable[[bytes], PublishedWeights]
RENAMED = "data.rename={" + ", ".join(f"{own}: class_{i}" for i, own in enumerate(SHAPES)) + "}"
"""Names the generated classes as the small FCOS does."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no mirror."""
    monkeypatch.setenv("FUSEDET_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FUSEDET_WEIGHTS_MIRROR", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache" / "weights"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a small FCOS of torchvision with random weights for six classes."""
    file = tmp_path_factory.mktemp("torchvision") / "model.pth"
    torch.manual_seed(0)
    torch.save(fill_weights(detection.FCOS(make_dense_backbone(), 6)).state_dict(), file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def converted(published: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as the cache keeps them."""
    folder = tmp_path_factory.mktemp("converted")
    (folder / "model.pth").write_bytes(published)
    weights_cache.save_converted(folder / "model.safetensors", interop.convert_checkpoint(folder / "model.pth"))
    return folder / "model.safetensors"


@pytest.fixture
def fetched(publish: Publish, published: bytes, converted: Path, cache: Path) -> PublishedWeights:
    """The small FCOS under NAME, in the cache."""
    weights = publish(published)
    target = weights_cache.cached_checkpoint(weights)
    target.parent.mkdir(parents=True)
    os.link(converted, target)
    return weights


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Let the content of a file be what is published under NAME: its file name ends with the content's hash."""

    def replace(content: bytes, name: str = NAME, **fields: Any) -> PublishedWeights:
        sha256 = hashlib.sha256(content).hexdigest()[:8]
        fields = {"address": f"http://127.0.0.1:9/models/fcos-{sha256}.pth"} | fields
        weights = dataclasses.replace(list_published_weights()[name], **fields)
        monkeypatch.setitem(list_published_weights(), name, weights)
        return weights

    return replace


@pytest.fixture
def mirrored(publish: Publish, published: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedWeights:
    """The small FCOS under NAME, in the folder of a mirror."""
    weights = publish(published)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / weights.file).write_bytes(published)
    monkeypatch.setenv("FUSEDET_WEIGHTS_MIRROR", str(tmp_path / "mirror"))
    return weights


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Print what a command line that fails prints; it is one line."""
    capsys.readouterr()
    assert cli.run(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


# -- the list


def test_the_list_is_that_of_torchvision() -> None:
    listed = [weights for weights in list_published_weights().values() if weights.name.startswith("torchvision/")]
    assert {weights.name.partition("/")[2] for weights in listed} == {
        f"{model}_resnet50_fpn{version}"
        for model in ("retinanet", "fasterrcnn", "maskrcnn", "fcos")
        for version in ("", "_v2")
    } - {"fcos_resnet50_fpn_v2"}
    mask = next(weights for weights in listed if weights.name == "torchvision/maskrcnn_resnet50_fpn_v2")
    theirs = get_weight("MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1")
    assert mask.address == theirs.url
    assert (mask.box_ap, mask.mask_ap) == (47.4, 41.8)
    assert (mask.backbone, mask.dataset, mask.sha256) == ("resnet50", "coco", "73cbd019")


@pytest.mark.slow
def test_what_torchvision_lists_and_we_convert_is_listed(tmp_path: Path) -> None:
    from torchvision.models import get_model, list_models

    for name in list_models(module=detection):
        torch.save(get_model(name, weights=None, weights_backbone=None).state_dict(), tmp_path / "model.pth")
        try:
            fusedet.convert_weights(tmp_path / "model.pth", tmp_path / f"{name}.safetensors")
        except InputError:
            assert f"torchvision/{name}" not in list_published_weights()
        else:
            assert f"torchvision/{name}" in list_published_weights()


def test_the_list_of_mmdetection() -> None:
    listed = [weights for weights in list_published_weights().values() if weights.name.startswith("mmdet/")]
    assert len(listed) >= 165
    assert len({weights.file for weights in listed}) == len(listed), "a mirror holds all files in one folder"
    assert all(len(weights.sha256) == 8 and int(weights.sha256, 16) >= 0 for weights in listed)
    vfnet = list_published_weights()["mmdet/vfnet_r50_fpn_ms-2x_coco"]
    assert (vfnet.family, vfnet.backbone, vfnet.box_ap, vfnet.license) == ("vfnet", "resnet50", 44.8, "Apache-2.0")
    points = list_published_weights()["mmdet/reppoints-moment_r50_fpn-gn_head-gn_1x_coco"]
    assert "gn-neck%2Bhead" in points.address
    assert "gn-neck+head" in points.file


def test_weights_command(capsys: pytest.CaptureFixture[str], mirrored: PublishedWeights, cache: Path) -> None:
    def run(*arguments: str) -> Any:
        capsys.readouterr()
        assert cli.run(["weights", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    rows = run("VFNet")["weights"]
    assert {row["family"] for row in rows} == {"vfnet"}
    assert {"name", "backbone", "box_ap", "mask_ap", "megabytes", "license", "address", "is_cached"} <= rows[0].keys()
    assert len(run()["weights"]) == len(list_published_weights())
    target = cache / "torchvision" / "fcos_resnet50_fpn.safetensors"
    before = run("where", NAME)
    assert (before["file"], before["is_cached"]) == (str(target), False)
    assert Path(before["address"]).parent.name == "mirror"
    assert run("get", NAME) | {"is_cached": False} == before
    assert target.is_file()
    assert [row["is_cached"] for row in run("fcos_resnet50")["weights"]] == [True]
    assert cli.run(["weights", "where", NAME]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert "families are " in error_of(capsys, "weights", "yolo9000")
    assert "weights get takes one name" in error_of(capsys, "weights", "get")
    assert "one too many" in error_of(capsys, "weights", "fcos", "vfnet")


def test_unknown_names_have_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        ["predict", __file__],
        ["val", "data=x"],
        ["export", "--format", "torch"],
        ["train", "data=x"],
        ["info"],
    ):
        command, *rest = arguments
        error = error_of(capsys, command, "torchvision/fasterrcnn_resnet50_fpnv2", *rest)
        assert "did you mean 'torchvision/fasterrcnn_resnet50_fpn_v2'?" in error


def test_a_source_that_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fasterrcnn_resnet50_fpn_v2", "torchvison/fasterrcnn_resnet50_fpn_v2"):
        for arguments in (["train", name, "data=x"], ["export", name, "--format", "torch"], ["config", name]):
            assert "the published weights 'torchvision/fasterrcnn_resnet50_fpn_v2'?" in error_of(capsys, *arguments)


def test_a_file_of_that_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_published_name(Path("mmdet/run"))
    (tmp_path / "mmdet" / "run").mkdir(parents=True)
    assert not is_published_name("mmdet/run")
    with pytest.raises(InputError, match="holds no checkpoint"):
        weights_file("mmdet/run")


# -- the cache


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert weights_cache.cache_folder() == tmp_path / "cache" / "weights"
    monkeypatch.delenv("FUSEDET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert weights_cache.cache_folder() == tmp_path / "xdg" / "fusedet" / "weights"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert weights_cache.cache_folder() == tmp_path / "home" / ".cache" / "fusedet" / "weights"


def test_two_at_a_time_fetch_once(
    publish: Publish, published: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = publish(published)
    files: list[Path] = []
    with serve(published) as server:
        monkeypatch.setenv("FUSEDET_WEIGHTS_MIRROR", f"{server.address}/broken/")
        threads = [threading.Thread(target=lambda: files.append(weights_file(NAME))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [asked is None for _, asked in server.requests] == [True, False], "one file, continued after a break"
        assert server.requests[0][0] == "broken"
    assert files == [cache / "torchvision" / "fcos_resnet50_fpn.safetensors"] * 2
    assert weights_file(NAME) == files[0], "without a server"
    left = {path.name for path in files[0].parent.iterdir()}
    assert left - {"fcos_resnet50_fpn.safetensors.lock"} == {"fcos_resnet50_fpn.safetensors"}, weights.file


PROCESS = """
import dataclasses, sys
from fusedet.api.load_model import weights_file
from fusedet.interop.published_weights import list_published_weights
name, address = sys.argv[1:]
known = list_published_weights()
known[name] = dataclasses.replace(known[name], address=address)
print(weights_file(name))
"""


@pytest.mark.slow
def test_two_processes_fetch_once(publish: Publish, published: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = publish(published)
    with serve(published) as server:
        monkeypatch.setenv("FUSEDET_WEIGHTS_MIRROR", server.url("slow", ""))
        command = [sys.executable, "-c", PROCESS, NAME, weights.address]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        written = [process.communicate(timeout=300)[0].strip() for process in running]
        assert [process.returncode for process in running] == [0, 0]
        assert len(server.requests) == 1
    assert written == [str(weights_cache.cached_checkpoint(weights))] * 2


def test_put_by_hand(publish: Publish, published: bytes, cache: Path) -> None:
    weights = publish(published)
    place = fusedet.locate_weights(NAME).by_hand
    assert place == cache / weights.file
    place.parent.mkdir(parents=True)
    place.write_bytes(b"cut short")
    with pytest.raises(InputError, match=f"{weights.file} is not the file of {NAME}: its SHA-256 does not begin"):
        fusedet.get_weights(NAME)
    place.write_bytes(published)
    assert fusedet.get_weights(NAME).is_cached
    assert place.is_file(), "what a user put there stays"


def test_without_network(publish: Publish, capsys: pytest.CaptureFixture[str], cache: Path) -> None:
    weights = publish(b"")
    error = error_of(capsys, "export", NAME, "--format", "torch")
    assert f"{NAME} could not be fetched from {weights.address} (" in error
    assert f"put the file at {cache / weights.file}" in error
    assert "set FUSEDET_WEIGHTS_MIRROR to a URL or folder that holds" in error


def test_mirror_mistakes(
    publish: Publish, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = publish(b"")
    for wrong in (tmp_path / "absent", "ftp://127.0.0.1"):
        monkeypatch.setenv("FUSEDET_WEIGHTS_MIRROR", str(wrong))
        for action in ("get", "where"):
            error = error_of(capsys, "weights", action, NAME)
            assert f"FUSEDET_WEIGHTS_MIRROR={wrong} is neither a folder nor an address" in error
    monkeypatch.setenv("FUSEDET_WEIGHTS_MIRROR", str(tmp_path))
    assert f"has no {weights.file}, the file of {NAME}" in error_of(capsys, "weights", "get", NAME)
    (tmp_path / weights.file).write_bytes(b"another")
    assert "is not the file of" in error_of(capsys, "weights", "get", NAME)


def test_a_cache_that_cannot_be_written(
    mirrored: PublishedWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSEDET_CACHE", str(tmp_path / "file"))
    assert "cannot be written (Not a directory): set FUSEDET_CACHE to" in error_of(capsys, "weights", "get", NAME)


class Code:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


def test_code_in_a_file_is_never_run(publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": Code(tmp_path / "was_run")}, tmp_path / "code.pth")
    content = (tmp_path / "code.pth").read_bytes()
    publish(content)
    with serve(content) as server:
        monkeypatch.setenv("FUSEDET_WEIGHTS_MIRROR", server.url("whole", ""))
        with pytest.raises(InputError, match=r"holds posix\.system, which no checkpoint of weights needs: it is not"):
            fusedet.get_weights(NAME)
    assert not (tmp_path / "was_run").exists()
    assert not fusedet.locate_weights(NAME).is_cached


# -- a name in the place of a run


def test_predict_val_and_compare(
    fetched: PublishedWeights,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    small = ["data.size=[64,96]", "test.score=0.001", "device=cpu", "data.workers=0"]
    image = next((scenes / "val").glob("*.jpg"))
    loaded = fusedet.load(NAME, small[0], device="cpu")
    assert loaded.names == tuple(f"class_{i}" for i in range(6))
    folder = tmp_path / "runs" / "torchvision" / "fcos_resnet50_fpn"
    assert cli.run(["predict", NAME, str(image), *small, "--no-draw"]) == 0
    assert json.loads((folder / "predict" / "predictions.json").read_text())["annotations"]
    built = build_detector(resolve_config(NAME), 6)
    info = fusedet.info(NAME, data={"size": [64, 96]})
    assert (info.classes, info.cost["parameters"]) == (6, sum(p.numel() for p in built.parameters()))
    assert loaded.source == weights_file(NAME)
    data = [f"data={scenes}", RENAMED]
    error = error_of(capsys, "compare", NAME, NAME, *data)
    assert f"make them with fusedet val {NAME} --split val data=PATH" in error
    assert cli.run(["val", NAME, *data, *small]) == 0
    assert json.loads((folder / "val-val" / "metrics.json").read_text())["stamp"]["images"] == 8
    assert cli.run(["compare", NAME, NAME, *data, "--resamples", "40"]) == 0
    assert (folder / "compare-fcos_resnet50_fpn" / "compare.json").is_file()


@pytest.mark.parametrize("resume", [False, True])
def test_config_of_a_training(fetched: PublishedWeights, tmp_path: Path, resume: bool) -> None:
    out = tmp_path / "run"
    texts = ["data=coco", *([f"out={out}"] if resume else []), "train.epochs=7", "train.batch=4"]
    if resume:
        out.mkdir()
        (out / "config.yaml").write_text(resolve_config(NAME, texts).to_yaml())
    options = training_config(NAME, texts, {}, resume, trust=False)
    assert options.out == (str(out) if resume else str(Path("runs") / "fcos_resnet50_fpn"))
    assert (options.train.weights, options.train.schedule) == (NAME, "finetune")
    assert (options.train.lr, options.train.warmup_steps, options.train.epochs) == (0.005, 50, 7)
    for text in ("train.schedule=2x", "train={schedule: 2x}"):
        of_2x = resolve_config(NAME, [text]).train
        assert (of_2x.schedule, of_2x.lr, of_2x.warmup_steps) == ("2x", 0.01, 500), "the detector's own rate"
    stored = resolve_config(NAME).model
    assert options.model == stored
    assert (stored.backbone["frozen_stages"], stored.backbone["pretrained"]) == (1, False)


@pytest.mark.parametrize(
    ("arguments", "text"), [(["data=nowhere"], "nowhere does not exist"), ([], "no data: add data=PATH")]
)
def test_nothing_is_fetched_for_a_training_without_data(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fusedet.api.settings.weights_file", lambda *_: pytest.fail("fetched"))
    assert text in error_of(capsys, "train", "torchvision/retinanet_resnet50_fpn", *arguments)


def test_a_training_starts_from_the_weights(fetched: PublishedWeights, scenes: Path) -> None:
    options = training_config(
        NAME, [f"data={scenes}", "data.rename={circle: Class-3, square: class_0s}"], {}, False, False
    )
    dataset = read_split(options.data, "train")
    notes: list[str] = []
    detector = make_detector(options, dataset, notes.append, resume=False)
    before, _ = checkpoint.load_weights(weights_file(NAME))
    after = detector.state_dict()
    kept = {dataset.names.index("Class-3"): 3, dataset.names.index("class_0s"): 0}
    for key, value in before.items():
        if not key.startswith("head.cls."):
            assert torch.equal(after[key], value), key
    for new, old in kept.items():
        assert torch.equal(after["head.cls.weight"][new], before["head.cls.weight"][old])
    prior = -torch.tensor((1 - 0.01) / 0.01).log()
    for new in set(range(len(dataset.names))) - kept.keys():
        torch.testing.assert_close(after["head.cls.bias"][new], prior)
    assert len(notes) == 1
    assert f"{NAME} has the 6 classes class_0, class_1" in notes[0]
    assert "Class-3 (there class_3)" in notes[0]
    assert "class_0s (there class_0)" in notes[0]
    assert "start from initial values (head.cls.weight, head.cls.bias)" in notes[0]


# -- classes by name


@pytest.mark.parametrize(
    ("name", "known", "place"),
    [
        ("car", ["bus", "car"], 1),
        ("Cars", ["bus", "car"], 1),
        ("buses", ["car", "bus"], 1),
        ("bus", ["car", "buses"], 1),
        ("Berries", ["berry"], 0),
        ("traffic-light", ["traffic light"], 0),
        ("traffic_lights", ["Traffic Light"], 0),
        ("cars", ["car", "cars"], 1),
        ("car", ["Car", "car"], 1),
        ("glass", ["glas"], None),
        ("scar", ["car"], None),
        ("unicorn", ["horse"], None),
    ],
)
def test_equal_class_names(name: str, known: list[str], place: int | None) -> None:
    assert match_class_names([name], known) == ({} if place is None else {0: place})


@pytest.mark.parametrize("name", ["retinanet_tiny", "faster_rcnn_tiny", "mask_rcnn_tiny", "vfnet_tiny"])
def test_rows_of_classes(name: str) -> None:
    """With three classes reordered to [2, new, 0], every score and delta of a kept class is what it was."""
    options = config.load(name, ["model.backbone.pretrained=false", "model.backbone.name=lcnet_050"])
    old, new = build_detector(options, 3), build_detector(options, 4)
    for value in old.state_dict().values():
        if value.is_floating_point():
            value.uniform_(-1, 1)
    adapted, keys = adapt_class_rows(old.state_dict(), new.state_dict(), options, 3, {0: 2, 2: 0})
    assert keys
    for key in keys:
        before, after, fresh = old.state_dict()[key], adapted[key], new.state_dict()[key]
        if ".reg." in key:  # K classes of 4 deltas
            before, after, fresh = (value.unflatten(0, (-1, 4)) for value in (before, after, fresh))
        elif name == "retinanet_tiny":  # 9 anchors of K classes
            before, after, fresh = (value.unflatten(0, (9, -1)).transpose(0, 1) for value in (before, after, fresh))
        assert torch.equal(after[0], before[2])
        assert torch.equal(after[2], before[0])
        assert torch.equal(after[1], fresh[1])
        assert torch.equal(after[3], fresh[3])
        if name != "vfnet_tiny" and len(after) == 5:
            assert torch.equal(after[4], before[3]), "background"
    new.load_state_dict(adapted)


# -- the whole way, with models of real size


@pytest.fixture
def whole(request: pytest.FixtureRequest, publish: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A published name whose file lies in a mirror, with random weights."""
    name, make = request.param
    torch.save(make(request), tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    weights = publish(content, name)
    (tmp_path / "mirror").mkdir()
    (tmp_path / "model.pth").rename(tmp_path / "mirror" / weights.file)
    monkeypatch.setenv("FUSEDET_WEIGHTS_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.chdir(tmp_path)
    return name


def make_torchvision(name: str) -> Callable[[Any], Any]:
    def make(_: Any) -> Any:
        return fill_weights(getattr(detection, name)(weights=None, weights_backbone=None)).state_dict()

    return make


def make_mmdetection(request: pytest.FixtureRequest) -> Any:
    """Weights by names and shapes of MMDetection's own RetinaNet with ResNet-18."""
    import runpy

    import numpy as np

    folder = request.getfixturevalue("shared") / "checkpoints"
    spec = json.loads((folder / "retinanet_r18.json").read_text())
    fill = runpy.run_path(str(folder / "fill_weights.py"))["fill"]
    state = {k: torch.from_numpy(np.array(fill(k, tuple(shape), spec["stem"]))) for k, shape in spec["keys"].items()}
    return {"state_dict": state, "meta": {"mmdet_version": "1.0.0"}}


TORCHVISION = ("fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
REAL = [
    *((f"torchvision/{name}", make_torchvision(name), pytest.mark.soak) for name in TORCHVISION),
    ("mmdet/retinanet_r18_fpn_1x_coco", make_mmdetection, ()),
]


@pytest.fixture
def few_images(shared: Path, tmp_path: Path) -> Path:
    """Four images of each split of the reference data."""
    source, folder = shared / "data" / "coco_tiny", tmp_path / "few"
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        (folder / split).mkdir()
        data = json.loads((source / "annotations" / f"instances_{split}.json").read_text())
        data["images"] = data["images"][:4]
        kept = {image["id"] for image in data["images"]}
        data["annotations"] = [row for row in data["annotations"] if row["image_id"] in kept]
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(data))
        for image in data["images"]:
            shutil.copy(source / split / image["file_name"], folder / split)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "whole", [pytest.param((name, make), id=name, marks=marks) for name, make, marks in REAL], indirect=True
)
def test_every_command(whole: str, few_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    coco = f"data={few_images}"
    small = ["data.size=[64,96]", "device=cpu"]
    image = str(next((few_images / "val2017").glob("*.jpg")))
    results = tmp_path / "runs" / whole
    assert len(fusedet.load(whole, small[0], device="cpu").names) == 80
    assert cli.run(["predict", whole, image, *small, "--no-draw"]) == 0
    assert cli.run(["val", whole, coco, *small]) == 0
    assert json.loads((results / "val-val" / "metrics.json").read_text())["stamp"]["images"] == 4
    assert cli.run(["compare", whole, whole, coco, "--resamples", "40"]) == 0
    brief = ["--format", "eager", "--size", "64,96", "--batch", "1", "--runs", "1"]
    assert cli.run(["benchmark", whole, *brief]) == 0
    assert json.loads((results / "benchmark" / "benchmark.json").read_text())["rows"][0]["model"] == whole
    assert cli.run(["cam", whole, image, *small, "--score", "0", "--class", "person"]) == 0
    if not whole.endswith("_v2"):  # an export takes as long as all other commands
        assert cli.run(["export", whole, "--format", "torch", "--size", "64,96", "test.score=0.001"]) == 0
        assert json.loads((results / "export" / "model.json").read_text())["model"]["license"]["weights"]
    fast = [*small, "train.batch=4", "train.epochs=1", "data.workers=0", "train.validate_every=1"]
    assert cli.run(["train", whole, coco, *fast]) == 0
    trained = tmp_path / "runs" / whole.partition("/")[2]
    assert config.load(trained / "config.yaml").train.weights == whole
    if whole.startswith("mmdet/"):
        assert cli.run(["train", "retinanet_r18", coco, *fast, f"train.weights={whole}", "out=other"]) == 0
