"""A detector and a loader of a few lines, for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from fusedet.ops.losses import mean_over_ranks
from fusedet.types import Batch, Detections, Target


class FakeDetector(nn.Module):
    """Predicts a picture's boxes from its mean colour; the losses are sums over objects by the shared count of objects."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 4))
        self.score = nn.Linear(3, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        colour = images.float().mean(dim=(2, 3)) / 255
        return self.body(colour), self.score(colour)[:, 0]

    loss_weights: ClassVar[dict[str, float]] = {"loss_box": 1.0, "loss_score": 1.0}

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        boxes, scores = self(batch.images)  # (N, 4), (N,)
        assert batch.targets is not None
        counts = torch.tensor([len(target) for target in batch.targets], device=boxes.device)
        normaliser = mean_over_ranks(counts.sum())
        box = sum((boxes[i].float() - target.boxes / 32).abs().sum() for i, target in enumerate(batch.targets))
        score = nn.functional.softplus(-scores.float() * (counts > 0)).sum()
        return {"loss_box": box / normaliser, "loss_score": score / normaliser}

    def predict(self, batch: Batch) -> list[Detections]:
        boxes, scores = self(batch.images)
        label = torch.zeros(1, dtype=torch.int64, device=boxes.device)
        return [Detections(32 * box[None], score[None].sigmoid(), label) for box, score in zip(boxes, scores)]


class FakeLoader:
    """`length` batches of random pictures, a function of (epoch, number); `change` may spoil a batch."""

    def __init__(self, length: int = 7, size: int = 4, change: Callable[[int, int, Batch], Batch] = lambda e, i, batch: batch) -> None:
        self.length, self.size, self.change = length, size, change

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
