"""Collective communication between the processes of a training or an evaluation."""

from typing import TypeVar

from torch import distributed

ValueT = TypeVar("ValueT")


def count_processes() -> int:
    """Return the number of processes of the group; 1 without a group."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gather_objects(value: ValueT) -> list[ValueT]:
    """Return the objects of all processes, in the order of their ranks. All processes call it."""
    if (count := count_processes()) == 1:
        return [value]
    objects = [value] * count
    distributed.all_gather_object(objects, value)
    return objects
