"""Pooling, sampling, losses and stages of RoI heads against plain loops."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from fakes import maps, objects
from fusedet.errors import InputError
from fusedet.models.ops.regression_losses import balanced_l1_loss, l1_loss, smooth_l1_loss
from fusedet.models.ops.roi_align_cpu import roi_align_cpu
from fusedet.models.ops.samplers import Sampler
from fusedet.models.roi import BoxStage, DynamicStage, LevelPooling
from fusedet.models.roi.pooling import boxes_to_rois
from fusedet.models.roi.sampling import RoISamples, match_proposals, pad_to_proposals, sample_rois
from fusedet.types import Levels, Proposals, Target

LEVELS = Levels((8,) * 4, (4, 8, 16, 32))
ALL = 10**6


EMPTY = objects([])
SOME = objects([[4, 4, 36, 30], [10, 20, 60, 64], [70, 3, 90, 13]], [0, 2, 1])


def boxes(count: int, width: float = 96, height: float = 64) -> Tensor:
    ends = torch.rand(count, 2, 2) * torch.tensor([width, height])
    return torch.cat([ends.amin(dim=1), ends.amax(dim=1) + 1], dim=1)


def proposed(*columns: Tensor) -> Proposals:
    padded = torch.nn.utils.rnn.pad_sequence(list(columns), batch_first=True)
    return Proposals(padded, torch.zeros(padded.shape[:2]), torch.tensor([len(c) for c in columns]))


# -- pooling


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    rois=st.integers(0, 12),
    size=st.sampled_from([1, 2, 7]),
    samples=st.sampled_from([0, 1, 2, 3]),
    aligned=st.booleans(),
    spread=st.sampled_from([0.2, 1.0, 3.0]),
)
def test_roi_align_on_cpu_against_torchvision(
    seed: int, rois: int, size: int, samples: int, aligned: bool, spread: float
) -> None:
    torch.manual_seed(seed)
    feature = torch.randn(2, 5, 11, 13)
    ends = (
        ((torch.rand(rois, 2, 2) - 0.3) * 60 * spread).sort(dim=1).values
    )  # some reach outside the map, some lie there
    where = torch.cat([torch.randint(0, 2, (rois, 1)).float(), ends.flatten(1)], dim=1)
    where[::4, 3:] = where[::4, 1:3]  # as the padding of proposals
    where[1::4, 3] = where[1::4, 1]
    ours, theirs = (feature.clone().requires_grad_() for _ in range(2))
    pooled = roi_align_cpu(ours, where, size, 4, samples, aligned)
    wanted = roi_align(theirs, where, size, 1 / 4, samples, aligned)
    assert torch.allclose(pooled, wanted, atol=1e-5)
    weights = torch.randn_like(wanted)
    (pooled * weights).sum().backward()
    (wanted * weights).sum().backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-4)


@pytest.mark.parametrize(("side", "level"), [(3, 0), (111.9, 0), (112.1, 1), (223, 1), (225, 2), (449, 3), (5000, 3)])
def test_roi_is_pooled_from_its_level(side: float, level: int) -> None:
    features = [torch.full((1, 8, 160, 160), float(i)) for i in range(4)]
    pooled = LevelPooling(LEVELS)(features, torch.tensor([[0, 0, 0, side, side]]))
    assert pooled.shape == (1, 8, 7, 7)
    assert torch.allclose(pooled, torch.tensor(float(level)))


def test_half_precision_does_not_shift_pooling() -> None:
    features = maps(LEVELS)
    rois = torch.cat([torch.zeros(5, 1), boxes(5)], dim=1)
    exact = LevelPooling(LEVELS)(features, rois)
    half = LevelPooling(LEVELS)([f.bfloat16() for f in features], rois)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.05)


def test_rois_begin_with_the_image_index() -> None:
    given = boxes(6).reshape(2, 3, 4)
    rois = boxes_to_rois(given)
    assert rois[:, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(rois[:, 1:].reshape(2, 3, 4), given)


# -- sampling


def test_sampler_respects_its_limits() -> None:
    assigned = torch.full((3, 100), -1)
    assigned[0, :40] = torch.arange(40)  # more positives than asked for
    assigned[1, :3] = 0  # fewer
    assigned[2, :90] = -2  # few to choose from
    drawn = Sampler(num=20, fraction=0.5).sample(assigned)
    assert [(int((d & (o >= 0)).sum()), int((d & (o == -1)).sum())) for d, o in zip(drawn, assigned)] == [
        (10, 10),
        (3, 17),
        (0, 10),
    ]
    assert not (drawn & (assigned == -2)).any()
    few = Sampler(num=20, fraction=0.5, most_negatives=2).sample(assigned)
    assert [int((d & (o == -1)).sum()) for d, o in zip(few, assigned)] == [10, 6, 2]
    torch.manual_seed(3)
    one = Sampler(20, 0.5).sample(assigned)
    torch.manual_seed(3)
    assert torch.equal(one, Sampler(20, 0.5).sample(assigned))
    assert not torch.equal(one, Sampler(20, 0.5).sample(assigned))


def test_candidates_have_equal_probability() -> None:
    assigned = torch.tensor([[0, 0, 0, 0, -1, -1, -1, -1, -1, -1]]).repeat(4000, 1)
    share = Sampler(num=4, fraction=0.5).sample(assigned).float().mean(dim=0)
    assert torch.allclose(share[:4], torch.tensor(0.5), atol=0.04)
    assert torch.allclose(share[4:], torch.tensor(2 / 6), atol=0.04)


def test_balanced_positives_are_spread_over_instances() -> None:
    """Libra R-CNN, 12 of three instances with 50, 30 and 2: each has at most round(12 / 3) + 1 = 5 at first."""
    assigned = torch.tensor([[0] * 50 + [1] * 30 + [2] * 2 + [-1] * 20])
    overlaps = torch.linspace(1, 0.01, 102)[None]
    for _ in range(20):
        drawn = Sampler(num=24, fraction=0.5, balanced=True).sample(assigned, overlaps)
        counts = Counter(assigned[drawn].tolist())
        assert counts[0] + counts[1] + counts[2] == 12
        assert counts[2] == 2
        assert min(counts[0], counts[1]) == 5  # 5, 5 and 2: no others are needed
    scarce = torch.tensor([[0] * 50 + [1] * 1])
    drawn = Sampler(num=24, fraction=0.5, balanced=True).sample(scarce, torch.ones(1, 51))
    assert Counter(scarce[drawn].tolist()) == {0: 11, 1: 1}


def test_balanced_negatives_are_spread_over_bins() -> None:
    """Bins of a third of the largest IoU: 9 of each; the scarce bin gives all, the first one the rest."""
    overlaps = torch.cat(
        [torch.full((200,), 0.1), torch.full((100,), 0.4), torch.full((4,), 0.45), torch.zeros(50), torch.tensor([0.9])]
    )[None]
    assigned = torch.full_like(overlaps, -1, dtype=torch.int64)
    assigned[0, -1] = 0
    filler = Counter()
    for _ in range(20):
        drawn = Sampler(num=28, fraction=0.25, balanced=True).sample(assigned, overlaps)
        assert int(drawn.sum()) == 28
        counts = Counter(round(v, 2) for v in overlaps[drawn].tolist())
        assert counts[0.9] == 1
        assert counts[0.0] == 0  # enough others
        assert min(counts[0.1], counts[0.4] + counts[0.45]) >= 9
        filler.update(counts)
    assert filler[0.1] > 20 * 9  # the third bin is empty: its share is filled at random
    lonely = torch.cat([torch.full((5,), 0.2), torch.zeros(50), torch.ones(1)])[None]
    drawn = Sampler(num=20, balanced=True).sample(torch.where(lonely == 1, 0, -1), lonely)
    assert Counter(round(v, 2) for v in lonely[drawn].tolist()) == {0.2: 5, 0.0: 14, 1.0: 1}


def test_matching_adds_ground_truth_and_ignores_padding() -> None:
    given = [torch.tensor([[4.0, 4, 36, 29], [0, 0, 5, 5], [70, 3, 90, 12]]), torch.tensor([[4.0, 4, 36, 29]])]
    matched = match_proposals(proposed(*given), [SOME, EMPTY], 0.5)
    assert matched.num_ground_truth == 3
    assert matched.instances.tolist() == [[0, 1, 2, 0, -1, 2], [-2, -2, -2, -1, -2, -2]]
    assert torch.allclose(matched.overlaps[0, :3], torch.ones(3))
    assert float(matched.overlaps[0, 3]) == pytest.approx(25 / 26)
    assert matched.overlaps[1].tolist() == [-1, -1, -1, 0, -1, -1]
    samples = sample_rois(matched, Sampler(ALL, 1.0))
    assert samples.image.tolist() == [0] * 6 + [1]
    assert samples.rois[:, 0].tolist() == [0] * 6 + [1]
    assert samples.is_ground_truth.tolist() == [True] * 3 + [False] * 4
    assert torch.equal(samples.rois[:3, 1:], SOME.boxes)


def test_samples_are_padded_to_proposals() -> None:
    given = boxes(5)
    padded = pad_to_proposals(given, torch.tensor([0, 0, 2, 2, 2]), 3)
    assert padded.counts.tolist() == [2, 0, 3]
    assert torch.equal(padded.boxes[0, :2], given[:2])
    assert torch.equal(padded.boxes[2], given[2:])
    assert pad_to_proposals(given[:0], torch.zeros(0, dtype=torch.int64), 2).boxes.shape == (2, 0, 4)


# -- losses


def test_losses_by_hand() -> None:
    x, zero = torch.tensor([0.0, 0.5, -1.0, 3.0]), torch.zeros(4)
    assert l1_loss(x, zero).tolist() == [0, 0.5, 1, 3]
    assert smooth_l1_loss(x, zero).tolist() == [0, 0.125, 0.5, 2.5]
    assert torch.allclose(smooth_l1_loss(x, zero, torch.tensor(0.25)), torch.tensor([0, 0.375, 0.875, 2.875]))


def test_balanced_l1_has_the_gradient_of_the_paper() -> None:
    """Eq. 9: alpha ln(b |x| + 1) inside, gamma outside, with alpha ln(b + 1) = gamma; continuous, and 0 at 0."""
    x = torch.tensor([1e-6, 0.01, 0.3, 0.999, 1.001, 5.0], dtype=torch.float64, requires_grad=True)
    balanced_l1_loss(x, torch.zeros_like(x)).sum().backward()
    b = math.exp(3) - 1
    wanted = [0.5 * math.log(b * v + 1) if v < 1 else 1.5 for v in x.tolist()]
    assert torch.allclose(x.grad, torch.tensor(wanted, dtype=torch.float64))
    near, far = balanced_l1_loss(
        torch.tensor([1 - 1e-9, 1 + 1e-9], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    )
    assert float(near) == pytest.approx(float(far), abs=1e-6)
    assert float(balanced_l1_loss(torch.zeros(1), torch.zeros(1))) == 0


# -- the box stage


def stage(**options: object) -> BoxStage:
    made = BoxStage(LEVELS, 3, **({"channels": 16, "num": ALL, "fraction": 1.0} | options))
    torch.nn.init.normal_(made.cls.weight, std=0.5)
    if made.reg is not None:
        torch.nn.init.normal_(made.reg.weight, std=0.5)
    return made


def literal_loss(
    box_stage: BoxStage, logits: Tensor, deltas: Tensor, samples: RoISamples, targets: list[Target], kind: str
) -> tuple[float, float]:
    logits, deltas = logits.double(), deltas.double()
    cls = box = 0.0
    for s in range(len(samples.rois)):
        i = int(samples.rois[s, 0])
        roi = samples.rois[s, 1:]
        overlap = box_iou(roi[None], targets[i].boxes)[0] if len(targets[i]) else torch.zeros(1)
        positive = float(overlap.max()) >= box_stage.positive
        label = int(targets[i].labels[overlap.argmax()]) if positive else box_stage.num_classes
        cls -= float(logits[s].log_softmax(dim=0)[label])
        if not positive:
            continue
        (ax1, ay1, ax2, ay2), (gx1, gy1, gx2, gy2) = roi.tolist(), targets[i].boxes[overlap.argmax()].tolist()
        w, h = ax2 - ax1, ay2 - ay1
        wanted = [
            (gx1 + gx2 - ax1 - ax2) / 2 / w,
            (gy1 + gy2 - ay1 - ay2) / 2 / h,
            math.log((gx2 - gx1) / w),
            math.log((gy2 - gy1) / h),
        ]
        own = deltas[s] if box_stage.class_agnostic else deltas[s, 4 * label : 4 * label + 4]
        for a, b, std in zip(own.tolist(), wanted, box_stage.stds.tolist()):
            d = abs(a - b / std)
            box += d if kind == "l1" else d * d / 2 if d < 1 else d - 0.5
    return cls / len(samples.rois), box / len(samples.rois)


@pytest.mark.parametrize(
    ("agnostic", "kind", "targets"),
    [
        (True, "l1", [SOME, EMPTY]),
        (False, "smooth_l1", [SOME, EMPTY]),
        (False, "l1", [SOME, SOME]),
        (True, "smooth_l1", [EMPTY, EMPTY]),
    ],
)
def test_stage_loss_against_a_loop(agnostic: bool, kind: str, targets: list[Target]) -> None:
    made = stage(class_agnostic=agnostic, loss=kind)
    near = SOME.boxes.repeat(4, 1) + 6 * torch.rand(12, 4)
    samples = made.sample(proposed(torch.cat([boxes(9), near]), near[:5]), targets)
    raw = made(maps(LEVELS), samples.rois)
    losses = made.loss(raw, samples, targets)
    wanted = literal_loss(made, raw[0].detach(), raw[1].detach(), samples, targets, kind)
    assert float(losses["loss_cls"].detach()) == pytest.approx(wanted[0], rel=1e-4)
    assert float(losses["loss_box"].detach()) == pytest.approx(wanted[1], rel=1e-4)
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())
    if len(targets[0]):
        assert all(p.grad.any() for p in made.parameters())
    else:
        assert float(losses["loss_box"].detach()) == 0


def test_loss_without_samples() -> None:
    made = stage()
    nothing = RoISamples(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    features = [m.requires_grad_() for m in maps(LEVELS)]
    losses = made.loss(made(features, nothing.rois), nothing, [EMPTY, EMPTY])
    assert all(float(v.detach()) == 0 for v in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in made.parameters())


@pytest.mark.parametrize("agnostic", [True, False])
def test_decoding_and_refinement_by_hand(agnostic: bool) -> None:
    made = stage(class_agnostic=agnostic)
    rois = boxes_to_rois(torch.tensor([[[10.0, 10, 30, 20], [0, 0, 0, 0]]]))
    deltas = torch.zeros(2, 4 if agnostic else 12)
    deltas[0, -4:] = torch.tensor(
        [1.0, -1.0, 5 * math.log(2), 0]
    )  # stds 0.1, 0.1, 0.2, 0.2: 2 right, 1 up, twice as wide
    logits = torch.tensor([[0.0, 0, 2, 4], [9, 0, 0, 0]])
    candidates = made.decode((logits, deltas), rois, torch.tensor([1]))
    moved = torch.tensor([2.0, 9, 42, 19])
    assert candidates.boxes.shape == ((1, 2, 4) if agnostic else (1, 2, 3, 4))
    assert torch.allclose(candidates.boxes[0, 0] if agnostic else candidates.boxes[0, 0, 2], moved)
    assert torch.allclose(candidates.scores[0, 0], logits[0].softmax(dim=0)[:3])
    assert not candidates.scores[0, 1].any()  # beyond the counts
    sizes = torch.tensor([[64, 40]])
    assert torch.allclose(
        made.refine((logits, deltas), rois, sizes)[0], torch.tensor([2.0, 9, 40, 19])
    )  # of the likeliest class, clipped
    refined = made.refine((logits, deltas), rois, sizes, torch.tensor([0, 3]))
    assert torch.allclose(refined[0], torch.tensor([2.0, 9, 40, 19]) if agnostic else torch.tensor([10.0, 10, 30, 20]))


def test_stage_without_regression_keeps_the_boxes() -> None:
    made = stage(regress=False)
    rois = boxes_to_rois(boxes(6).reshape(2, 3, 4))
    raw = made(maps(LEVELS), rois)
    assert raw[1] is None
    assert torch.equal(made.decode(raw, rois, torch.tensor([3, 3])).boxes.flatten(0, 1), rois[:, 1:])
    assert torch.equal(made.refine(raw, rois, torch.full((2, 2), 1000)), rois[:, 1:])  # in a cascade
    assert made.loss_weights == {"loss_cls": 1.0}
    samples = made.sample(proposed(boxes(4)), [SOME])
    assert list(made.loss(made(maps(LEVELS, n=1), samples.rois), samples, [SOME])) == ["loss_cls"]


@pytest.mark.parametrize(
    ("options", "parameters"),
    [({}, 14_306_705), ({"class_agnostic": True}, 13_982_805), ({"regress": False}, 13_978_705)],
)
def test_parameter_counts_of_stages(options: dict, parameters: int) -> None:
    with torch.device("meta"):
        made = BoxStage(Levels((256,) * 5, (4, 8, 16, 32, 64)), 80, **options)
    assert sum(p.numel() for p in made.parameters()) == parameters


def test_bad_options_are_refused() -> None:
    for options in ({"stds": (0.1, 0.1, 0.2, 0.0)}, {"beta": 0.0}, {"channels": 0}, {"num": 0}, {"fraction": -0.1}):
        with pytest.raises(InputError):
            BoxStage(LEVELS, 3, **options)
    with pytest.raises(InputError):
        DynamicStage(LEVELS, 3, interval=0)


# -- the dynamic stage


def test_dynamic_statistics_follow_the_proposals() -> None:
    """Two images, an update after two steps, by hand: the k-th largest IoUs and the k-th smallest shifts."""
    made = DynamicStage(LEVELS, 3, channels=16, num=ALL, fraction=1.0, interval=2, iou_topk=4, beta_topk=3)
    features, targets = maps(LEVELS), [SOME, objects([[20, 20, 50, 50]], [1])]
    overlaps, shifts = [], []
    for step in range(2):
        given = [
            SOME.boxes + 2 * torch.rand(3, 4),
            torch.tensor([[21.0, 22, 50, 53], [20, 20, 48, 50], [0, 0, 9, 9]])[: 3 - step],
        ]
        here = []
        for boxes_, target in zip(given, targets):
            every = torch.cat([target.boxes, boxes_])
            overlap = box_iou(every, target.boxes).amax(dim=1)
            here.append(float(overlap.sort(descending=True).values[min(4, len(every)) - 1]))
            for box, own in zip(every, box_iou(every, target.boxes).argmax(dim=1)):
                if float(box_iou(box[None], target.boxes).max()) >= 0.5:
                    g, wh = target.boxes[own], box[2:] - box[:2]
                    shift = ((g[:2] + g[2:] - box[:2] - box[2:]) / 2 / wh / 0.1).abs()
                    shifts.append((step, float(shift.mean())))
        overlaps.append(sum(here) / 2)
        assert float(made.threshold) == 0.5
        assert float(made.beta) == 1.0
        samples = made.sample(proposed(*given), targets)
        raw = made(features, samples.rois)
        losses = made.loss(raw, samples, targets)
        plain = F.smooth_l1_loss(*made.box.regression(raw, samples, targets), reduction="sum") / len(samples.rois)
        assert torch.allclose(losses["loss_box"], plain)
        sum(losses.values()).backward()
    sixth = [
        sorted(v for s, v in shifts if s == step)[5] for step in range(2)
    ]  # 3 times 2 images; the objects' own are 0
    assert float(made.threshold) == pytest.approx(max(0.4, sum(overlaps) / 2), rel=1e-5)
    assert float(made.beta) == pytest.approx(min(1.0, sum(sixth) / 2), rel=1e-4)
    restored = DynamicStage(LEVELS, 3, channels=16, interval=2)
    restored.load_state_dict(made.state_dict())
    assert float(restored.beta) == float(made.beta)
    assert int(restored.steps) == 2


def test_dynamic_statistics_without_instances_and_without_gradients() -> None:
    made = DynamicStage(LEVELS, 3, channels=16, num=ALL, interval=2, initial_iou=0.45)
    for targets in ([EMPTY, EMPTY],) * 2:
        samples = made.sample(proposed(boxes(5), boxes(4)), targets)
        losses = made.loss(made(maps(LEVELS), samples.rois), samples, targets)
        assert all(v.isfinite() for v in losses.values())
    assert float(made.threshold) == pytest.approx(0.45)
    assert float(made.beta) == 1.0  # no shift was recorded
    before = {k: v.clone() for k, v in made.state_dict().items()}
    with torch.no_grad():
        samples = made.sample(proposed(boxes(5)), [SOME])
        made.loss(made(maps(LEVELS, n=1), samples.rois), samples, [SOME])
    assert all(torch.equal(v, made.state_dict()[k]) for k, v in before.items())


def test_dynamic_statistics_are_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are means over ranks; shifts are means over ranks with positives."""

    def mean(value: Tensor, least: float = 1.0) -> Tensor:
        other = torch.tensor([0.0, 0.0]) if value.ndim else torch.tensor(0.2)
        return ((value + other) / 2).clamp(min=least)

    monkeypatch.setattr("fusedet.models.roi.dynamic.mean_over_ranks", mean)
    made = DynamicStage(LEVELS, 3, channels=16, iou_topk=2)
    assert float(made.topk_iou(torch.tensor([[0.9, 0.6, 0.3], [0.1, -1, -1]]))) == pytest.approx(
        ((0.6 + 0.1) / 2 + 0.2) / 2
    )
    wanted = torch.tensor([[0.5, -0.1, 9, 9], [0.1, 0.1, 9, 9]])
    assert float(made.topk_shift(wanted, 1)) == pytest.approx(0.3)
    assert float(made.topk_shift(wanted[:0], 1)) == -1
