"""Reference numbers of one case, and comparisons of both sides."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from fusedet.types import Batch, Detections, Target

Errors = dict[str, float]
LIMITS = {"features": 1e-4, "raw": 1e-4, "losses": 1e-4, "gradients": 1e-3, "norms": 1e-3, "unmatched": 0.0}


class Case:
    """Reference numbers of one case."""

    def __init__(self, path: Path) -> None:
        self.spec = json.loads(path.read_text())
        self.tensors = load_file(path.with_suffix(".safetensors"))
        self.sizes = torch.tensor(self.spec["image_shapes"])
        self.config = self.spec["config"]

    def state(self, renames: list[tuple[str, str]]) -> dict[str, Tensor]:
        """Return MMDetection's weights by our names."""
        weights = {key.removeprefix("state."): x for key, x in self.tensors.items() if key.startswith("state.")}
        return {renamed(name, renames): x for name, x in weights.items()}

    def levels(self, prefix: str) -> list[Tensor]:
        """Return the tensors PREFIX.0, PREFIX.1, ..."""
        levels: list[Tensor] = []
        while (key := f"{prefix}.{len(levels)}") in self.tensors:
            levels.append(self.tensors[key])
        return levels

    def targets(self) -> list[Target]:
        """Return one target per image."""
        shapes = range(len(self.sizes))
        return [Target(self.tensors[f"in.gt.{i}.boxes"], self.tensors[f"in.gt.{i}.labels"]) for i in shapes]

    def batch(self) -> Batch:
        """Return a batch of black images with the case's sizes and targets."""
        images = torch.zeros(len(self.sizes), 3, *self.spec["batch_shape"], dtype=torch.uint8)
        return Batch(images, self.sizes, tuple(range(len(images))), torch.ones(len(images), 2), tuple(self.targets()))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Return the largest difference over the largest magnitude."""
    if ours.shape != theirs.shape or not ours.isfinite().all():
        return float("inf")
    ours = ours.detach()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Return the largest `relative` over levels; both sides must have as many."""
    return max(relative(a, b) for a, b in zip(ours, theirs, strict=True))


def unmatched(ours: Detections, boxes: Tensor, scores: Tensor, labels: Tensor) -> int:
    """Count the detections of either side without a partner on the other."""
    close = (ours.boxes[:, None] - boxes[None]).abs().amax(dim=2) <= 0.01
    close &= (ours.scores[:, None] - scores[None]).abs() <= 1e-4
    close &= ours.labels[:, None] == labels[None]
    pairs = 0
    for row in close:  # each detection has one partner at most
        free = row.nonzero()
        if len(free):
            close[:, free[0]] = False
            pairs += 1
    return len(ours) + len(boxes) - 2 * pairs


def renamed(name: str, renames: list[tuple[str, str]]) -> str:
    """Apply patterns to a weight's name."""
    for old, new in renames:
        name = re.sub(old, new, name)
    return name
