"""Images without objects, with one, with a thousand, objects larger than the image and smaller than a pixel: all ten detectors."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fakes import batch
from fusedet.models.detectors import TwoStage
from fusedet.types import Batch, Target
from small import DETECTORS, ONE_STAGE, TWO_STAGE, float64, livelier, make, target, weighted, without_gradient

SMALL = (32, 48)
EMPTY = target([])
SOME = target([[4, 4, 30, 30], [10, 20, 60, 44], [40, 8, 90, 60]])
ONE = target([[20, 10, 70, 50]], [2])
HUGE = target([[-50, -40, 500, 400], [-20, 5, 60, 300]])  # beyond all four sides
POSITIVE = {  # the loss and the maps that tell which places answer for an object
    "retinanet": ("loss_box", "reg"),
    "fcos": ("loss_centerness", "centerness"),
    "vfnet": ("loss_refine", "refine"),
    "reppoints": ("loss_refine", "pts_refine"),
}


@cache
def thousand() -> Target:
    """Sides from 0.2 to 20 pixels, a third of them below one pixel; some reach outside."""
    torch.manual_seed(1)
    corner = torch.rand(1000, 2) * torch.tensor([95.0, 63.0])
    sides = torch.cat([0.2 + 0.7 * torch.rand(334, 2), 1 + 19 * torch.rand(666, 2)])
    return target(torch.cat([corner, corner + sides], dim=1))


def boxes_alone(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms that only objects can cost."""
    return {k: v for k, v in terms.items() if not k.endswith("cls")}


# -- every kind of batch


@pytest.mark.parametrize("name", DETECTORS)
def test_all_kinds_of_batches_train_and_predict(name: str) -> None:
    detector = make(name).train()
    kinds = ((EMPTY,), (EMPTY, EMPTY), (ONE,), (EMPTY, SOME), (thousand(), EMPTY), (HUGE, ONE))
    for targets in kinds:
        terms = detector.loss(batch(*targets))
        detector.zero_grad()
        weighted(detector, terms).backward()
        assert not without_gradient(detector), targets
        there = any(len(t) for t in targets)
        for key, value in boxes_alone(terms).items():
            assert (float(value.detach()) > 0) is there, key
            assert value.requires_grad
        assert all(float(v.detach()) > 0 for k, v in terms.items() if k.endswith("cls"))
        last = (
            [p for part in (detector.stages, detector.branches) for p in part.parameters()] if name in TWO_STAGE else []
        )
        if there:  # an object reaches the last layers of every stage and branch
            assert all(p.grad is not None and p.grad.any() for p in last)
    found = detector.eval().predict(batch(EMPTY, EMPTY))
    assert [d.boxes.isfinite().all() for d in found] == [True, True]


# -- gradients


