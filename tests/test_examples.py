"""Every file of examples/ does what its first lines say."""

import io
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn

from exporting import NAMES, ONE_LEVEL, save_run
from fusedet.config import load as load_config
from fusedet.data.readers.auto import read_dataset
from fusedet.models.necks import FPN, MSEFPN

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_readme_lists_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text()
    assert not [path.name for path in EXAMPLES.iterdir() if path.name != "README.md" and f"]({path.name}" not in text]


def test_neck_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own tests pass with its folder in the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "gated_neck"))
    tests = runpy.run_path(str(EXAMPLES / "gated_neck/tests/test_gated_neck.py"))
    cases = [function for name, function in tests.items() if name.startswith("test_")]
    assert len(cases) == 4
    for case in cases:
        case()


@pytest.mark.slow
def test_plain_training(scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A step lowers the loss of the images that it sees; the evaluation counts every object of the split."""
    parts = runpy.run_path(str(EXAMPLES / "plain_training.py"))
    parts["train"].__globals__.update(SHORT=64, LONG=64, BATCH=8)
    data, val = read_dataset(scenes, "train"), read_dataset(scenes, "val")
    detector = parts["build_detector"](len(data.names), "lcnet_050")
    before = [p.detach().clone() for p in detector.parameters()]
    parts["train"](detector, data, epochs=3)
    first, *_, last = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert last < first
    assert any(not torch.equal(b, p) for b, p in zip(before, detector.parameters()))
    metrics = parts["evaluate"](detector, val)
    assert 0 <= metrics["AP"] <= 1
    assert sum(row["objects"] for row in metrics["classes"]) == int((~val.ignore).sum())


@pytest.mark.parametrize(("name", "limit"), [("gated_neck/gated_neck.py", 40), ("plain_training.py", 60)])
def test_examples_are_short(name: str, limit: int) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= limit


def tiny_torchvision(make: Any) -> Any:
    return make(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64).eval()


@pytest.mark.slow
@pytest.mark.parametrize("make", [fasterrcnn_resnet50_fpn, retinanet_resnet50_fpn])
def test_torchvision_fpn_is_the_same(make: Any) -> None:
    """fusedet's FPN with torchvision's weights gives torchvision's pyramid."""
    example = runpy.run_path(str(EXAMPLES / "torchvision_necks.py"))
    detector = tiny_torchvision(make)
    fpn, images = detector.backbone.fpn, torch.rand(1, 3, 64, 64)
    expected = detector.backbone(images)
    example["replace_fpn"](detector, FPN)
    neck = detector.backbone.fpn.neck
    for mine, theirs in ((neck.lateral, fpn.inner_blocks), (neck.output, fpn.layer_blocks)):
        for layer, block in zip(mine, theirs, strict=True):
            layer.load_state_dict(block[0].state_dict())
    for layer, name in zip(neck.top.convs, ("p6", "p7")):
        layer.load_state_dict(getattr(fpn.extra_blocks, name).state_dict())
    pyramid = detector.backbone(images)
    assert list(pyramid) == list(expected)
    for name, level in expected.items():
        torch.testing.assert_close(pyramid[name], level)


@pytest.mark.slow
def test_torchvision_trains_with_mse_fpn(capsys: pytest.CaptureFixture[str]) -> None:
    values = runpy.run_path(str(EXAMPLES / "torchvision_necks.py"), run_name="__main__")
    assert isinstance(values["model"].backbone.fpn.neck, MSEFPN)
    gradients = [p.grad for p in values["model"].backbone.fpn.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in gradients)
    assert "loss_mask" in capsys.readouterr().out


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of serve.py for the model of a directory."""
    pytest.importorskip("fastapi")
    pytest.importorskip("onnxruntime")
    client = pytest.importorskip("fastapi.testclient").TestClient

    def serve(folder: Path) -> Any:
        monkeypatch.setenv("MODEL", str(folder))
        sys.path.insert(0, str(EXAMPLES))
        try:
            return client(runpy.run_path(str(EXAMPLES / "serve.py"))["app"])
        finally:
            sys.path.remove(str(EXAMPLES))

    return serve


def jpeg(width: int, height: int, orientation: int = 1) -> bytes:
    data, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), "white").save(data, format="png", exif=exif)
    return data.getvalue()


def whole_image_model(folder: Path) -> Path:
    """An ONNX model with fusedet's inputs and outputs, whose two detections are the image without its padding."""
    onnx = pytest.importorskip("onnx")
    helper, kinds = onnx.helper, onnx.TensorProto
    floats = lambda name, dims, values: helper.make_tensor(name, kinds.FLOAT, dims, values)  # noqa: E731
    integers = lambda name, dims, values: helper.make_tensor(name, kinds.INT64, dims, values)  # noqa: E731
    nodes = [
        helper.make_node("Gather", ["sizes", "order"], ["corner"], axis=1),  # (1, 2): width, height
        helper.make_node("Cast", ["corner"], ["far"], to=kinds.FLOAT),
        helper.make_node("Sub", ["far", "far"], ["near"]),
        helper.make_node("Concat", ["near", "far"], ["box"], axis=1),
        helper.make_node("Reshape", ["box", "shape"], ["one"]),
        helper.make_node("Concat", ["one", "one"], ["boxes"], axis=1),
        *(helper.make_node("Identity", [f"the {name}"], [name]) for name in ("scores", "labels", "counts")),
    ]
    constants = [
        integers("order", [2], [1, 0]),
        integers("shape", [3], [1, 1, 4]),
        floats("the scores", [1, 2], [0.75, 0.25]),
        integers("the labels", [1, 2], [1, 0]),
        integers("the counts", [1], [2]),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("images", kinds.UINT8, [1, 3, "H", "W"]), value("sizes", kinds.INT64, [1, 2])]
    outputs = [
        value("boxes", kinds.FLOAT, [1, 2, 4]),
        value("scores", kinds.FLOAT, [1, 2]),
        value("labels", kinds.INT64, [1, 2]),
        value("counts", kinds.INT64, [1]),
    ]
    graph = helper.make_graph(nodes, "whole", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "model.onnx")
    meta = {
        "name": "whole",
        "names": ["cat", "dog"],
        "size": None,
        "batch": None,
        "multiple": 32,
        "resize": {"short": 64, "long": 96, "antialias": True},
        "outputs": ["boxes", "scores", "labels", "counts"],
    }
    (folder / "model.json").write_text(json.dumps({"model": meta}))
    return folder


def test_serving(served: Any, tmp_path: Path) -> None:
    """Boxes come back in pixels of the image; what is no image, or too large, is refused."""
    client = served(whole_image_model(tmp_path))
    assert client.get("/health").json() == {"name": "whole", "classes": ["cat", "dog"]}
    assert client.post("/detect", content=jpeg(200, 100)).json() == [
        {"name": "dog", "score": 0.75, "box": [0, 0, 200, 100]}
    ]
    assert len(client.post("/detect?score=0.2", content=jpeg(31, 500)).json()) == 2
    turned = client.post("/detect", content=jpeg(200, 100, orientation=6)).json()
    assert turned[0]["box"] == [0, 0, 100, 200], "a camera that was held upright"
    refused = client.post("/detect", content=b"no image")
    assert (refused.status_code, "must hold an image file" in refused.json()["detail"]) == (415, True)
    assert client.post("/detect", content=bytes(20 * 2**20 + 1)).status_code == 413


@pytest.mark.slow
def test_serving_an_export(served: Any, scenes: Path, tmp_path: Path) -> None:
    """Over HTTP the detections are those of fusedet."""
    import fusedet

    run = save_run(tmp_path / "run", "retinanet", *ONE_LEVEL, data=scenes)
    fusedet.export(run, formats=["onnx"])
    image = next((scenes / "val").glob("*.jpg"))
    answer = served(run / "export").post("/detect?score=0", content=image.read_bytes()).json()
    expected = fusedet.load(run, device="cpu").predict(image)
    assert len(answer) == len(expected.boxes) > 0
    assert [row["name"] for row in answer[:5]] == [NAMES[k] for k in expected.labels[:5]]
    # Pillow's bilinear resize differs from fusedet's by at most 1 of 255
    np.testing.assert_allclose([row["score"] for row in answer[:5]], expected.scores[:5], atol=0.02)


def test_serving_needs_neither_torch_nor_fusedet() -> None:
    text = (EXAMPLES / "serve.py").read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported == {"io", "json", "os", "pathlib", "numpy", "onnxruntime", "fastapi", "PIL"}


def fake_cluster(folder: Path, training: str) -> dict[str, str]:
    """SLURM's programs and torchrun as scripts: each writes its arguments to a file of its name."""
    folder.mkdir()
    write = 'printf "%s\\n" "$@" >> "$0.log"\n'
    scripts = {
        "scontrol": write + 'if [ "$1" = show ]; then echo node7; echo node8; fi\n',
        "srun": 'exec "$@"\n',
        "torchrun": write + training,
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "42"}
    return os.environ | job | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_GPUS_ON_NODE": "4"}


needs_bash = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is missing")


@needs_bash
@pytest.mark.parametrize("resumes", [False, True])
def test_slurm_script(tmp_path: Path, resumes: bool) -> None:
    """torchrun gets the machines and a training whose settings exist; a run that has begun is resumed."""
    environment, out = fake_cluster(tmp_path / "bin", "exit 3\n"), tmp_path / "run of mine"
    if resumes:
        out.mkdir()
        (out / "config.yaml").touch()
    command = ["bash", str(EXAMPLES / "train.sbatch"), "retinanet_r50", "some data", str(out), "train.epochs=24"]
    assert subprocess.run(command, env=environment, timeout=60).returncode == 3  # SLURM sees how the training ended
    arguments = (tmp_path / "bin/torchrun.log").read_text().splitlines()
    launch, training = arguments[: arguments.index("-m")], arguments[arguments.index("train") + 1 :]
    pairs = dict(zip(launch[::2], launch[1::2]))
    assert pairs == {
        "--nnodes": "2",
        "--node-rank": "0",
        "--nproc-per-node": "4",
        "--master-addr": "node7",
        "--master-port": "29500",
    }
    assert ("--resume" in training) == resumes
    config = load_config(training[0], [word for word in training[1:] if word != "--resume"])
    assert (config.data.path, config.out, config.train.epochs) == ("some data", str(out), 24)


@needs_bash
def test_slurm_script_requeues_itself(tmp_path: Path) -> None:
    """At USR1 the job is requeued, and the script waits until the training has ended."""
    end = tmp_path / "bin" / "torchrun.end"
    training = 'while [ ! -e "$0.end" ]; do sleep 0.05; done\n'
    environment = fake_cluster(tmp_path / "bin", training)
    command = ["bash", str(EXAMPLES / "train.sbatch"), "retinanet_r50", "data", str(tmp_path / "run")]
    job = subprocess.Popen(command, env=environment)
    try:
        wait_for(tmp_path / "bin/torchrun.log", "--node-rank")
        job.send_signal(signal.SIGUSR1)
        wait_for(tmp_path / "bin/scontrol.log", "requeue")
        assert job.poll() is None
    finally:
        end.touch()
        assert job.wait(timeout=60) == 0
    assert (tmp_path / "bin/scontrol.log").read_text().splitlines()[-2:] == ["requeue", "42"]


def wait_for(file: Path, word: str) -> None:
    for _ in range(600):
        if file.exists() and word in file.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{file} never held {word}")
