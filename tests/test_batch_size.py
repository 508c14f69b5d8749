"""train.batch=auto: the largest number that fits, memory by hand, and a detector that stays as it is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from torch import nn

from fusedet import cli
from fusedet.api.choose_batch import find_largest_size
from fusedet.config import load, parse
from fusedet.data.splits import read_split
from fusedet.engine import batch_size
from fusedet.engine.batch_size import find_batch, find_largest
from fusedet.errors import InputError
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")


@given(st.integers(1, 100), st.integers(1, 64))
def test_largest_that_fits(most, limit):
    tried = []
    assert find_largest(lambda count: tried.append(count) or count <= most, limit) == min(most, limit)
    assert 1 not in tried
    assert all(count <= limit for count in tried)
    assert len(tried) <= 2 * limit.bit_length()


class Product(nn.Module):
    """Keeps the images as floats for the backward pass, and has one weight of 1000 numbers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1000))
        self.register_buffer("calls", torch.zeros(()))

    def loss(self, batch):
        self.calls += 1
        torch.rand(())
        return {"loss": (batch.images.float() * self.weight[0]).sum()}


def test_memory_of_a_cpu_by_hand(monkeypatch):
    """An image of 64 x 96 keeps 3 * 64 * 96 * 4 bytes, a step 1.5 times as much; half of the memory is used."""
    image, weights = 3 * 64 * 96 * 4, 4000
    detector = Product()
    state = torch.get_rng_state()
    for count in (1, 5, 12):
        available = 2 * (1.5 * image * (count + 0.5) + 3 * weights)
        monkeypatch.setattr(batch_size, "read_available_memory", lambda available=available: available)
        options = {"states": 2, "masks": False, "limit": 10}
        assert find_batch(Fabric(accelerator="cpu"), detector, (60, 70), **options) == min(10, count)
    monkeypatch.setattr(batch_size, "read_available_memory", lambda: 0)
    assert find_batch(Fabric(accelerator="cpu"), detector, (60, 70), states=2, masks=True, limit=10) == 1
    assert detector.calls == 0
    assert detector.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)


def test_available_memory():
    assert 0 < batch_size.read_available_memory() < 2**50


@pytest.mark.parametrize(
    ("own", "folder", "names"),
    [
        ("0::/", "", ("memory.max", "memory.current", "inactive_file")),
        ("0::/slurm/job/step", "slurm/job", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:cpu:/a\n4:memory:/a/b",
            "memory/a",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
    ids=["container", "a parent's limit", "version 1"],
)
def test_memory_of_control_groups(tmp_path, own, folder, names):
    """A limit of 16, of which 14 are used, 9 of them for cached files, on a machine with 200 available."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal: 300 kB\nMemAvailable: 200 kB\n")
    assert batch_size.read_available_memory(tmp_path) == 200 * 1024
    (tmp_path / "proc/self/cgroup").write_text(own)
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (group / names[0]).write_text(f"{16 * 1024}\n")
    (group / names[1]).write_text(f"{14 * 1024}\n")
    (group / "memory.stat").write_text(f"anon 5\n{names[2]} {9 * 1024}\n")
    assert batch_size.read_available_memory(tmp_path) == 11 * 1024
    (group / "memory.stat").write_text("anon 5\n")
    assert batch_size.read_available_memory(tmp_path) == 2 * 1024, "the kernel does not tell what is cached"
    (group / names[0]).write_text("max\n")
    assert batch_size.read_available_memory(tmp_path) == 200 * 1024


def test_largest_size(scenes):
    """The generated images are landscape and portrait of 64 to 96 pixels."""
    config = load("retinanet_tiny", [f"data={scenes}", "data.size=[64,96]"])
    images = read_split(config.data, "train")
    height, width = find_largest_size(config, images)
    assert 64 <= height <= 96
    assert 64 <= width <= 96
    for text in ("data.scale_jitter=[0.1,2]", "data.mosaic=1"):
        turned = load("retinanet_tiny", [f"data={scenes}", "data.size=[64,96]", text, "data.right_angles=true"])
        assert find_largest_size(turned, images) == (96, 96)


def test_a_training_chooses_its_batch(scenes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("fusedet.api.choose_batch._STEPS", 2)
    out = tmp_path / "run"
    arguments = ["train", "retinanet_tiny", f"data={scenes}", f"out={out}", *SMALL, "train.batch=auto", "train.lr=0.01"]
    assert cli.run(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "train.batch=auto: 4 images per step, the most for 8 images" in said
    config = load(out / "config.yaml")
    assert config.train.batch == 4
    monkeypatch.setattr("fusedet.api.choose_batch._STEPS", 1)  # now 8 would be chosen
    assert cli.run([*arguments, "--resume", "train.epochs=2"]) == 0
    assert load(out / "config.yaml").train.batch == 4, "a resumed run has the same batch"


def test_wrong_batches(trained):
    for value, text in ((0, "train.batch=0 must be 1 or more"), ("many", r"train\.batch"), (1.5, r"train\.batch")):
        with pytest.raises(InputError, match=text):
            parse({"train": {"batch": value}})
    with pytest.raises(InputError, match=r"train\.batch=3 must be a multiple of train\.accumulate=2"):
        parse({"train": {"batch": 3, "accumulate": 2}})
    with pytest.raises(InputError, match="chosen when a training starts"):
        _ = parse({"train": {"batch": "auto"}}).train.total_batch
