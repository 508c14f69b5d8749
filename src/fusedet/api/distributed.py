"""Several processes: which ones a launcher has started, and what they do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from fusedet.api.predict import pick_device
from fusedet.config import Config, Train
from fusedet.engine import shards, trainer
from fusedet.engine.peers import Peers
from fusedet.errors import InputError


def place() -> tuple[int, int, int]:
    """This process's number among all, how many there are, and its number on its machine, from torchrun's variables.

    Raises InputError for values that are no such numbers.
    """
    texts = {
        name: os.environ.get(name, default)
        for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    }
    if not all(text.isdecimal() for text in texts.values()) or not int(texts["RANK"]) < int(texts["WORLD_SIZE"]):
        raise InputError(
            f"{', '.join(f'{k}={v}' for k, v in texts.items())}: these are to be whole numbers with RANK below WORLD_SIZE"
        )
    return int(texts["RANK"]), int(texts["WORLD_SIZE"]), int(texts["LOCAL_RANK"])


def own_device(name: str) -> torch.device:
    """The device of that name; of several GPUs that are not told apart by it, the one of this process's number on its machine."""
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and place()[1] > 1:
        return torch.device("cuda", place()[2] % torch.cuda.device_count())
    return device


def make_fabric(config: Config) -> Fabric:
    """Fabric on the config's device, in as many processes as torchrun has started.

    Raises InputError for a strategy that they cannot have, and where the machines have different numbers of processes.
    """
    device = pick_device(config.device)
    _, world, _ = place()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world)) or 1
    if world % local:
        raise InputError(
            f"{world} processes, {local} of them on this machine: start the same number of processes on each machine"
        )
    devices: Any = local if world > 1 or device.index is None else [device.index]
    fabric = Fabric(
        accelerator=device.type,
        devices=devices,
        num_nodes=world // local,
        strategy=strategy(config, world),
        precision=trainer.precision(config.train.precision, device),  # type: ignore[arg-type]
    )
    fabric.launch()
    return fabric


@contextmanager
def shared(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """This process's number, how many there are, and its device; of several, each is told when another one is gone."""
    rank, world, _ = place()
    if world == 1:
        yield rank, world, pick_device(device)
        return
    fabric = make_fabric(Config(device=device, train=Train(precision="fp32")))
    with Peers(fabric, Path()):
        yield rank, world, fabric.device


def strategy(config: Config, world: int) -> Any:
    """Fabric's strategy for train.strategy. Raises InputError for what fsdp does not go with."""
    train = config.train
    if train.strategy != "fsdp":
        return "ddp" if world > 1 else "auto"
    if world == 1:
        raise InputError(
            "train.strategy=fsdp shares the weights out among processes: start several with torchrun, or leave it at auto"
        )
    if train.precision == "fp16":
        raise InputError(
            "train.strategy=fsdp does not go with train.precision=fp16, whose scale must be of all: use bf16 or fp32"
        )
    if train.compile:
        raise InputError("train.strategy=fsdp does not go with train.compile=true: leave one of them out")
    return shards.strategy(world)


def together(fabric: Fabric, action: Callable[[], object]) -> None:
    """Let the first process act; a user's mistake that it meets is raised in all of them."""
    problem: str | None = None
    if fabric.is_global_zero:
        try:
            action()
        except InputError as error:
            problem = str(error)
    if problem := fabric.broadcast(problem):
        raise InputError(problem)


def silent(text: str) -> None:
    """What the other processes say."""
