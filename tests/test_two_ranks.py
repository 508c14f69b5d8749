"""All ten detectors in two processes: their mean gradient is that of one process, even if one process has no objects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fakes import batch
from fusedet.models.roi import DynamicStage
from fusedet.types import Batch
from small import DETECTORS, float64, livelier, make, target, total, without_gradient
from warm import SERVER

Learned = dict[str, Any]
SIZE = (32, 48)
THOUSAND = [
    [x, y, x + side, y + side * 1.25]
    for x, y, side in ((i % 45 + i / 1009, i % 29 + i / 2003, 0.5 + i / 60) for i in range(1000))
]
OBJECTS: dict[str, list[list[list[float]]]] = {  # of two images for each process
    "both": [
        [[2, 2, 15, 15], [5, 10, 30, 22], [20, 4, 45, 30]],
        [],
        [[-5, -5, 60, 40]],
        [[10, 5, 35, 25], [25, 1, 30, 6]],
    ],
    "first": [[[2, 2, 15, 15], [5, 10, 30, 22], [20, 4, 45, 30]], [[10, 5, 35, 25], [25, 1, 30, 6]], [], []],
    "none": [[], [], [], []],
    "thousand": [THOUSAND, [[10, 5, 35, 25]], [], []],
}


def learned(name: str, kind: str, images: slice) -> Learned:
    """Return the gradients of these images' losses by name, and Dynamic R-CNN's notes. Nothing is random."""
    torch.manual_seed(0)
    with float64():
        near = (
            ["model.head.box_norm=stride"] if name == "vfnet" else []
        )  # its weights, overlaps, must be more than one per process
        detector = make(name, *near, everything=True, norm_eval=True).double().train()
        livelier(detector)
        dynamic = [stage for stage in detector.modules() if isinstance(stage, DynamicStage)]
        data = batch(*(target(boxes, size=SIZE) for boxes in OBJECTS[kind]), size=SIZE)
        assert data.targets is not None
        part = Batch(
            data.images[images], data.sizes[images], data.ids[images], data.scales[images], data.targets[images]
        )
        total(detector, part).backward()
    assert not without_gradient(detector)
    notes = {key: float(getattr(stage, key)[0]) for stage in dynamic for key in ("overlaps", "shifts")}
    return {k: p.grad for k, p in detector.named_parameters()} | notes


def work(rank: int, folder: Path) -> None:
    """Save the gradients of one of two processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    gradients = {
        (name, kind): learned(name, kind, slice(2 * rank, 2 * rank + 2)) for name in DETECTORS for kind in OBJECTS
    }
    torch.save(gradients, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], Learned]]:
    """The gradients of each of two processes."""
    folder = tmp_path_factory.mktemp("two")
    processes = [SERVER.Process(target=work, args=(rank, folder)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.slow  # test_distributed.py compares the gradients of two processes in every run
@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("kind", OBJECTS)
def test_two_processes_learn_what_one_does(two: list[dict[tuple[str, str], Learned]], name: str, kind: str) -> None:
    expected = learned(name, kind, slice(4))
    first, second = (side[name, kind] for side in two)
    assert set(first) == set(second) == set(expected)
    notes = {key for key, value in expected.items() if isinstance(value, float)}
    assert notes == ({"overlaps", "shifts"} if name == "dynamic_rcnn" else set())
    # no positive at all counts as one in each process, where divisors are of the batch
    share = 2 if kind == "none" and name in ("fcos", "vfnet") else 1
    largest = max(float(expected[key].abs().max()) for key in expected.keys() - notes)
    for key in expected.keys() - notes:
        mean = (first[key] + second[key]) / 2
        assert torch.allclose(mean * share, expected[key], rtol=1e-6, atol=1e-9 * largest), key
    if notes:  # overlaps are means over images, shifts of the positives of each process
        assert first["overlaps"] == second["overlaps"] == pytest.approx(expected["overlaps"])
        assert first["shifts"] == second["shifts"]
        assert (first["shifts"] < 0) is (kind == "none")
