"""Several processes: the device of this one, the process group they form, and what they do in it."""

import atexit
import itertools
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import distributed

from fusedet.api.predictor import pick_device
from fusedet.config import Config, Train
from fusedet.engine.precision import fabric_precision
from fusedet.errors import InputError
from fusedet.process_ranks import get_ranks

TIMEOUT = timedelta(minutes=30)
"""How long a process waits in a collective operation for the others."""
_GROUPS = itertools.count()


def select_device(name: str) -> torch.device:
    """Return the device of that name; of several GPUs, where it names none, the one of this process's local rank.

    Raises:
        InputError: This machine does not have the device.
    """
    device = pick_device(name)
    if device.type == "cuda" and device.index is None and get_ranks()[1] > 1:
        return torch.device("cuda", get_ranks()[2] % torch.cuda.device_count())
    return device


@contextmanager
def process_group(config: Config) -> Iterator[Fabric]:
    """Launch Fabric on the config's device in torchrun's processes, and end their group afterwards.

    After success the processes end the group at the same time. After an error or an interruption the others may be
    gone, so no process waits.

    Raises:
        InputError: The machines have different numbers of processes, or the device does not have the precision.
    """
    fabric = _launch_fabric(config)
    try:
        yield fabric
        fabric.barrier()
    finally:
        destroy_process_group()


@contextmanager
def join_processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """Yield this process's rank, the world size, and its device; of several processes, in a process group."""
    rank, world, _ = get_ranks()
    if world == 1:
        yield rank, world, pick_device(device)
        return
    with process_group(Config(device=device, train=Train(precision="fp32"))) as fabric:
        yield rank, world, fabric.device


def _launch_fabric(config: Config) -> Fabric:
    device = pick_device(config.device)
    _, world, _ = get_ranks()
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
        strategy="ddp" if world > 1 else "auto",
        precision=fabric_precision(config.train.precision, device),
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


def destroy_process_group(seconds: float = 20.0) -> None:
    """End this process's group, if it has joined one.

    Where another process is gone, the backend may wait for it without end. After `seconds` this function gives up, and
    the process exits with 1 at its end. torchrun allows 30 seconds between SIGTERM and SIGKILL.
    """
    if not distributed.is_available() or not distributed.is_initialized():
        return
    thread = threading.Thread(target=distributed.destroy_process_group, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        atexit.register(_exit_at_once)


def _exit_at_once() -> None:
    """Exit without the destructors of the group's threads, which would abort the process or wait again."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def run_on_first(fabric: Fabric, action: Callable[[], object]) -> None:
    """Run an action in the first process; an InputError of it is raised in all processes."""
    problem: str | None = None
    if fabric.is_global_zero:
        try:
            action()
        except InputError as error:
            problem = str(error)
    if problem := fabric.broadcast(problem):
        raise InputError(problem)
