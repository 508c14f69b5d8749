"""train.on_bad_image=skip: replacements and their log do not depend on workers, processes or a resume."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

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
from shared_fixtures import SMALL

pytestmark = pytest.mark.usefixtures("unrendered")

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
        ones = np.ones(1)
        rows.append(
            ImageAnnotations(
                100 + i,
                path,
                height,
                width,
                np.array([[3.0, 4, 20, 25]]),
                ones.astype(int),
                ones > 2,
                ones,
                [None],
                ones > 2,
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


def read_log(folder: Path) -> list[list[str]]:
    with (folder / "skipped.csv").open(newline="") as stream:
        return list(csv.reader(stream))


def batch_ids(batches: Iterator[Batch]) -> list[tuple[int, ...]]:
    return [batch.ids for batch in batches]


def test_bad_images_are_replaced_and_logged(make: Callable[..., TrainLoader], tmp_path: Path) -> None:
    loader = make()
    ids = [image_id for batch in loader.epoch(0) for image_id in batch.ids]
    assert len(ids) == COUNT
    assert set(ids) == {100 + i for i in range(COUNT) if i not in BAD}, "every good image is loaded"
    rows = loader.bad_image_log.close()
    assert sorted(row.image_id for row in rows) == [100 + i for i in BAD]
    for row in rows:
        assert row.epoch == 1
        assert row.file in row.reason
        assert 100 + int(Path(row.file).stem) == row.image_id
    assert read_log(tmp_path / "out") == [list(ReplacedImage._fields), *([str(v) for v in row] for row in rows)]


def test_without_a_log_a_bad_image_is_an_error(dataset: DetectionDataset) -> None:
    with pytest.raises(InputError, match="png"):
        list(build_train_loader(dataset, TRANSFORM, batch=4, seed=5).epoch(0))


def test_workers_and_epochs(make: Callable[..., TrainLoader], tmp_path: Path) -> None:
    single, pooled = make("a"), make("b", workers=2)
    for epoch in range(2):
        for first, second in zip(single.epoch(epoch), pooled.epoch(epoch), strict=True):
            assert first.ids == second.ids
            assert torch.equal(first.images, second.images)
    assert read_log(tmp_path / "a") == read_log(tmp_path / "b")
    assert len(read_log(tmp_path / "a")) == 1 + 2 * len(BAD)
    assert batch_ids(make("c").epoch(0)) != batch_ids(make("d").epoch(1)), "epochs have different orders"


@pytest.mark.parametrize("epoch", [0, 1])
def test_two_processes_load_what_one_does(make: Callable[..., TrainLoader], epoch: int) -> None:
    whole = list(make("w").epoch(epoch))
    halves = [list(make(f"h{rank}", rank=rank, world=2).epoch(epoch)) for rank in range(2)]
    for joint, first, second in zip(whole, *halves, strict=True):
        assert joint.ids == first.ids + second.ids
        assert torch.equal(joint.images, torch.cat([first.images, second.images])), (
            "padded alike, though only one process knows of the bad image"
        )
        assert torch.equal(joint.sizes, torch.cat([first.sizes, second.sizes]))


@pytest.mark.parametrize("start", [1, 5])
def test_resume_within_an_epoch(make: Callable[..., TrainLoader], tmp_path: Path, start: int) -> None:
    first = make("whole")
    whole = [batch_ids(first.epoch(0)), batch_ids(first.epoch(1))]
    killed = make("killed")
    batches = killed.epoch(0)
    for _ in range(start + 1):  # one step further than the checkpoint
        next(batches)
    batches.close()
    again = make("killed")
    assert batch_ids(again.epoch(0, start=start)) == whole[0][start:]
    assert batch_ids(again.epoch(1)) == whole[1]
    assert again.bad_image_log.close() == first.bad_image_log.close()
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "whole")


def test_too_many_bad_images(make: Callable[..., TrainLoader], dataset: DetectionDataset) -> None:
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
    ("count", "share", "expected"), [(8, 0.01, 1), (1000, 0.01, 10), (1001, 0.01, 11), (7, 0, 0), (100, 0.29, 29)]
)
def test_allowed_bad_images(count: int, share: float, expected: int) -> None:
    assert count_allowed_bad_images(count, share) == expected


def test_no_replacement_exists(dataset: DetectionDataset, tmp_path: Path) -> None:
    for i in range(COUNT):
        dataset.path(i).unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"does not exist.*and nothing can replace it: \d+ other images"):
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
"""The first image is twice in one batch, as in a dataset smaller than the batch."""


@pytest.mark.parametrize("method", ["replace", "unlink"])
def test_a_kill_during_the_merge_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / ".skipped.csv.1.part").write_text("epoch,ba")
    for rank, rows in ((0, ROWS[:2]), (1, ROWS[2:])):
        log = BadImageLog(tmp_path, 100, 0.03, rank)
        for row in rows:
            log.add(row)
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, killed)
        with pytest.raises(KeyboardInterrupt):
            BadImageLog(tmp_path, 100, 0.03).begin(1, 0)
    remove_leftovers(tmp_path)  # as a resumed training does
    again = BadImageLog(tmp_path, 100, 0.03)
    again.begin(1, 0)
    assert again.rows == ROWS
    assert again.bad == {3, 5}
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.csv"]
    assert len(read_log(tmp_path)) == 4


@pytest.mark.parametrize(
    "row", ["1,x,3,a,b", "1,2,3.5,a,b", "x,2,3,a,b", "1,2,3,a", "1,2,3,a,b,c", "1,2,3," + 200_000 * "a" + ",b"]
)
def test_a_damaged_log_is_refused_but_a_truncated_one_is_not(tmp_path: Path, row: str) -> None:
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


def run_rank(rank: int, folder: Path) -> None:
    """One of two processes: each meets one bad image, is killed and resumes; then both together meet too many."""
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    out = folder / "out"

    killed = BadImageLog(out, 100, 0.02, rank)
    killed.begin(0, 0)
    killed.add(ReplacedImage(1, 2, rank, f"{rank}.jpg", "gone"))
    killed.add(ReplacedImage(1, 9, 10 * rank + 10, "after.jpg", "the checkpoint"))
    dist.barrier()
    again = BadImageLog(out, 100, 0.02, rank)
    again.begin(0, 5)
    assert again.bad == {0, 1}, "known to both processes"
    assert len(again.rows) == (2 if rank == 0 else 0)
    again.end()
    again.add(ReplacedImage(1, 7, rank, f"{rank}.jpg", "gone"))
    rows = again.close()
    assert [(row.batch, row.image_id) for row in rows] == [(2, 0), (2, 1), (7, 0), (7, 1)]
    dist.barrier()
    if rank:
        assert sorted(path.name for path in out.iterdir()) == ["skipped.csv"]
    several = BadImageLog(folder / "several", 100, 0.02, rank)
    several.begin(0, 0)
    for i in range(2):
        several.add(ReplacedImage(1, i + 1, 10 * rank + i, f"{rank}-{i}.jpg", "gone"))
    try:
        several.end()
    except InputError as error:
        (folder / f"error-{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_the_logs_of_two_processes_are_merged(tmp_path: Path) -> None:
    mp.start_processes(run_rank, (tmp_path,), nprocs=2, start_method="fork")  # a fork needs no imports
    assert len(read_log(tmp_path / "out")) == 5
    for rank in range(2):
        assert (tmp_path / f"error-{rank}").read_text().startswith("4 of the 100 training images cannot be read"), (
            "each process stops"
        )


# -- the whole training


def run(*arguments: object) -> int:
    return cli.run([str(argument) for argument in arguments])


def skipping(scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The arguments of a training on data with a truncated image, which is replaced; without the last one it is not."""
    monkeypatch.setattr(command, "write_report", lambda *_, **__: {})  # drawing takes most of the time
    monkeypatch.setattr(command.visualization, "plot_training", lambda *_: None)
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    bad = data / "train" / "000002.jpg"
    bad.write_bytes(bad.read_bytes()[:-500])
    arguments = ["train", "retinanet_tiny", f"data={data}", *SMALL]
    return [
        *arguments,
        "train.policy=multistep",
        "train.milestones=[]",
        "train.validate_every=1",
        "train.on_bad_image=skip",
    ]


