"""Untrusted checkpoints and configs are read as data; code in them is refused by name."""

from __future__ import annotations

import argparse
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import fusedet
from fusedet import cli
from fusedet.errors import InputError
from fusedet.interop import convert_checkpoint
from fusedet.interop.mmdetection import python_config
from fusedet.interop.mmdetection.load_checkpoint import extract_weights, read_checkpoint

WEIGHTS = {"backbone.conv1.weight": torch.zeros(2)}


def add_modules(*path: str, **names: Any) -> list[str]:
    """Add modules as if a package were installed; return the names to remove from sys.modules."""
    for i in range(len(path)):
        name = ".".join(path[: i + 1])
        sys.modules[name] = types.ModuleType(name)
    for name, value in names.items():
        setattr(sys.modules[".".join(path)], name, value)
        value.__module__, value.__qualname__ = ".".join(path), name
    return [".".join(path[: i + 1]) for i in range(len(path))]


@pytest.fixture
def bookkeeping() -> Any:
    """Objects that MMEngine stores in a checkpoint: a history that refers to its own methods, and mappings."""

    class HistoryBuffer:
        def __init__(self) -> None:
            import numpy as np

            self._log_history, self._statistics_methods = np.arange(3.0), {"mean": HistoryBuffer.mean}

        def mean(self) -> float:
            return 0.0

    class ConfigDict(dict):
        def __reduce_ex__(
            self, protocol: Any
        ) -> tuple[Any, ...]:  # as in MMEngine: the items are the constructor's argument
            return type(self), (dict(self),), None, None, None, None

    class Items(dict):  # as in MMCV: the items are set afterwards
        pass

    class Unknown:
        pass

    added = add_modules("mmengine", "logging", "history_buffer", HistoryBuffer=HistoryBuffer)
    added += add_modules("mmengine", "config", "config", ConfigDict=ConfigDict)
    added += add_modules("mmengine", "model", Unknown=Unknown)
    added += add_modules("addict", "addict", Dict=Items)
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    HistoryBuffer.mean.__module__ = HistoryBuffer.__module__
    yield {
        "buffer": HistoryBuffer(),
        "mapping": ConfigDict(a=1, b=ConfigDict(c=2)),
        "items": Items(d=3),
        "unknown": Unknown(),
    }
    for name in added:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_bookkeeping_is_inert(tmp_path: Path, bookkeeping: dict[str, Any], zipped: bool) -> None:
    import numpy as np

    hub = {"log_scalars": {"loss": bookkeeping["buffer"]}, "runtime_info": {"iter": np.int64(3), "lr": np.float64(0.1)}}
    content = {
        "state_dict": WEIGHTS,
        "meta": {"cfg": "x = 1", "extra": bookkeeping["mapping"], "items": bookkeeping["items"]},
        "message_hub": hub,
    }
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    content = read_checkpoint(tmp_path / "model.pth")
    assert torch.equal(content["state_dict"]["backbone.conv1.weight"], torch.zeros(2))
    assert content["meta"]["cfg"] == "x = 1"
    assert content["meta"]["extra"] == {"a": 1, "b": {"c": 2}}
    assert content["meta"]["items"] == {"d": 3}
    assert type(content["message_hub"]["log_scalars"]["loss"]) is not type(bookkeeping["buffer"])
    torch.save(
        {"state_dict": WEIGHTS, "other": bookkeeping["unknown"]},
        tmp_path / "other.pth",
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(InputError, match=r"holds mmengine\.model\.Unknown"):
        read_checkpoint(tmp_path / "other.pth")


class Code:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Convert a file of `tmp_path` and return the one line of the refusal; nothing is written."""

    def run(file: str = "model.pth", *arguments: object, content: Any = None, config: str | None = None) -> str:
        if content is not None:
            torch.save(content, tmp_path / file)
        if config is not None:
            (tmp_path / "config.py").write_text(config)
            arguments = ("--config", tmp_path / "config.py")
        capsys.readouterr()
        arguments = ["convert", "weights", tmp_path / file, tmp_path / "out", *arguments]
        assert cli.run([str(argument) for argument in arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not (tmp_path / "out").exists()
        return message

    return run


def test_arguments_of_torchvisions_training(tmp_path: Path) -> None:
    """torchvision's reference script saves its arguments, which is no reason to refuse the weights."""
    torch.save(
        {"model": WEIGHTS, "optimizer": {}, "args": argparse.Namespace(lr=0.02), "epoch": 3}, tmp_path / "model.pth"
    )
    content = read_checkpoint(tmp_path / "model.pth")
    assert extract_weights(content, "x").keys() == WEIGHTS.keys()
    assert not isinstance(content["args"], argparse.Namespace)


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_pickle(tmp_path: Path, protocol: int) -> None:
    """Code in a plain pickle is named and not executed, as in a file of torch.save."""
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"state_dict": Code(f"touch {tmp_path}/ran")}, protocol=protocol))
    with pytest.raises(
        InputError, match=r"is a plain pickle, not a file of torch\.save and holds posix\.system: it is not run"
    ):
        read_checkpoint(tmp_path / "model.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "model.pth").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    with pytest.raises(InputError, match=r"is a plain pickle, not a file of torch\.save: it is not run"):
        read_checkpoint(tmp_path / "model.pth")


def test_old_file_truncated_after_its_first_number(tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS}, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    with (tmp_path / "model.pth").open("rb") as file:
        pickle.load(file)
        file.seek(0, 1)
        end = file.tell()
    (tmp_path / "model.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:end])
    with pytest.raises(InputError, match="cut short"):
        read_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors", ""])
def test_own_checkpoints_are_refused(tmp_path: Path, name: str) -> None:
    config = "model:\n  neck: {type: fpn}\n"
    torch.save({"model": WEIGHTS, "meta": {"config": config, "format": "fusedet"}}, tmp_path / "last.ckpt")
    save_file(WEIGHTS, tmp_path / "best.safetensors", {"config": config, "format": "fusedet"})
    file = tmp_path / name
    with pytest.raises(
        InputError,
        match=f"^{file} is a fusedet checkpoint already, there is nothing to convert: .* fusedet predict {file} ",
    ):
        convert_checkpoint(file)
    save_file(WEIGHTS, tmp_path / "other.safetensors", {"format": "pt"})
    assert read_checkpoint(tmp_path / "other.safetensors").keys() == WEIGHTS.keys()


def test_refused_files(tmp_path: Path, refuse: Refuse) -> None:
    for zipped in (True, False):
        content = {"state_dict": WEIGHTS, "hook": Code(f"touch {tmp_path}/ran")}
        torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
        assert "system" in refuse()
        whole = (tmp_path / "model.pth").read_bytes()
        (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
        assert "cut short" in refuse("cut.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "text.pth").write_text("not a checkpoint")
    assert "or not a checkpoint" in refuse("text.pth")
    assert "there is no file" in refuse("none.pth")
    assert "is a folder" in refuse("")
    assert "holds a list" in refuse(content=[1, 2])
    assert "holds no weights" in refuse(content={"state_dict": {}, "meta": {}})
    assert "no supported detector" in refuse(content={"encoder.weight": torch.zeros(2)})


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    torch.save(WEIGHTS, tmp_path / "model.pth")
    with pytest.raises(InputError, match="nothing is overwritten"):
        fusedet.convert_weights(tmp_path / "model.pth", tmp_path / "kept")


PARTS = (
    "backbone=dict(type='ResNet', depth=18), "
    "neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=64, start_level=1, "
    "add_extra_convs='on_input', num_outs=5)"
)
RETINA = f"model = dict(type='RetinaNet', {PARTS}, bbox_head=dict(type='RetinaHead', num_classes=5))\n"


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("import os\n" + RETINA, 1, "import os"),
        (RETINA + "os.system('touch ran')\n", 2, "os.system"),
        ("depth = int('18')\n" + RETINA, 1, "int('18')"),
        (RETINA + "\nfor i in range(3):\n    pass\n", 3, "for i in range"),
        (RETINA + "x = 10 ** 10 ** 10\n", 2, "10 ** 10 ** 10"),
        (RETINA + "x = [0] * 10 ** 9\n", 2, "[0] * 10 ** 9"),
        (RETINA + "x = lambda: 1\n", 2, "lambda"),
        (RETINA + "x = unknown\n", 2, "unknown"),
        (RETINA + "x = (1).__class__\n", 2, "__class__"),
        (RETINA + "x = dict(a=1)['b']\n", 2, "['b']"),
        (RETINA + "x = [1,\n", 2, "not Python"),
        (RETINA + "_base_ = 3\n", 2, "_base_"),
    ],
)
def test_configs_are_never_executed(refuse: Refuse, text: str, line: int, what: str) -> None:
    message = refuse(content=WEIGHTS, config=text)
    assert f"config.py, line {line}" in message
    assert what in message


def test_refused_configs(tmp_path: Path, refuse: Refuse) -> None:
    rows = {"bbox_head.retina_cls.weight": torch.zeros(45, 1), "bbox_head.retina_reg.weight": torch.zeros(36, 1)}
    message = refuse(content=WEIGHTS | rows, config=RETINA)
    assert "does not match" in message
    assert "of another shape: backbone.conv1.weight (2,)" in message
    assert "head.towers.cls.0.weight" in message or "backbone.body.bn1.weight" in message
    coder = "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[1, 1, 2, 2])"
    for text, what in (
        ("model = dict(type='DETR')", "detector DETR is not supported: supported detectors are RetinaNet"),
        (RETINA.replace("'ResNet'", "'MobileNetV2'"), "MobileNetV2 is not supported"),
        (RETINA.replace("depth=18", "depth=18, deep_stem=True"), "deep_stem=True is not supported"),
        (RETINA.replace("'FPN'", "'YOLOXPAFPN'"), "YOLOXPAFPN is not supported"),
        (
            RETINA.replace("'RetinaHead'", "'YOLOV3Head'"),
            "model.bbox_head.type=YOLOV3Head is not supported: supported types are RetinaHead",
        ),
        (RETINA.replace("num_classes=5", coder), "target_stds"),
        (RETINA.replace("'on_input'", "'on_lateral'"), "on_lateral"),
        ("x = 1", "no `model`"),
        ("model = dict(type='RetinaNet')", "no model.backbone"),
        ("_base_ = './gone.py'\nmodel = dict(bbox_head=dict(num_classes=3))", "gone.py"),
        ("# nothing yet\n", "config.py: the config is empty"),
        ("_base_ = './loop.py'", "its own base"),
    ):
        (tmp_path / "loop.py").write_text("_base_ = './config.py'")
        assert what in refuse(config=text), text
    assert "unknown config" in refuse("model.pth", "--config", "retinanet_r5")
    assert "there is no config file" in refuse("model.pth", "--config", "gone.py")
    assert "faster.py is one too many" in refuse("model.pth", "faster.py")


def test_config_files(tmp_path: Path) -> None:
    """Bases in folders, names, arithmetic and everything else that MMDetection's configs use."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.py").write_text(
        '"""A base."""\nnorm = dict(type="BN")\nscales = (8,)\n'
        'model = dict(type="A", backbone=dict(depth=50, norm=norm), head=[dict(k=1), dict(k=2)], old=dict(x=1, y=2))\n'
    )
    (tmp_path / "base" / "data.py").write_text(
        "root = 'data/'\nscale: tuple = (1333, 800)\npipeline = [dict(type='Resize', scale=scale), dict(type='Pad')]\n"
    )
    (tmp_path / "config.py").write_text(
        "_base_ = ['./base/model.py', './base/data.py']\n"
        "third = 1 / 3 + 2 ** 2 - -1\n"
        "model = dict(backbone=dict(depth=100 + 1, **dict(style='caffe')), head={1: dict(k=5)}, old=dict(_delete_=True, z=[third] * 2))\n"
        "shorter = [dict(type='Resize', scale=s) for s in (*_base_.scales, _base_.scale[0])]\n"
        "path = f'{{{{_base_.root}}}}x{third:}'\n"
        "where = {{_base_.root}}\n"
        "text = '{{_base_.root}}train'\n"
        "last = model['head'][1]['k'] if not False else 0\n"
        "_base_.pipeline[0].scale = (2, 3)\n"
        "del _base_.scale\n"
    )
    tree = python_config.read_config(tmp_path / "config.py").tree
    third = 1 / 3 + 4 + 1
    assert tree["model"] == {
        "type": "A",
        "backbone": {"depth": 101, "norm": {"type": "BN"}, "style": "caffe"},
        "head": [{"k": 1}, {"k": 5}],
        "old": {"z": [third, third]},
    }
    assert tree["shorter"] == [{"type": "Resize", "scale": 8}, {"type": "Resize", "scale": 1333}]
    assert (tree["where"], tree["text"], tree["last"]) == ("data/", "data/train", 5)
    assert tree["pipeline"] == [{"type": "Resize", "scale": (2, 3)}, {"type": "Pad"}]
    assert "scale" not in tree
    assert "_base_" not in tree


def test_missing_bases_of_a_complete_model(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text("_base_ = ['../datasets/coco.py', 'mmdet::runtime.py']\n" + RETINA)
    content = python_config.read_config(tmp_path / "config.py")
    assert [text.split()[0] for text in content.missing] == ["../datasets/coco.py", "mmdet::runtime.py"]
    assert content.tree["model"]["type"] == "RetinaNet"


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": WEIGHTS},
        {"model": WEIGHTS},
        WEIGHTS,
        {"state_dict": {f"module.{k}": v for k, v in WEIGHTS.items()}},
    ],
)
def test_weights_under_any_key(content: dict[str, Any]) -> None:
    assert extract_weights(content, "x").keys() == WEIGHTS.keys()
