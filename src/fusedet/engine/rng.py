"""The random states of a process, as plain values that a checkpoint can hold."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def capture_states() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators, and of the current GPU's where CUDA is in use."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_states(states: Mapping[str, Any]) -> None:
    """Restore the states that `capture_states` has returned."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


def seed(number: int) -> None:
    """Seed all generators with one number."""
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


def seed_from(*numbers: int) -> None:
    """Seed all generators with states that are a function of these numbers."""
    states = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(states[0]))
    np.random.seed(int(states[1]))
    torch.manual_seed(int(states[2]))


@contextlib.contextmanager
def preserve_states() -> Iterator[None]:
    """Restore the states of all generators afterwards.

    A data loader draws a seed when it starts. A run that goes on in the middle of an epoch would draw once more than
    one that was never interrupted, and its dropout would differ.
    """
    states = capture_states()
    try:
        yield
    finally:
        restore_states(states)