class Held:
    """Calls that are replayed: what they gave once, they give again. So what a loss takes as constant is constant."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.place: int | None = None

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*args: Any, **options: Any) -> Any:
            if self.place is None:
                self.seen.append(call(*args, **options))
                return self.seen[-1]
            self.place += 1
            return self.seen[self.place - 1]

        return replayed


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("targets", [(SOME, EMPTY), (HUGE, ONE)], ids=["empty", "huge"])
def test_the_gradient_is_the_slope_of_the_loss(name: str, targets: tuple[Target, ...]) -> None:
    """Of every term, along a random direction of each part's parameters, in float64: what is detached, proposals and chance are held,
    and no assignment changes over so small a step. A ReLU or maximum that does is met by one of two steps alone."""
    with float64() as patch:
        detector = make(name).double().train()
        livelier(detector)
        data = batch(*(target(t.boxes, t.labels.tolist()) for t in targets))
        held, detach = Held(), torch.Tensor.detach
        patch.setattr(torch.Tensor, "detach", held(lambda x: detach(x).clone()))
        if isinstance(detector, TwoStage):
            detector.head.propose = held(detector.head.propose)

        def terms() -> dict[str, Tensor]:
            torch.manual_seed(5)
            return detector.loss(data)

        said = terms()
        for part, module in ((k, m) for k, m in detector.named_children() if list(m.parameters())):
            moved = list(module.parameters())
            direction = [torch.randn_like(p) for p in moved]
            gradients = {
                k: torch.autograd.grad(v, moved, retain_graph=True, materialize_grads=True) for k, v in said.items()
            }
            wrong = set(said)
            for step in (1e-8, 1e-9):
                ends = []
                for sign in (1, -2, 1) if wrong else ():
                    for p, d in zip(moved, direction):
                        p.data.add_(d, alpha=sign * step)
                    held.place = 0
                    ends.append(terms())
                    assert held.place == len(held.seen)
                for key in tuple(wrong):
                    slope = float((ends[0][key] - ends[1][key]).data) / (2 * step)
                    found = sum(float((g * d).sum()) for g, d in zip(gradients[key], direction))
                    if abs(slope - found) <= 1e-5 * sum(float(g.square().sum()) for g in gradients[key]) ** 0.5:
                        wrong.remove(key)
            assert not wrong, part


@pytest.mark.parametrize("name", ONE_STAGE)
def test_background_has_its_closed_form(name: str) -> None:
    """The slope of 3/4 p^2 * -log(1 - p), for every class and place of an image without objects, whatever the other one holds."""
    detector = make(name).train()
    for targets in ((SOME, EMPTY), (EMPTY, EMPTY)):
        outputs = detector(batch(*targets).images)
        losses = detector.head.loss(outputs, targets)
        box_maps = [m for k, column in outputs.maps.items() if k != "cls" for m in column]
        box_slopes = torch.autograd.grad(
            sum(boxes_alone(losses).values()), box_maps, retain_graph=True, allow_unused=True
        )
        assert not any(g[1].any() for g in box_slopes if g is not None)
        # whose places have a part in the box loss that shares its divisor with the scores
        term, key = POSITIVE[name]
        owned = [
            g.unflatten(1, (-1, 4)) if name == "retinanet" else g[:, None]
            for g in slopes(losses[term], outputs.maps[key])
        ]
        count = sum(int(g.any(dim=2).sum()) for g in owned)
        assert (count > 0) is (len(targets[0]) > 0)
        divisor = count + sum(not len(t) for t in targets) if name in ("retinanet", "reppoints") else max(count, 1)
        for m, g in zip(outputs.maps["cls"], slopes(losses["loss_cls"], outputs.maps["cls"])):
            x = m[1].detach()
            p = x.sigmoid()
            assert torch.allclose(g[1], 0.75 * p**2 * (2 * (1 - p) * F.softplus(x) + p) / divisor, rtol=1e-4, atol=1e-9)


def slopes(loss: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, maps, retain_graph=True)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_regions_of_a_image_without_objects_are_background(name: str) -> None:
    """Every anchor has the slope p / n, and every region of every stage softmax - 1 of background, by the number of samples;
    its codes have none."""
    detector = make(name, everything=True).train()
    anchors, seen = [], []

    def keep(module: nn.Module, inputs: Any, raw: Any) -> None:
        for x in (x for x in raw if x is not None):
            x.retain_grad()
        seen.append((inputs[1], raw))

    for stage in detector.stages:
        stage.register_forward_hook(keep)
    detector.head.register_forward_hook(lambda module, inputs, outputs: anchors.append(outputs.maps))
    terms = detector.loss(batch(SOME, EMPTY))
    found = slopes(terms["loss_rpn_cls"], anchors[0]["cls"])
    divisor = sum(int(g.count_nonzero()) for g in found) + 1  # the image without objects counts for one positive
    for m, g in zip(anchors[0]["cls"], found):
        assert torch.allclose(g[1], m[1].detach().sigmoid() / divisor, rtol=1e-4)
    assert not any(g[1].any() for g in slopes(terms["loss_rpn_box"], anchors[0]["reg"]))
    torch.stack(list(terms.values())).sum().backward()
    assert len(seen) == len(detector.stages)
    for rois, (logits, codes) in seen:
        empty = rois[:, 0] == 1
        assert empty.any()
        wanted = logits.detach()[empty].softmax(dim=1)
        wanted[:, -1] -= 1
        assert torch.allclose(logits.grad[empty], wanted / len(rois), rtol=1e-3, atol=1e-9)
        assert codes is None or not codes.grad[empty].any()


@pytest.mark.parametrize("name", DETECTORS)
def test_a_loss_is_a_sum_over_images_by_a_sum_over_images(name: str) -> None:
    """What is added up, and what it is divided by, of a batch are those of its images, each alone; the divisor is at least 1. An image
    without objects counts for one in RetinaNet, RepPoints and the RPN, for none in FCOS and VFNet."""
    with float64() as patch:
        detector = make(name, everything=True, rest=True).double().train()
        livelier(detector)
        kinds = [target(t.boxes / 2, t.labels.tolist(), SMALL) for t in (SOME, EMPTY, ONE, HUGE)]
        data = batch(*kinds, size=SMALL)
        whole = detector.loss(data)
        counts: list[Tensor] = []

        def count(x: Tensor, least: float = 1.0) -> Tensor:
            counts.append(x.detach().double().reshape(-1))
            return torch.ones_like(counts[-1]).reshape(x.shape)

        for key, module in list(sys.modules.items()):
            if key.startswith(("fusedet.models.heads.", "fusedet.models.roi.")) and hasattr(module, "mean_over_ranks"):
                patch.setattr(module, "mean_over_ranks", count)

        def sums(part: Batch) -> tuple[dict[str, Tensor], Tensor]:
            counts.clear()
            found = {k: v.detach() for k, v in detector.loss(part).items()}
            return found, torch.cat(counts)

        joint, divisors = sums(data)
        alone = [
            sums(Batch(data.images[i : i + 1], data.sizes[i : i + 1], (i,), data.scales[i : i + 1], (t,)))
            for i, t in enumerate(kinds)
        ]
        for key, value in joint.items():
            assert torch.allclose(value, sum(found[key] for found, _ in alone), rtol=1e-9), key
            assert any(torch.allclose(whole[key].data * d, value) for d in divisors.clamp(min=1)), key
        if name != "dynamic_rcnn":  # whose memory is of means over images
            assert torch.allclose(divisors, sum(d for _, d in alone), rtol=1e-9)
        assert alone[1][1][0] == (name not in ("fcos", "vfnet")) or name in TWO_STAGE
