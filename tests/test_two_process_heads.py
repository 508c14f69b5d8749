"""The gradients of two processes, averaged, are those of one process on the joint batch, for every further detector."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn

sys.path.insert(0, str(Path(__file__).parent))  # the spawned processes have no conftest

from fakes import batch
from fusedet.types import Batch
from small import ATSS_FAMILY, DOUBLE_HEAD, MATCHING, ON_FCOS, make, target

NAMES = [*ATSS_FAMILY, *MATCHING, *ON_FCOS, DOUBLE_HEAD]
# A divisor counts as at least 1 in each process, so that the gradients differ while its sum over two processes is below
# 2. Here it is larger: scores start higher for GFL's sum of scores, and initial boxes fit instances for DW's sum of
# 1 - P_neg and BorderDet's number of border positives.
OPTIONS = {"gfl": ["model.head.prior=0.5"], "gflv2": ["model.head.prior=0.5"]}
BOX_BIAS = {"dw": 1.5, "borderdet": 1.7}  # strides
FIRST = [target([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2]), target([[20, 8, 70, 60]], [1])]
SECOND = [target([[30, 2, 62, 40], [2, 30, 22, 60], [50, 20, 90, 50]], [1, 1, 0]), target([[8, 8, 40, 50]], [2])]
"""The instances of the images of each process."""


def images() -> Tensor:
    return torch.randint(0, 256, (4, 3, 64, 96), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def part(rank: int | None) -> Batch:
    """Return the images of a process, or all of them for None."""
    first, last, targets = {None: (0, 4, FIRST + SECOND), 0: (0, 2, FIRST), 1: (2, 4, SECOND)}[rank]
    made: Any = batch(*targets)
    made.images.copy_(images()[first:last])
    return made


def gradients(name: str, rank: int | None) -> dict[str, Tensor]:
    """Compute a detector's gradients of a process's batch; all BatchNorm is in eval mode."""
    torch.manual_seed(0)
    detector = make(name, *OPTIONS.get(name, []), everything=name == DOUBLE_HEAD).train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    if name in BOX_BIAS:
        nn.init.constant_(detector.head.reg.bias, BOX_BIAS[name])
    losses = detector.loss(part(rank))
    sum(losses[key] * weight for key, weight in detector.loss_weights.items()).backward()
    return {key: p.grad for key, p in detector.named_parameters() if p.grad is not None}


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        for name in NAMES:
            own = gradients(name, rank)
            for value in own.values():
                distributed.all_reduce(value)
                value /= 2
            if rank == 0:
                torch.save(own, Path(folder, f"{name}.pt"))
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def averaged(make_once: Callable[..., Path]) -> Path:
    """The folder of the averaged gradients of two processes."""
    return make_once("gradients", lambda folder: multiprocessing.spawn(run_process, (str(folder),), nprocs=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_have_the_gradients_of_one(name: str, averaged: Path) -> None:
    joint, mean = gradients(name, None), torch.load(averaged / f"{name}.pt")
    assert joint.keys() == mean.keys()
    for key, value in joint.items():
        assert torch.allclose(value, mean[key], rtol=1e-3, atol=1e-5 * max(1.0, float(value.abs().max()))), key
