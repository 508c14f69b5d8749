"""train.on_bad_image=skip: bad images are replaced alike by any number of workers and processes and after a resume, and listed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from conftest import SMALL
from fusedet import cli
from fusedet.api import train as command
from fusedet.atomic_io import remove_leftovers
from fusedet.data.bad_images import BadImageLog, ReplacedImage, count_allowed_bad_images
from fusedet.data.dataset import DetectionDataset, ImageAnnotations
from fusedet.data.loader import TrainLoader, build_train_loader
from fusedet.data.transforms import TrainTransform
from fusedet.errors import InputError
from fusedet.types import Batch
from killing import differences

TRANSFORM = TrainTransform([32, 64, 96], 192, resize="choice", photometric=True)  # batches of many sizes
SIZES = [(40, 60), (45, 55), (30, 80), (48, 48), (60, 40), (70, 33)] * 4
BAD = (3, 8, 17)
COUNT = len(SIZES)


@pytest.fixture
def dataset(tmp_path: Path) -> DetectionDataset:
    """24 images of several shapes, three of which cannot be read."""
    rng = np.random.default_rng(0)
    rows = []
    for i, (height, width) in enumerate(SIZES):
        path = tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        one = np.ones(1)
        rows.append(
            ImageAnnotations(
                100 + i, path, height, width, np.array([[3.0, 4, 20, 25]]), one.astype(int), one > 2, one, [None]
            )
        )
    (tmp_path / "3.png").unlink()
    (tmp_path / "8.png").write_bytes(b"no image")
    (tmp_path / "17.png").write_bytes((tmp_path / "17.png").read_bytes()[:-300])
    return DetectionDataset.build(["a", "b"], [1, 2], rows, source=tmp_path, dataset_format="coco")


@pytest.fixture
def make(dataset: DetectionDataset, tmp_path: Path) -> Callable[..., TrainLoader]:
    def loader(name: str = "out", share: float = 0.2, **more: int) -> TrainLoader:
        return build_train_loader(
            dataset, TRANSFORM, batch=4, seed=5, bad_image_log=BadImageLog(tmp_path / name, COUNT, share), **more
        )

    return loader


def listed(folder: Path) -> list[list[str]]:
    with (folder / "skipped.csv").open(newline="") as stream:
        return list(csv.reader(stream))


def ids(batches: Iterator[Batch]) -> list[tuple[int, ...]]:
    return [batch.ids for batch in batches]


def test_bad_images_are_replaced_and_listed(make: Callable[..., TrainLoader], tmp_path: Path) -> None:
    loader = make()
    seen = [one for batch in loader.epoch(0) for one in batch.ids]
    assert len(seen) == COUNT
    assert set(seen) == {100 + i for i in range(COUNT) if i not in BAD}, "every good image is seen"
    rows = loader.bad_image_log.close()
    assert sorted(row.image_id for row in rows) == [100 + i for i in BAD]
    for row in rows:
        assert row.epoch == 1
        assert row.file in row.reason
        assert 100 + int(Path(row.file).stem) == row.image_id
    assert listed(tmp_path / "out") == [list(ReplacedImage._fields), *([str(v) for v in row] for row in rows)]


def test_without_a_ledger_it_is_an_error(dataset: DetectionDataset) -> None:
    with pytest.raises(InputError, match="png"):
        list(build_train_loader(dataset, TRANSFORM, batch=4, seed=5).epoch(0))


def test_workers_and_epochs(make: Callable[..., TrainLoader], tmp_path: Path) -> None:
    alone, helped = make("a"), make("b", workers=2)
    for epoch in range(2):
        for one, other in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
            assert one.ids == other.ids
            assert torch.equal(one.images, other.images)
    assert listed(tmp_path / "a") == listed(tmp_path / "b")
    assert len(listed(tmp_path / "a")) == 1 + 2 * len(BAD)
    assert ids(make("c").epoch(0)) != ids(make("d").epoch(1)), "another epoch, other images"


@pytest.mark.parametrize("epoch", range(4))
def test_two_processes_see_what_one_does(make: Callable[..., TrainLoader], epoch: int) -> None:
    whole = list(make("w").epoch(epoch))
    halves = [list(make(f"h{rank}", rank=rank, world=2).epoch(epoch)) for rank in range(2)]
    for one, first, second in zip(whole, *halves, strict=True):
        assert one.ids == first.ids + second.ids
        assert torch.equal(one.images, torch.cat([first.images, second.images])), (
            "padded alike, though only one knows of the bad image"
        )
        assert torch.equal(one.sizes, torch.cat([first.sizes, second.sizes]))


@pytest.mark.parametrize("start", [1, 3, 5])
def test_going_on_in_an_epoch(make: Callable[..., TrainLoader], tmp_path: Path, start: int) -> None:
    first = make("whole")
    whole = [ids(first.epoch(0)), ids(first.epoch(1))]
    killed = make("killed")
    batches = killed.epoch(0)
    for _ in range(start + 1):  # one further than the checkpoint that it goes on from
        next(batches)
    batches.close()
    again = make("killed")
    assert ids(again.epoch(0, start=start)) == whole[0][start:]
    assert ids(again.epoch(1)) == whole[1]
    assert again.bad_image_log.close() == first.bad_image_log.close()
    assert listed(tmp_path / "killed") == listed(tmp_path / "whole")


def test_too_many(make: Callable[..., TrainLoader], dataset: DetectionDataset) -> None:
    loader = make(share=2 / COUNT)
    with pytest.raises(
        InputError, match=r"^3 of the 24 training images cannot be read, more than train.max_bad_images=0.08"
    ) as error:
        list(loader.epoch(0))
    assert any(str(dataset.path(i)) in str(error.value) for i in BAD)
    list(make("enough", share=3 / COUNT).epoch(0))
    with pytest.raises(InputError, match=r"^1 of the 24"):
        list(make("none", share=0).epoch(0))


@pytest.mark.parametrize(
    ("count", "share", "right"), [(8, 0.01, 1), (1000, 0.01, 10), (1001, 0.01, 11), (7, 0, 0), (100, 0.29, 29)]
)
def test_what_a_share_allows(count: int, share: float, right: int) -> None:
    assert count_allowed_bad_images(count, share) == right


def test_nothing_that_can_stand_in(dataset: DetectionDataset, tmp_path: Path) -> None:
    for i in range(COUNT):
        dataset.path(i).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"does not exist.*and nothing could stand in for it: \d+ other images"):
        list(
            build_train_loader(
                dataset, TRANSFORM, batch=4, bad_image_log=BadImageLog(tmp_path / "out", COUNT, 1)
            ).epoch(0)
        )


ROWS = [
    ReplacedImage(1, 2, 3, "3.jpg", "gone"),
    ReplacedImage(1, 2, 3, "3.jpg", "gone"),
    ReplacedImage(1, 4, 5, "5.jpg", "of two,\nlines"),
]
"""The first image twice in one batch: there are fewer than it takes."""


@pytest.mark.parametrize("place", ["replace", "unlink"])
def test_a_kill_while_the_lists_come_together_loses_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / ".skipped.csv.1.part").write_text("epoch,ba")
    for rank, rows in ((0, ROWS[:2]), (1, ROWS[2:])):
        ledger = BadImageLog(tmp_path, 100, 0.03, rank)
        for row in rows:
            ledger.add(row)
    with monkeypatch.context() as patch:
        patch.setattr(Path, place, killed)
        with pytest.raises(KeyboardInterrupt):
            BadImageLog(tmp_path, 100, 0.03).begin(1, 0)
    remove_leftovers(tmp_path)  # as a training does that goes on
    again = BadImageLog(tmp_path, 100, 0.03)
    again.begin(1, 0)
    assert again.rows == ROWS
    assert again.bad == {3, 5}
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.csv"]
    assert len(listed(tmp_path)) == 4


@pytest.mark.parametrize(
    "row", ["1,x,3,a,b", "1,2,3.5,a,b", "x,2,3,a,b", "1,2,3,a", "1,2,3,a,b,c", "1,2,3," + 200_000 * "a" + ",b"]
)
def test_a_damaged_list_is_refused_and_one_cut_short_is_not(tmp_path: Path, row: str) -> None:
    BadImageLog(tmp_path, 100, 0.03).add(ROWS[0])
    file = tmp_path / "skipped.csv"
    whole = file.read_text()
    file.write_text(f"{whole}{row}\n{whole}")
    with pytest.raises(InputError, match=r"skipped.csv, line 3 is damaged: a row is epoch, batch") as error:
        BadImageLog(tmp_path, 100, 0.03).begin(1, 0)
    assert "\n" not in str(error.value)
    file.write_text(whole + row)
    cut = BadImageLog(tmp_path, 100, 0.03)
    cut.begin(1, 0)
    assert cut.rows == ROWS[:1]


def one_of_two(rank: int, folder: Path) -> None:
    """A process that meets one bad image of its own, is killed and goes on, then meets one too many together with the other."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    out = folder / "out"

    def ledger() -> BadImageLog:
        return BadImageLog(out, 100, 0.02, rank, 2)

    killed = ledger()
    killed.begin(0, 0)
    killed.add(ReplacedImage(1, 2, rank, f"{rank}.jpg", "gone"))
    killed.add(ReplacedImage(1, 9, 10 * rank + 10, "after.jpg", "the checkpoint"))
    dist.barrier()
    again = ledger()
    again.begin(0, 5)
    assert again.bad == {0, 1}, "known to both"
    assert len(again.rows) == (2 if rank == 0 else 0)
    again.end()
    again.add(ReplacedImage(1, 7, rank, f"{rank}.jpg", "gone"))
    rows = again.close()
    assert [(row.batch, row.image_id) for row in rows] == [(2, 0), (2, 1), (7, 0), (7, 1)]
    dist.barrier()
    if rank:
        assert sorted(path.name for path in out.iterdir()) == ["skipped.csv"]
    several = BadImageLog(folder / "several", 100, 0.02, rank, 2)
    several.begin(0, 0)
    for i in range(2):
        several.add(ReplacedImage(1, i + 1, 10 * rank + i, f"{rank}-{i}.jpg", "gone"))
    try:
        several.end()
    except InputError as error:
        (folder / f"said-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_the_lists_of_two_processes_come_together(tmp_path: Path) -> None:
    mp.start_processes(one_of_two, (tmp_path,), nprocs=2, start_method="fork")  # they need no imports of their own
    assert len(listed(tmp_path / "out")) == 5
    for rank in range(2):
        assert (tmp_path / f"said-{rank}").read_text().startswith("4 of the 100 training images cannot be read"), (
            "each says so and stops"
        )


# -- the whole training


def run(*words: object) -> int:
    return cli.run([str(word) for word in words])


def test_a_training_around_a_bad_image(
    capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "report", lambda *_, **__: {})  # drawing takes longer than all the rest
    monkeypatch.setattr(command.visualization, "training", lambda *_: None)
    data = tmp_path / "data"
    for path in scenes.rglob("*"):
        if path.is_file():
            (data / path.relative_to(scenes)).parent.mkdir(parents=True, exist_ok=True)
            (data / path.relative_to(scenes)).write_bytes(path.read_bytes())
    bad = data / "train" / "000002.jpg"
    bad.write_bytes(bad.read_bytes()[:-500])
    words = [
        "train",
        "retinanet_tiny",
        f"data={data}",
        *SMALL,
        "train.policy=multistep",
        "train.milestones=[]",
        "train.validate_every=1",
    ]

    assert run(*words, f"out={tmp_path / 'stopped'}") == 2
    assert f"{bad} is truncated or damaged" in capsys.readouterr().err
    skip = [*words, "train.on_bad_image=skip"]
    assert run(*skip, f"out={tmp_path / 'whole'}", "train.epochs=2") == 0
    said = capsys.readouterr().out
    assert f"1 training image was replaced 2 times, see {tmp_path / 'whole' / 'skipped.csv'}" in said
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["replaced"] == {"images": 1, "times": 2}
    assert [row[0] for row in listed(tmp_path / "whole")] == ["epoch", "1", "2"]

    assert run(*skip, f"out={tmp_path / 'parts'}") == 0
    assert run("train", tmp_path / "parts", "--resume", "train.epochs=2") == 0
    assert not differences(tmp_path / "whole", tmp_path / "parts"), "as if nothing had happened"
    assert run("train", tmp_path / "parts", "--resume") == 0, "nothing is left to train"
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["replaced"] == {"images": 1, "times": 2}

    assert run(*skip, f"out={tmp_path / 'none'}", "train.max_bad_images=0") == 2
    assert (
        "1 of the 8 training images cannot be read, more than train.max_bad_images=0 allows" in capsys.readouterr().err
    )


def test_a_bad_validation_image_is_an_error_always(
    capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path
) -> None:
    for name in ("annotations/instances_train.json", "annotations/instances_val.json"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes((scenes / name).read_bytes())
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir()
        for path in (scenes / split).iterdir():
            (tmp_path / "data" / split / path.name).write_bytes(path.read_bytes())
    bad = sorted((tmp_path / "data" / "val").iterdir())[0]
    bad.write_bytes(b"")
    words = [
        "train",
        "retinanet_tiny",
        f"data={tmp_path / 'data'}",
        f"out={tmp_path / 'out'}",
        *SMALL,
        "train.on_bad_image=skip",
    ]
    assert run(*words) == 2
    assert f"error: {bad} is empty or not an image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "before anything is written"
