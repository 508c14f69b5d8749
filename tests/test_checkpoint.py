import errno
import io
import os
import pickle
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedet.engine import checkpoint
from fusedet.errors import InputError


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
    with pytest.raises(InputError, match=rf"{name} cannot be written: No space left"):
        write(2)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    weights, _ = checkpoint.load_weights(tmp_path / name)
    assert weights.get("w")[0, 0] == 1


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from fusedet.engine import checkpoint
from fusedet.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path(sys.argv[1])
checkpoint.save(path, {"model": {"w": torch.ones(10)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoint.save(path, {"model": {"w": torch.ones(1_000_000)}})
except InputError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files")
def test_a_write_that_really_stops_in_the_middle(tmp_path):
    path = tmp_path / "last.ckpt"
    said = subprocess.run([sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, timeout=60)
    assert f"{path} cannot be written" in said.stdout, said.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert len(checkpoint.load(path)["model"]["w"]) == 10


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        checkpoint.save(tmp_path / "no" / "last.ckpt", state())


class Code:
    def __reduce__(self):
        return (os.system, ("touch ran",))


def broken(folder: Path) -> dict[str, tuple[Path, str]]:
    checkpoint.save(folder / "good.ckpt", state())
    checkpoint.save_weights(folder / "good.safetensors", state()["model"], {})
    whole, tensors = (folder / "good.ckpt").read_bytes(), (folder / "good.safetensors").read_bytes()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    torch.save({"model": Code()}, folder / "code.ckpt")
    torch.save({"weights": torch.ones(1)}, folder / "other.ckpt")
    contents = {
        "short.ckpt": whole[:-200],
        "empty.ckpt": b"",
        "text.ckpt": b"hello",
        "pickle.ckpt": pickle.dumps(Code()),
        "zip.ckpt": buffer.getvalue(),
        "short.safetensors": tensors[:-4],
        "text.safetensors": b"hello",
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    said = {
        "absent.ckpt": "no checkpoint exists at",
        "absent.safetensors": "no checkpoint exists at",
        "short.ckpt": "is cut short",
        "empty.ckpt": "is not a fusedet checkpoint",
        "text.ckpt": "is not a fusedet checkpoint",
        "pickle.ckpt": "is not a fusedet checkpoint",
        "zip.ckpt": "cannot be read as a checkpoint",
        "code.ckpt": "holds code .*system.*, which is never run",
        "other.ckpt": "no weights under 'model'",
        "short.safetensors": "cut short",
        "text.safetensors": "cut short or not a safetensors file",
    }
    return {name: (folder / name, text) for name, text in said.items()}


def test_bad_files_are_refused_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, text in broken(tmp_path).values():
        with pytest.raises(InputError, match=text) as caught:
            checkpoint.load_weights(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="is a folder"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


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
