"""The largest batch whose training step fits into memory, for train.batch=auto."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fusedet.engine import rng
from fusedet.engine.buffers import preserved_buffers
from fusedet.models.detectors import DetectorModule
from fusedet.models.ops.losses import normalizing_locally
from fusedet.types import MULTIPLE, Batch, Target

MAX_BATCH = 64
"""The largest batch that is chosen: linear scaling of the learning rate is not known to hold far beyond."""

_GPU_SHARE = 0.9  # of the memory that a step may take; the rest is for fragmentation and batches of other sizes
_CPU_SHARE = 0.5  # of the available memory: worker processes and the evaluation need some too
_BACKWARD = 1.5  # the memory of a step, as a multiple of the activations that the backward pass needs
_OBJECTS = 20  # per image of a trial


def find_largest(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number of 1..limit that fits, by doubling and bisection; 1 is not tried.

    >>> find_largest(lambda n: n <= 23, 64)
    23
    """
    good, bad = 1, 2
    while bad <= limit and fits(bad):
        good, bad = bad, 2 * bad
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        if fits(middle):
            good = middle
        else:
            bad = middle
    return good


def find_batch(
    fabric: Fabric,
    detector: DetectorModule,
    size: tuple[int, int],
    *,
    states: int,
    masks: bool,
    limit: int,
    channels: int = 3,
) -> int:
    """Return how many images per process fit into a training step; the detector stays as it is.

    On a GPU, steps of growing batches are tried. On a CPU, where memory is swapped rather than refused, the activations
    of one image are measured, and a batch may take half of the memory that is available to each process.

    Args:
        fabric: Its device and precision are used.
        detector: On the device, in training mode.
        size: (height, width) of the largest batch, before rounding up.
        states: Tensors that the optimizer and the averaged weights keep per weight.
        masks: Whether targets have masks.
        limit: The largest number that is tried.
        channels: Channels of the images.
    """

    def step(count: int) -> None:
        batch = _make_batch(count, (channels, *size), masks).to(fabric.device)
        with fabric.autocast(), normalizing_locally():
            terms = detector.loss(batch)
        torch.stack([value.float() for value in terms.values()]).sum().backward()
        detector.zero_grad(set_to_none=True)

    with rng.preserve_states(), preserved_buffers(detector):
        if fabric.device.type == "cuda":
            return find_largest(lambda count: _fits_gpu(step, count, detector, states, fabric.device), limit)
        weights = sum(p.numel() * p.element_size() for p in detector.parameters())
        available = _CPU_SHARE * read_available_memory() / fabric.world_size - weights * (1 + states)
        return min(limit, max(1, int(available / (_BACKWARD * _measure_activations(step, detector)))))


def _fits_gpu(step: Callable[[int], None], count: int, detector: nn.Module, states: int, device: torch.device) -> bool:
    try:
        reserved = [torch.empty_like(p) for p in detector.parameters() if p.requires_grad for _ in range(states)]
        torch.cuda.reset_peak_memory_stats(device)
        step(count)
        peak = torch.cuda.max_memory_reserved(device)
        del reserved
    except torch.cuda.OutOfMemoryError:
        return False
    finally:
        detector.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return peak <= _GPU_SHARE * torch.cuda.get_device_properties(device).total_memory


def _measure_activations(step: Callable[[int], None], detector: nn.Module) -> int:
    """Return the bytes that the backward pass of one image keeps, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in detector.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        step(1)
    return max(1, sum(kept.values()))


def _make_batch(count: int, shape: tuple[int, int, int], masks: bool) -> Batch:
    """Return random images with as many objects as usual, of mixed sizes."""
    height, width = (-(-side // MULTIPLE) * MULTIPLE for side in shape[1:])
    corners = torch.rand(_OBJECTS, 2) * torch.tensor([width, height]) * 0.75
    sides = torch.logspace(-1.2, -0.6, _OBJECTS)[:, None] * min(height, width)
    boxes = torch.cat([corners, corners + sides], dim=1)
    own = torch.ones(_OBJECTS, height, width, dtype=torch.bool) if masks else None
    target = Target(boxes, torch.zeros(_OBJECTS, dtype=torch.int64), own, boxes[:0])
    return Batch(
        images=torch.randint(256, (count, shape[0], height, width), dtype=torch.uint8),
        sizes=torch.tensor([[height, width]] * count),
        ids=tuple(range(count)),
        scales=torch.ones(count, 2),
        targets=(target,) * count,
    )


def read_available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this process may still take: of the machine, and of its control groups.

    Args:
        root: Where `proc` and `sys` are.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for folder, (limit, used, cache) in _find_control_groups(root):
        try:
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(statistics.get(cache, 0))  # the kernel gives cached files back
            taken = int((folder / used).read_text()) - cached
            available = min(available, int((folder / limit).read_text()) - taken)
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return max(0, available)


_GROUP_FILES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Names of the limit, the usage and the statistic of cached files, by the controller in /proc/self/cgroup."""


def _find_control_groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Yield the folders of this process's groups for memory and of their parents, with the names of their files."""
    try:
        lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        lines = []
    own = {controller: path for _, controllers, path in lines for controller in controllers.split(",")}
    for controller, files in _GROUP_FILES.items():
        mount, path = root / "sys/fs/cgroup" / controller, own.get(controller, "/").strip("/")
        for folder in (mount / path, *(mount / path).parents):
            yield folder, files
            if folder == mount:
                break
