"""Checkpoints and weights: round trips, full disks and absent folders, and files of other kinds or of another model."""

import errno
import os
import zipfile

import pytest
import torch
from torch import nn

from fusedet.engine import checkpoint
from fusedet.errors import InputError, StorageError


def state(value: float = 1.0) -> dict:
    return {"model": {"w": torch.full((3, 2), value)}, "ema": None, "step": 3, "meta": {"names": '["a"]'}}


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "last.ckpt", state())
    back = checkpoint.load(tmp_path / "last.ckpt")
    assert torch.equal(back["model"]["w"], torch.ones(3, 2))
    assert back["step"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_weights_round_trip_in_any_memory_format(tmp_path):
    w = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    weights = {"w": w, "same": w, "count": torch.tensor(7)}
    checkpoint.save_weights(tmp_path / "best.safetensors", weights, {"config": "model: x"})
    back, meta = checkpoint.load_weights(tmp_path / "best.safetensors")
    assert meta == {"config": "model: x"}
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[k], weights[k]) for k in weights)


def test_a_checkpoint_gives_its_averaged_weights_where_it_has_them(tmp_path):
    checkpoint.save(tmp_path / "a.ckpt", state(1))
    checkpoint.save(tmp_path / "b.ckpt", state(1) | {"ema": {"w": torch.full((3, 2), 2.0)}})
    assert checkpoint.load_weights(tmp_path / "a.ckpt")[0]["w"][0, 0] == 1
    weights, meta = checkpoint.load_weights(tmp_path / "b.ckpt")
    assert weights["w"][0, 0] == 2
    assert meta == {"names": '["a"]'}


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("name", ["last.ckpt", "best.safetensors"])
def test_a_full_disk_leaves_the_previous_file_whole(tmp_path, monkeypatch, name):
    def write(value: float) -> None:
        if name.endswith("ckpt"):
            checkpoint.save(tmp_path / name, state(value))
        else:
            checkpoint.save_weights(tmp_path / name, state(value)["model"], {})

    write(1)
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=rf"{name} cannot be written: No space left") as caught:
        write(2)
    assert caught.value.exit_code == 4
    assert [p.name for p in tmp_path.iterdir()] == [name]
    weights, _ = checkpoint.load_weights(tmp_path / name)
    assert weights.get("w")[0, 0] == 1


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        checkpoint.save(tmp_path / "no" / "last.ckpt", state())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("absent.ckpt", "no checkpoint exists at"),
        ("absent.safetensors", "no checkpoint exists at"),
        ("text.ckpt", "is not a fusedet checkpoint"),
        ("text.safetensors", "cut short or not a safetensors file"),
        ("zip.ckpt", "cannot be read as a checkpoint"),
        ("other.ckpt", "no weights under 'model'"),
        ("folder", "is a folder"),
    ],
)
def test_files_of_other_kinds_are_refused_in_one_sentence(tmp_path, name, text):
    for file in ("text.ckpt", "text.safetensors"):
        (tmp_path / file).write_bytes(b"hello")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    torch.save({"weights": torch.ones(1)}, tmp_path / "other.ckpt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=text) as caught:
        checkpoint.load(tmp_path / name) if name == "folder" else checkpoint.load_weights(tmp_path / name)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def shared_lists(levels: int) -> list:
    """A few bytes in a file, 9 ** levels words as text."""
    made = ["x"] * 9
    for _ in range(levels):
        made = [made] * 9
    return made


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"ema": torch.zeros(4)}, "weights must be tensors by name"),
        ({"ema": 5}, "weights must be tensors by name"),
        ({"ema": {"w": "x"}}, "'w' is not a tensor by name"),
        ({"ema": {(1, 2): torch.zeros(1)}}, "a tuple is not a tensor by name"),
        ({"meta": torch.zeros(3)}, "description .* texts by name"),
        ({"meta": None}, "description .* texts by name"),
        ({"meta": {"config": shared_lists(4)}}, "description .* texts by name"),
        ({"meta": {3: "x"}}, "description .* texts by name"),
    ],
)
def test_weights_and_descriptions_of_other_kinds(tmp_path, change, text):
    checkpoint.save(tmp_path / "x.ckpt", state() | change)
    with pytest.raises(InputError, match=f"x.ckpt is not a fusedet checkpoint: .*{text}") as caught:
        checkpoint.load_weights(tmp_path / "x.ckpt")
    assert len(str(caught.value)) < 500


def test_averaged_weights_that_are_none_are_not_replaced_by_others(tmp_path):
    checkpoint.save(tmp_path / "x.ckpt", state() | {"ema": {}})
    assert checkpoint.load_weights(tmp_path / "x.ckpt")[0] == {}


def test_load_into_names_the_differences():
    net = nn.Linear(2, 3)
    good = {k: torch.ones_like(v) for k, v in net.state_dict().items()}
    checkpoint.load_into(net, good, "x.ckpt")
    assert torch.equal(net.weight, torch.ones(3, 2))
    wrong = {"weight": torch.zeros(4, 2), "scale": torch.zeros(1)}
    with pytest.raises(
        InputError,
        match=r"x.ckpt does not fit .*without bias; with unknown scale; .*weight is \(4, 2\) and should be \(3, 2\)",
    ):
        checkpoint.load_into(net, wrong, "x.ckpt")
    assert torch.equal(net.weight, torch.ones(3, 2))
    many = good | {f"k{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(InputError, match="with unknown k0, k1, k2 and 2 more"):
        checkpoint.load_into(net, many, "x.ckpt")
