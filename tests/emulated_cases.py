"""Detectors, a training and planted faults on the emulated CUDA device, in a process of its own.

    python tests/emulated_cases.py retinanet mask_rcnn+modules trainer commands faults

prints a JSON object per case: where the host waited, what CUDA would have refused, and the difference to the CPU.
"""

from __future__ import annotations

import copy
import json
import math
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedet
from emulated_device import EmulatedDevice
from fusedet.models.detectors import create_model
from fusedet.types import Batch, Detections, Losses, Target

ROOT = Path(fusedet.__file__).parent
BACKBONE = "model.backbone.name=resnet10t"
MODULES = (
    "model.plugin={type: msfm, scales: [0.5, 1, 2], conv_num: 1}",
    "model.neck=[mse_fpn,smsl]",
)
SMALL = ("model.backbone.name=test_resnet", "model.pyramid.channels=16", "model.head.convs=1", "model.head.norm=false")
COUNTS = (3, 5, 2, 4)
"""Instances of the images of a batch."""


def make_batch(images: int, height: int = 64, width: int = 96, seed: int = 0) -> Batch:
    """Return random images with instances and masks, each image smaller than the one before."""
    draw = torch.Generator().manual_seed(seed)
    sizes = [(height - 8 * i, width - 8 * i) for i in range(images)]
    targets = []
    for count, (h, w) in zip(COUNTS, sizes):
        corners = torch.rand(count, 2, generator=draw) * torch.tensor([w / 2, h / 2])
        boxes = torch.cat([corners, corners + 12 + torch.rand(count, 2, generator=draw) * 24], dim=1)
        masks = torch.rand(count, height, width, generator=draw) > 0.5
        targets.append(Target(boxes, torch.arange(count) % 3, masks))
    pixels = torch.randint(0, 256, (images, 3, height, width), dtype=torch.uint8, generator=draw)
    return Batch(pixels, torch.tensor(sizes), tuple(range(images)), torch.ones(images, 2), tuple(targets))


def make_detector(name: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    fixed = ("model.backbone.pretrained=false", "test.score=0.001")
    if (ROOT / "configs/models" / f"{name}_tiny.yaml").exists():
        return create_model(f"{name}_tiny", *fixed, *overrides, num_classes=3)
    small = ("model.pyramid.channels=64", "model.head.convs=2")
    return create_model(f"{name}_r50", *fixed, *small, *overrides, num_classes=3)


def difference(values: Any, expected: Any) -> float:
    """Return the largest difference of two collections of tensors, relative to the larger of 1 and the value."""
    largest = 0.0
    for value, reference in zip(values, expected, strict=True):
        value, reference = value.detach().cpu().float(), reference.detach().float()
        assert value.shape == reference.shape, (value.shape, reference.shape)
        if value.numel():
            largest = max(largest, float(((value - reference).abs() / reference.abs().clamp(min=1)).max()))
    return largest


def listed(detections: list[Detections]) -> list[Tensor]:
    """Return the tensors of detections, masks too."""
    return [
        tensor for one in detections for tensor in (one.boxes, one.scores, one.labels, one.masks) if tensor is not None
    ]


def compute_losses(detector: Any, batch: Batch) -> Losses:
    torch.manual_seed(1)  # samplers draw
    return detector.loss(batch)


def run_detector(name: str, *overrides: str) -> dict[str, Any]:
    """Compare a detector with itself on the CPU, and count the waits of a training step and a prediction.

    The first step is in float32 and of 2 images, the second one in bf16 and of 3, with AdamW and clipping.
    """
    detector = make_detector(name, BACKBONE, *overrides)
    batches = {n: make_batch(n) for n in (2, 3)}
    on_cpu = copy.deepcopy(detector)
    detections = on_cpu.eval().predict(batches[2])
    losses = compute_losses(on_cpu.train(), batches[2])
    waits: dict[str, dict[int, Counter[tuple[str, str]]]] = {"step": {}, "predict": {}}
    differences = {}
    with EmulatedDevice(ROOT, strict=False) as device:
        batches = {n: batch.pin_memory().to("cuda", non_blocking=True) for n, batch in batches.items()}
        for n, batch in batches.items():
            module = copy.deepcopy(detector).to("cuda")
            device.occurrences.clear()
            observed = module.eval().predict(batch)
            waits["predict"][n] = device.waits()
            optimizer = torch.optim.AdamW(module.train().parameters())
            device.occurrences.clear()
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=n == 3):
                terms = compute_losses(module, batch)
            sum(terms.values()).backward()  # type: ignore[union-attr]
            if n == 3:
                torch.nn.utils.clip_grad_norm_(module.parameters(), 10.0)
                optimizer.step()
            waits["step"][n] = device.waits()
            notes = device.waits("note")
            if n == 2:
                differences = {
                    "detections": difference(listed(observed), listed(detections)),
                    "losses": difference(terms.values(), losses.values()),
                }
    return {
        "waits": {kind: {n: sum(c.values()) for n, c in rows.items()} for kind, rows in waits.items()},
        "lines": {kind: describe(rows[3]) for kind, rows in waits.items()},
        "notes": describe(notes),
        "detected": sum(map(len, detections)),
        "difference": differences,
        "faults": dict(device.faults),
    }


