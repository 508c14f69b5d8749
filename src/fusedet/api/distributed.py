"""Several processes: which ones a launcher has started, and what they do together."""

from __future__ import annotations

import atexit
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import distributed

from fusedet.api.predict import pick_device
from fusedet.config import Config, Train
from fusedet.engine import shards, trainer
from fusedet.engine.peers import Peers
from fusedet.errors import InputError

TIMEOUT = timedelta(minutes=30)
"""How long a process waits in a collective operation for the others."""
_GROUPS = itertools.count()


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
    if world > 1:
        _join_process_group("nccl" if device.type == "cuda" else "gloo")
    fabric.launch()
    return fabric


def _join_process_group(backend: str) -> None:
    """Join the group that Fabric then finds.

    The launcher's store outlives a group. Each group of a process therefore has keys of its own, else a second one
    (`fusedet.train`, then `fusedet.validate`) would connect to the addresses of the first.
    """
    store, rank, world = next(distributed.rendezvous("env://"))
    own = distributed.PrefixStore(f"fusedet/{next(_GROUPS)}", store)
    distributed.init_process_group(backend, store=own, rank=rank, world_size=world, timeout=TIMEOUT)


@contextmanager
def process_group(config: Config) -> Iterator[Fabric]:
    """Launch Fabric as `make_fabric` does, and end its process group however the block ends.

    After success the processes end it at the same time. After an error or an interruption the others may be gone, so none waits.
    """
    fabric = make_fabric(config)
    try:
        yield fabric
        fabric.barrier()
    finally:
        destroy_process_group()


def destroy_process_group(seconds: float = 20.0) -> None:
    """End this process's group, if it has joined one.

    Where another process is gone, the backend may wait for it without end. After `seconds` this function gives up, and the process
    then exits with 1 as soon as Python has ended. torchrun allows 30 seconds between SIGTERM and SIGKILL.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    thread = threading.Thread(target=distributed.destroy_process_group, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        atexit.register(_exit_at_once)


def _exit_at_once() -> None:
    """Leave without the destructors of the group's threads, which would abort the process or wait again."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


@contextmanager
def shared(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """This process's number, how many there are, and its device; of several, each is told when another one is gone."""
    rank, world, _ = place()
    if world == 1:
        yield rank, world, pick_device(device)
        return
    with process_group(Config(device=device, train=Train(precision="fp32"))) as fabric, Peers(fabric, Path()):
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
