"""Images with 0, 1 and 1000 instances, larger than the image and smaller than a pixel, for all detectors."""

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
from fusedet.models.ops.dual_weighting import DualWeighting
from fusedet.types import Batch, Target
from small import (
    ATSS_FAMILY,
    DETECTORS,
    MATCHING,
    ON_FCOS,
    ONE_STAGE,
    TWO_STAGE,
    float64,
    livelier,
    make,
    target,
    weighted,
    without_gradient,
)

SMALL = (32, 48)
EMPTY = target([])
SOME = target([[4, 4, 30, 30], [10, 20, 60, 44], [40, 8, 90, 60]])
ONE = target([[20, 10, 70, 50]], [2])
HUGE = target([[-50, -40, 500, 400], [-20, 5, 60, 300]])  # beyond all four sides
POSITIVE = {  # the loss and the maps that show which priors are positive
    "retinanet": ("loss_box", "reg"),
    "fcos": ("loss_centerness", "centerness"),
    "vfnet": ("loss_refine", "refine"),
    "reppoints": ("loss_refine", "pts_refine"),
}


# the weights of DDOD's levels depend on all batches before
STATELESS = [name for name in ATSS_FAMILY if name != "ddod"]
DISCRETE = ["foveabox", "fsaf", "yolof"]  # others have weights without a gradient that depend on the predictions
ADDITIVE = ["freeanchor", "foveabox"]
# not FSAF, where an image without positives counts only if all have none, AutoAssign, whose last loss is a mean over
# images, and YOLOF, whose BatchNorm joins the images
FAST_DERIVATIVES = {("retinanet", "huge"), ("faster_rcnn", "empty")}  # in the normal suite
FAST_ADDITIVE = ("retinanet", "fcos", "mask_rcnn", "tood", "freeanchor")  # one detector per family of losses


@cache
def thousand() -> Target:
    """Sides from 0.2 to 20 pixels, a third of them below one pixel; some reach outside."""
    draw = torch.Generator().manual_seed(1)  # not torch's own, whose state would depend on the order of the tests
    corner = torch.rand(1000, 2, generator=draw) * torch.tensor([95.0, 63.0])
    sides = torch.cat([0.2 + 0.7 * torch.rand(334, 2, generator=draw), 1 + 19 * torch.rand(666, 2, generator=draw)])
    return target(torch.cat([corner, corner + sides], dim=1))


def without_cls(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    """The terms that are 0 without instances."""
    return {k: v for k, v in terms.items() if not k.endswith(("cls", "negative"))}


# -- every kind of batch


# their matching or their losses are those of another detector of the list
SIMILAR = (
    "faster_rcnn",
    "dynamic_rcnn",
    "libra_rcnn",
    "cascade_rcnn",
    "vfnet",
    "gfl",
    "gflv2",
    "ddod",
    "foveabox",
    "fsaf",
    "dw",
    "borderdet",
    "atss",
    "autoassign",
    "ota",
    "freeanchor",
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in SIMILAR else n
        for n in DETECTORS + ATSS_FAMILY + MATCHING + ON_FCOS
    ],
)
def test_all_kinds_of_batches_train_and_predict(name: str) -> None:
    detector = make(name).train()
    kinds = [(EMPTY,), (ONE,), (thousand(), EMPTY), (HUGE, ONE)]
    if name not in ONE_STAGE:  # for these, gradients in closed form below prove more of such batches
        kinds += [(EMPTY, EMPTY), (EMPTY, SOME)]
    for targets in kinds:
        terms = detector.loss(batch(*targets))
        detector.zero_grad()
        weighted(detector, terms).backward()
        assert not without_gradient(detector), targets
        has_instances = any(len(t) for t in targets)
        for key, value in without_cls(terms).items():
            if key != "loss_border_box" or not has_instances:  # maybe no box fits
                assert (float(value.detach()) > 0) is has_instances, key
            assert value.requires_grad
        assert all(float(v.detach()) > 0 for k, v in terms.items() if k.endswith(("cls", "negative")))
        last = (
            [p for part in (detector.stages, detector.branches) for p in part.parameters()] if name in TWO_STAGE else []
        )
        if has_instances:  # their gradient reaches the last layers of every stage and branch
            assert all(p.grad is not None and p.grad.any() for p in last)
    detections = detector.eval().predict(batch(EMPTY, EMPTY))
    assert [d.boxes.isfinite().all() for d in detections] == [True, True]


