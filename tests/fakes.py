"""What several tests share: a detector and a loader of a few lines, random inputs, and the contract of every head."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fusedet.models.ops.losses import mean_over_ranks
from fusedet.types import Batch, Detections, Features, Levels, Target


def load_benchmark(name: str) -> ModuleType:
    """A script of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(
        name, Path(__file__).resolve().parents[1] / "benchmarks" / f"{name}.py"
    )
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class FakeDetector(nn.Module):
    """Predicts an image's boxes from its mean color.

    The losses are sums over the objects, divided by the mean number of objects over the processes.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.score = nn.Linear(3, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        color = images.float().mean(dim=(2, 3)) / 255
        return self.body(color), self.score(color)[:, 0]

    loss_weights: ClassVar[dict[str, float]] = {"loss_box": 1.0, "loss_score": 1.0}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        boxes, scores = self(batch.images)  # (N, 4), (N,)
        assert batch.targets is not None
        counts = torch.tensor([len(target) for target in batch.targets], device=boxes.device)
        normalizer = mean_over_ranks(counts.sum())
        box = sum((boxes[i].float() - target.boxes / 32).abs().sum() for i, target in enumerate(batch.targets))
        score = nn.functional.softplus(-scores.float() * (counts > 0)).sum()
        return {"loss_box": box / normalizer, "loss_score": score / normalizer}

    def predict(self, batch: Batch) -> list[Detections]:
        boxes, scores = self(batch.images)
        label = torch.zeros(1, dtype=torch.int64, device=boxes.device)
        return [Detections(32 * box[None], score[None].sigmoid(), label) for box, score in zip(boxes, scores)]


class FakeLoader:
    """`length` batches of random images, a function of (epoch, number); `change` may spoil a batch."""

    def __init__(
        self, length: int = 7, size: int = 4, change: Callable[[int, int, Batch], Batch] = lambda e, i, batch: batch
    ) -> None:
        self.length, self.size, self.batch, self.change = length, size, size, change

    def __len__(self) -> int:
        return self.length

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        torch.rand(1)  # as a DataLoader, which draws a seed when it starts
        for number in range(start, self.length):
            yield self.change(epoch, number, make_batch(100 * epoch + number, self.size))


def make_batch(seed: int, size: int) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (size, 3, 8, 8), generator=draw, dtype=torch.uint8)
    counts = torch.randint(0, 4, (size,), generator=draw).tolist()
    targets = tuple(Target(torch.rand(n, 4, generator=draw) * 32, torch.zeros(n, dtype=torch.int64)) for n in counts)
    ids = tuple(seed * size + i for i in range(size))
    return Batch(images, torch.full((size, 2), 8), ids, torch.ones(size, 2), targets)


def batch(*targets: Target, size: tuple[int, int] = (64, 96)) -> Batch:
    """One random image of that size for each target."""
    n = len(targets)
    images = torch.randint(0, 256, (n, 3, *size), dtype=torch.uint8)
    return Batch(images, torch.tensor([size] * n), tuple(range(n)), torch.ones(n, 2), targets)


def objects(boxes: list, labels: list | None = None) -> Target:
    """Boxes (x1, y1, x2, y2), of class 0 by default."""
    box_tensor = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
    return Target(box_tensor, torch.tensor(labels or [0] * len(box_tensor), dtype=torch.int64))


def many(count: int, width: float, height: float) -> Target:
    """Objects of sides 2 to 62 whose first corners lie in width x height."""
    corner = torch.rand(count, 2) * torch.tensor([width, height])
    return objects(torch.cat([corner, corner + 2 + 60 * torch.rand(count, 2)], dim=1).tolist())


def maps(levels: Levels, size: tuple[int, int] = (64, 96), n: int = 2, dtype: torch.dtype = torch.float32) -> Features:
    """Random maps of these levels for images of that size, every side rounded up."""
    sides = [(math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in levels.strides]
    return [torch.randn(n, c, *side, dtype=dtype) for c, side in zip(levels.channels, sides)]


def shuffled(module: nn.Module, std: float = 0.5) -> Any:
    """Every parameter and statistic random, so that none hides behind a zero or a one."""
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return module


class Swap(nn.Module):
    """An interaction that gives each branch the other's map."""

    def forward(self, cls: Tensor, reg: Tensor) -> tuple[Tensor, Tensor]:
        return reg, cls


def swaps_branches(make: Callable[..., Any], features: Features) -> bool:
    """Whether a head, made by make(interact=...), with such an interaction is the head whose towers are swapped."""
    plain, swapped = make(), make(interact=lambda channels: Swap())
    swapped.load_state_dict(plain.state_dict())
    plain.towers.cls, plain.towers.reg = plain.towers.reg, plain.towers.cls
    ours, theirs = plain(features).maps, swapped(features).maps
    return all(torch.equal(a, b) for name in ours for a, b in zip(ours[name], theirs[name], strict=True))


class LargestTensor(TorchDispatchMode):
    """Note the number of elements of the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.elements = max(self.elements, tensor.numel() if isinstance(tensor, Tensor) else 0)
        return result


class Call(nn.Module):
    """A function of a module as a module of its own, which torch can export."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *inputs: Any) -> Any:
        return self.function(self.module, *inputs)


def detect(detector: Any, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
    """Detect as a tuple of tensors."""
    return tuple(x for x in detector.detect(images, sizes) if x is not None)


def check_export(module: nn.Module, inputs: tuple[Any, ...], other_inputs: tuple[Any, ...], atol: float = 1e-4) -> Any:
    """Export a module, compare the program with it on other inputs, and return the module's outputs."""
    exported = torch.export.export(module, inputs, strict=False).module()
    with torch.no_grad():
        ours, theirs = module(*other_inputs), exported(*other_inputs)
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else zip(ours, theirs, strict=True)
    assert all(torch.allclose(a.float(), b.float(), atol=atol) for a, b in pairs)
    return ours
