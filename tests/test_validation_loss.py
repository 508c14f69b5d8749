"""The loss on the validation split: its mean by hand, and a training that it leaves as it was."""

import csv

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fakes import FakeDetector
from fusedet import cli
from fusedet.engine.validation_loss import ValidationLoss
from fusedet.models.ops.losses import mean_over_ranks
from fusedet.types import Batch, Target
from fusedet.visualization import plot_training
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")


def make_batch(*object_counts):
    n = len(object_counts)
    targets = tuple(Target(torch.ones(g, 4), torch.zeros(g, dtype=torch.int64)) for g in object_counts)
    images = torch.zeros(n, 3, 32, 32, dtype=torch.uint8)
    return Batch(images, torch.full((n, 2), 32), tuple(range(n)), torch.ones(n, 2), targets)


class CountingDetector(nn.Module):
    """The loss is the number of objects of the batch; a buffer counts the calls, and a sample is drawn."""

    loss_weights = {"loss_a": 2.0, "loss_b": 0.5}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.drawn = []

    def loss(self, batch):
        self.calls += 1
        self.drawn.append(float(torch.rand(())))
        objects = torch.tensor(float(sum(map(len, batch.targets))))
        return {"loss_a": objects, "loss_b": torch.tensor(4.0)}


def test_means_by_hand():
    """Batches of 2 and 1 images with 3 and 6 objects: loss_a = (2 * 3 + 1 * 6) / 3 = 4, loss = 2 * 4 + 4 / 2 = 10."""
    detector, batches = CountingDetector(), [make_batch(1, 2), make_batch(6)]
    losses = ValidationLoss(detector, torch.device("cpu"))
    state = torch.get_rng_state()
    assert list(losses.watch(batches)) == batches
    assert losses.means() == {"val_loss_a": 4, "val_loss_b": 4, "val_loss": 10}
    assert detector.calls == 0, "buffers are restored"
    assert torch.equal(torch.get_rng_state(), state)
    list(ValidationLoss(detector, torch.device("cpu")).watch(batches))
    assert detector.drawn[:2] == detector.drawn[2:], "every validation draws the same samples"


def test_an_interrupted_validation_leaves_the_buffers():
    detector = CountingDetector()
    batches = ValidationLoss(detector, torch.device("cpu")).watch([make_batch(1), make_batch(2)])
    next(batches)
    assert len(detector.drawn) == 1
    assert detector.calls == 0


def test_no_gradient_is_kept():
    detector = FakeDetector().eval()
    losses = ValidationLoss(detector, torch.device("cpu"))
    list(losses.watch([make_batch(1, 2)]))
    assert not losses.sums.requires_grad


@pytest.fixture(scope="module")
def watched(scenes, tmp_path_factory):
    """A run of the fixture `trained` with the validation loss."""
    out = tmp_path_factory.mktemp("watched") / "run"
    arguments = ["train", "retinanet_tiny", f"data={scenes}", f"out={out}", *SMALL, "train.validation_loss=true"]
    assert cli.run(arguments) == 0
    return out


def read_last(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))[-1]


def test_a_training_is_the_same_with_it(trained, watched):
    weights, others = (load_file(run / "best.safetensors") for run in (trained, watched))
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[key]) for key, value in weights.items())
    plain, seen = read_last(trained), read_last(watched)
    assert {name: seen[name] for name in plain} == plain
    assert set(seen) - set(plain) == {"val_loss", "val_loss_cls", "val_loss_box"}
    total = float(seen["val_loss"])
    assert total == pytest.approx(float(seen["val_loss_cls"]) + float(seen["val_loss_box"]), rel=1e-5)


def test_it_is_drawn(watched, tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr(
        "matplotlib.axes.Axes.plot", lambda axes, *args, label=None, **style: labels.append(label) or [None]
    )
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda *args, **options: None)
    plot_training(watched / "metrics.csv", tmp_path / "training.svg")
    assert "validation loss" in labels
    assert "loss" in labels


def test_counts_are_local(monkeypatch):
    """Processes may have different numbers of validation batches: nothing waits for another process."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda count: count.mul_(3))
    monkeypatch.setattr(
        "torch.distributed.all_gather_object", lambda shares, own: shares.__setitem__(slice(2), [own, {}])
    )
    assert mean_over_ranks(torch.tensor(4)) == 6, "two processes share their counts in training"
    losses = ValidationLoss(FakeDetector().eval(), torch.device("cpu"))
    list(losses.watch([make_batch(2)]))
    single = FakeDetector().eval()
    single.load_state_dict(losses.detector.state_dict())
    monkeypatch.undo()
    assert losses.sums[-1] == 1
    expected = {f"val_{name}": value.item() for name, value in single.loss(make_batch(2)).items()}
    assert dict(zip(["val_loss_box", "val_loss_score"], losses.sums.tolist())) == pytest.approx(expected)