# -- gradients


class Replay:
    """Replay recorded results of calls, so that what a loss takes as constant is constant."""

    def __init__(self) -> None:
        self.results: list[Any] = []
        self.index: int | None = None

    def __call__(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def replayed(*args: Any, **options: Any) -> Any:
            if self.index is None:
                self.results.append(call(*args, **options))
                return self.results[-1]
            self.index += 1
            return self.results[self.index - 1]

        return replayed


BATCHES = {"empty": (SOME, EMPTY), "huge": (HUGE, ONE)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if (name, kind) in FAST_DERIVATIVES else pytest.mark.slow)
        for name in DETECTORS + STATELESS + DISCRETE + ON_FCOS
        for kind in BATCHES
    ],
)
def test_gradient_is_the_numerical_derivative_of_the_loss(name: str, kind: str) -> None:
    """Compare every term along a random direction of each part's parameters, in float64.

    Detached values, DW's weights, proposals and random numbers are replayed, and no assignment changes over so small a
    step. A ReLU or maximum may change over one of two steps only.
    """
    with float64() as patch:
        detector = make(name).double().train()
        livelier(detector)
        data = batch(*(target(t.boxes, t.labels.tolist()) for t in BATCHES[kind]))
        replay, detach = Replay(), torch.Tensor.detach
        patch.setattr(torch.Tensor, "detach", replay(lambda x: detach(x).clone()))
        patch.setattr(DualWeighting, "weigh", replay(DualWeighting.weigh))
        if isinstance(detector, TwoStage):
            detector.head.propose = replay(detector.head.propose)

        def terms() -> dict[str, Tensor]:
            torch.manual_seed(5)
            return detector.loss(data)

        losses = terms()
        for part, module in ((k, m) for k, m in detector.named_children() if list(m.parameters())):
            moved = list(module.parameters())
            direction = [torch.randn_like(p) for p in moved]
            gradients = {
                k: torch.autograd.grad(v, moved, retain_graph=True, materialize_grads=True) for k, v in losses.items()
            }
            wrong = set(losses)
            for step in (1e-8, 1e-9):
                ends = []
                for sign in (1, -2, 1) if wrong else ():
                    for p, d in zip(moved, direction):
                        p.data.add_(d, alpha=sign * step)
                    replay.index = 0
                    ends.append(terms())
                    assert replay.index == len(replay.results)
                for key in tuple(wrong):
                    slope = float((ends[0][key] - ends[1][key]).data) / (2 * step)
                    exact = sum(float((g * d).sum()) for g, d in zip(gradients[key], direction))
                    if abs(slope - exact) <= 1e-5 * sum(float(g.square().sum()) for g in gradients[key]) ** 0.5:
                        wrong.remove(key)
            assert not wrong, part


@pytest.mark.parametrize("name", ONE_STAGE)
def test_background_gradient_has_its_closed_form(name: str) -> None:
    """The derivative of 3/4 p^2 * -log(1 - p), for every class and prior of an empty image."""
    detector = make(name).train()
    for targets in ((SOME, EMPTY), (EMPTY, EMPTY)):
        outputs = detector(batch(*targets).images)
        losses = detector.head.loss(outputs, targets)
        box_maps = [m for k, column in outputs.maps.items() if k != "cls" for m in column]
        box_gradients = torch.autograd.grad(
            sum(without_cls(losses).values()), box_maps, retain_graph=True, allow_unused=True
        )
        assert not any(g[1].any() for g in box_gradients if g is not None)
        # the positives: priors with a gradient from the box loss, which has the same divisor as the scores
        term, key = POSITIVE[name]
        positives = [
            g.unflatten(1, (-1, 4)) if name == "retinanet" else g[:, None]
            for g in gradients_of(losses[term], outputs.maps[key])
        ]
        count = sum(int(g.any(dim=2).sum()) for g in positives)
        assert (count > 0) is (len(targets[0]) > 0)
        divisor = count + sum(not len(t) for t in targets) if name in ("retinanet", "reppoints") else max(count, 1)
        for m, g in zip(outputs.maps["cls"], gradients_of(losses["loss_cls"], outputs.maps["cls"])):
            x = m[1].detach()
            p = x.sigmoid()
            assert torch.allclose(g[1], 0.75 * p**2 * (2 * (1 - p) * F.softplus(x) + p) / divisor, rtol=1e-4, atol=1e-9)