def describe(counter: Counter[tuple[str, str]]) -> list[str]:
    """Return a line of text per place."""
    return [f"{count} x {what} in {where}" for (what, where), count in counter.most_common()]


# -- planted faults


def read_too_soon(x: Tensor) -> Tensor:
    """Read a copy before its event."""
    early = x.mean().to("cpu", non_blocking=True)
    return x * torch.full_like(x, early.item())


def run_in_float64(x: Tensor) -> Tensor:
    return (x.double() * 2).float() / 2


def use_cpu_autocast(x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return x * 1


FAULTS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "a tensor of the CPU in a sum": ("refused", lambda x: x + torch.ones(x.shape[-1])),
    "a tensor of the CPU in a concatenation": ("refused", lambda x: torch.cat([x, torch.ones(x.shape)])),
    "an index on the CPU in gather": ("refused", lambda x: x.flatten().gather(0, torch.zeros(1, dtype=torch.int64))),
    "a generator of the CPU": (
        "refused",
        lambda x: torch.rand(3, device=x.device, generator=torch.Generator().manual_seed(0)),
    ),
    "a product of integers": ("refused", lambda x: x.flatten(0, 2).long() @ x.flatten(0, 2).long().mT),
    "a conversion to numpy": ("refused", lambda x: x.detach().numpy()),
    "an index on the CPU": ("wait", lambda x: x[torch.zeros(1, dtype=torch.int64)]),
    "item": ("wait", lambda x: x.sum().item()),
    "a condition on a tensor": ("wait", lambda x: 1 if x.sum() > 0 else 0),
    "tolist": ("wait", lambda x: x[0, 0, 0].tolist()),
    "a boolean index": ("wait", lambda x: x[x > 0]),
    "an assignment to a boolean index": ("wait", lambda x: x.detach().clone().__setitem__(x > 0, x.detach()[x > 0])),
    "nonzero": ("wait", lambda x: x.nonzero()),
    "a tensor from a list": ("wait", lambda x: x.new_tensor([1.0, 2.0])),
    "a blocking download": ("wait", lambda x: x.cpu()),
    "repeat_interleave without a size": ("wait", lambda x: x[0, 0, 0].repeat_interleave((x[0, 0, 0] > 0).long())),
    "unique": ("wait", lambda x: x.unique()),
    "a pageable upload": ("copy", lambda x: torch.ones(3).to(x.device, non_blocking=True)),
    "float64": ("note", run_in_float64),
    "autocast of the CPU": ("note", use_cpu_autocast),
    "a copy that is read before its event": ("wrong", read_too_soon),
}
"""Kind of notice and the faulty code, by name. The code runs on the finest feature map of a detector."""


class Faulty(nn.Module):
    """A neck with a planted fault."""

    def __init__(self, neck: nn.Module, fault: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.neck, self.fault = neck, fault
        self.levels = neck.levels

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        first, *rest = self.neck(features)
        changed = self.fault(first)
        is_map = isinstance(changed, Tensor) and changed.shape == first.shape and changed.device == first.device
        return [changed if is_map else first, *rest]


def run_faults() -> dict[str, Any]:
    """Plant each fault into a detector's neck, and return how it was noticed; the first entry has no fault."""
    detector = make_detector("retinanet", *SMALL)
    noticed: dict[str, list[str]] = {}
    with EmulatedDevice(ROOT) as device:
        batch = make_batch(1, 64, 64).pin_memory().to("cuda", non_blocking=True)
        detector.to("cuda").train()
        neck = detector.neck
        usual: dict[str, Counter[tuple[str, str]]] = {}
        for name, (_, fault) in {"none": ("", lambda x: x), **FAULTS}.items():
            detector.neck = Faulty(neck, fault)
            device.occurrences.clear()
            signs = []
            try:
                with torch.no_grad():
                    loss = torch.stack(list(detector.loss(batch).values())).sum()
            except (RuntimeError, TypeError) as error:
                signs.append(f"refused: {error}")
                loss = None
            observed = {kind: device.waits(kind) for kind in ("wait", "note", "copy")}
            if name == "none":
                usual = observed
            for kind, counter in observed.items():
                signs += [f"{kind}: {what}" for what, _ in counter - usual.get(kind, Counter())]
            if loss is not None and not math.isfinite(loss.item()):
                signs.append("wrong: the loss is not finite")
            noticed[name] = [sign for sign in signs if not sign.startswith("copy") or "pageable" in sign]
    return {"noticed": noticed, "expected": {name: kind for name, (kind, _) in FAULTS.items()}}


def run_case(name: str) -> dict[str, Any]:
    if name == "faults":
        return run_faults()
    if name in ("trainer", "evaluation", "commands"):
        import emulated_training  # its imports take seconds

        return emulated_training.CASES[name]()
    name, _, modules = name.partition("+")
    interaction = () if "rcnn" in name else ("model.interact=msil",)
    return run_detector(name, *(MODULES + interaction if modules else ()))


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:]:
        warnings.simplefilter("ignore")
        started = time.process_time()
        row = {"case": name, **run_case(name)}
        print(json.dumps(row | {"seconds": round(time.process_time() - started, 2)}), flush=True)


if __name__ == "__main__":
    main()