def test_training_with_a_bad_image(
    capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = skipping(scenes, tmp_path, monkeypatch)
    bad = tmp_path / "data" / "train" / "000002.jpg"
    assert run(*arguments[:-1], f"out={tmp_path / 'stopped'}") == 2
    assert f"{bad} is truncated or damaged" in capsys.readouterr().err

    assert run(*arguments, f"out={tmp_path / 'whole'}", "train.epochs=2") == 0
    printed = capsys.readouterr().out
    assert f"1 training image was replaced 2 times, see {tmp_path / 'whole' / 'skipped.csv'}" in printed
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["replaced"] == {"images": 1, "times": 2}
    assert [row[0] for row in read_log(tmp_path / "whole")] == ["epoch", "1", "2"]

    assert run(*arguments, f"out={tmp_path / 'none'}", "train.max_bad_images=0") == 2
    text = "1 of the 8 training images cannot be read, more than train.max_bad_images=0 allows"
    assert text in capsys.readouterr().err


@pytest.mark.slow
def test_a_resumed_training_replaces_the_same_images(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = skipping(scenes, tmp_path, monkeypatch)
    assert run(*arguments, f"out={tmp_path / 'whole'}", "train.epochs=2") == 0
    assert run(*arguments, f"out={tmp_path / 'parts'}") == 0
    assert run("train", tmp_path / "parts", "--resume", "train.epochs=2") == 0
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    assert run("train", tmp_path / "parts", "--resume") == 0, "nothing is left to train"
    assert not differences(tmp_path / "whole", tmp_path / "parts")
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["replaced"] == {"images": 1, "times": 2}


def test_a_bad_validation_image_is_always_an_error(
    capsys: pytest.CaptureFixture[str], scenes: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(scenes, tmp_path / "data"))
    bad = sorted((data / "val").iterdir())[0]
    bad.write_bytes(b"")
    assert (
        run("train", "retinanet_tiny", f"data={data}", f"out={tmp_path / 'out'}", *SMALL, "train.on_bad_image=skip")
        == 2
    )
    assert f"error: {bad} is empty or not an image" in capsys.readouterr().err
    assert not (tmp_path / "out").exists(), "before anything is written"