def gradients_of(loss: Tensor, maps: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, maps, retain_graph=True)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_rois_of_an_empty_image_are_background(name: str) -> None:
    """Check the gradients in closed form.

    Every anchor has p / n, and every RoI of every stage softmax minus the one-hot background, divided by the number of
    samples; its deltas have none.
    """
    detector = make(name, everything=True).train()
    anchors, calls = [], []

    def keep(module: nn.Module, inputs: Any, raw: Any) -> None:
        for x in (x for x in raw if x is not None):
            x.retain_grad()
        calls.append((inputs[1], raw))

    for stage in detector.stages:
        stage.register_forward_hook(keep)
    detector.head.register_forward_hook(lambda module, inputs, outputs: anchors.append(outputs.maps))
    terms = detector.loss(batch(SOME, EMPTY))
    gradients = gradients_of(terms["loss_rpn_cls"], anchors[0]["cls"])
    divisor = sum(int(g.count_nonzero()) for g in gradients) + 1  # the empty image counts for one positive
    for m, g in zip(anchors[0]["cls"], gradients):
        assert torch.allclose(g[1], m[1].detach().sigmoid() / divisor, rtol=1e-4)
    assert not any(g[1].any() for g in gradients_of(terms["loss_rpn_box"], anchors[0]["reg"]))
    torch.stack(list(terms.values())).sum().backward()
    assert len(calls) == len(detector.stages)
    for rois, (logits, deltas) in calls:
        empty = rois[:, 0] == 1
        assert empty.any()
        wanted = logits.detach()[empty].softmax(dim=1)
        wanted[:, -1] -= 1
        assert torch.allclose(logits.grad[empty], wanted / len(rois), rtol=1e-3, atol=1e-9)
        assert deltas is None or not deltas.grad[empty].any()


@pytest.mark.parametrize(
    "name",
    [
        n if n in FAST_ADDITIVE else pytest.param(n, marks=pytest.mark.slow)
        for n in DETECTORS + STATELESS + ADDITIVE + ON_FCOS
    ],
)
def test_loss_is_additive_over_images(name: str) -> None:
    """Numerator and divisor of a batch's loss are the sums of those of its images; the divisor is at least 1.

    An empty image counts for one in RetinaNet, RepPoints, ATSS, GFL and the RPN, for none in FCOS, VFNet, PAA,
    TOOD, FreeAnchor, OTA, DW, BorderDet and the boxes of FoveaBox.
    """
    with float64() as patch:
        detector = make(name, everything=True, norm_eval=True).double().train()
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
            terms = {k: v.detach() for k, v in detector.loss(part).items()}
            return terms, torch.cat(counts)

        joint, divisors = sums(data)
        separate = [
            sums(Batch(data.images[i : i + 1], data.sizes[i : i + 1], (i,), data.scales[i : i + 1], (t,)))
            for i, t in enumerate(kinds)
        ]
        for key, value in joint.items():
            assert torch.allclose(value, sum(terms[key] for terms, _ in separate), rtol=1e-9), key
            assert any(torch.allclose(whole[key].data * d, value) for d in divisors.clamp(min=1)), key
        if name != "dynamic_rcnn":  # its statistics are means over images
            assert torch.allclose(divisors, sum(d for _, d in separate), rtol=1e-9)
        none = ("fcos", "vfnet", "paa", "tood", "freeanchor", "foveabox", *ON_FCOS)
        assert separate[1][1][0] == (name not in none) or name in TWO_STAGE
