"""MSE-FPN against its equations, its variants' parameter counts and the contract of a neck."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fakes import check_export, maps, shuffled
from fusedet.errors import InputError
from fusedet.models.build import build
from fusedet.models.necks import FPN, NECKS
from fusedet.models.necks.gates import GCG
from fusedet.models.necks.mse_fpn import MSEFPN, SEM, relation
from fusedet.types import Levels

BACKBONE = Levels((256, 512, 1024, 2048), (4, 8, 16, 32))
SMALL = Levels((8, 16, 24, 32), (4, 8, 16, 32))
TINY = Levels((2, 3, 4, 5), (4, 8, 16, 32))
OFF = {"sem": "none", "sim": "none", "gate": "none"}


# -- the equations implemented independently, cell by cell, for one image


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def dense(layer: nn.Conv2d, v: Tensor) -> Tensor:
    """A 1x1 convolution of one cell (C,), group by group."""
    parts = zip(v.chunk(layer.groups), layer.weight.flatten(1).chunk(layer.groups))
    return torch.cat([w @ part for part, w in parts]) + layer.bias


def cellwise(layer: nn.Conv2d, x: Tensor) -> Tensor:
    out = torch.empty(layer.out_channels, *x.shape[1:], dtype=x.dtype)
    for i, j in product(*map(range, x.shape[1:])):
        out[:, i, j] = dense(layer, x[:, i, j])
    return out


def pooled(x: Tensor, h: int, w: int) -> Tensor:
    C, H, W = x.shape
    out = torch.empty(C, h, w, dtype=x.dtype)
    for i, j in product(range(h), range(w)):
        out[:, i, j] = x[:, i * H // h : -(-(i + 1) * H // h), j * W // w : -(-(j + 1) * W // w)].mean(dim=(1, 2))
    return out


def bilinear(x: Tensor, h: int, w: int) -> Tensor:
    """Bilinear upsampling with align_corners=False."""
    C, H, W = x.shape
    out = torch.empty(C, h, w, dtype=x.dtype)
    for i, j in product(range(h), range(w)):
        y, z = max((i + 0.5) * H / h - 0.5, 0), max((j + 0.5) * W / w - 0.5, 0)
        top, left = int(y), int(z)
        below, right = min(top + 1, H - 1), min(left + 1, W - 1)
        upper = (1 - z + left) * x[:, top, left] + (z - left) * x[:, top, right]
        lower = (1 - z + left) * x[:, below, left] + (z - left) * x[:, below, right]
        out[:, i, j] = (1 - y + top) * upper + (y - top) * lower
    return out


def group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    groups = []
    for group in x.chunk(norm.num_groups):
        groups.append((group - group.mean()) / torch.sqrt(((group - group.mean()) ** 2).mean() + 1e-5))
    return torch.cat(groups) * norm.weight[:, None, None] + norm.bias[:, None, None]


def relation_matrix(Q: Tensor, K: Tensor, gn1: bool) -> Tensor:
    """R (N, N) of Q and K (C', N), normalized."""
    N = Q.shape[1]
    R = torch.stack([torch.stack([Q[:, n] @ K[:, m] for m in range(N)]) for n in range(N)])
    return (R - R.mean()) / torch.sqrt(((R - R.mean()) ** 2).mean() + 1e-5) if gn1 else R


def enhanced(sem: nn.Module, M: Tensor) -> Tensor:
    """Eq. 3-8."""
    if isinstance(sem, nn.Identity):
        return M
    if isinstance(sem, nn.Conv2d):
        return cellwise(sem, M)
    C, H, W = M.shape
    out = M
    if sem.spatial:
        R = relation_matrix(cellwise(sem.w_q, M).flatten(1), cellwise(sem.w_k, M).flatten(1), sem.gn1)
        weights = []
        for m in range(H * W):  # the cell m of each of the N maps
            column = [R[n, m] for n in range(H * W)]
            weights.append(
                sigmoid(sum(column) / len(column)) if sem.pool_first else sum(map(sigmoid, column)) / len(column)
            )
        out = torch.stack(weights).view(1, H, W) * cellwise(sem.w_v, M)
    if sem.channel:
        mean = torch.stack([M[c].sum() / (H * W) for c in range(C)])
        out = out * sigmoid(dense(sem.fc1, dense(sem.fc2, mean).clamp(min=0)))[:, None, None]
    return out + M


def gated(gate: nn.Module, kind: str, x: Tensor, source: Tensor) -> Tensor:
    """Eq. 9-10 and the alternatives of Table 6."""
    C, H, W = x.shape
    out = torch.empty_like(x)
    if kind == "gcg":
        F_h = [dense(gate.fc1, sum(source[:, i, j] for j in range(W)) / W) for i in range(H)]
        F_w = [dense(gate.fc2, sum(source[:, i, j] for i in range(H)) / H) for j in range(W)]
        for c, i, j in product(range(C), range(H), range(W)):
            out[c, i, j] = sigmoid(F_h[i][c] * F_w[j][c]) * x[c, i, j]
        return out
    if kind == "ca":

        def inner(v: Tensor) -> Tensor:
            v = (dense(gate.conv, v) - gate.norm.running_mean) / torch.sqrt(gate.norm.running_var + 1e-5)
            v = v * gate.norm.weight + gate.norm.bias
            return v * (v + 3).clamp(0, 6) / 6

        a_h = [sigmoid(dense(gate.conv_h, inner(x[:, i].mean(dim=1)))) for i in range(H)]
        a_w = [sigmoid(dense(gate.conv_w, inner(x[:, :, j].mean(dim=1)))) for j in range(W)]
        for c, i, j in product(range(C), range(H), range(W)):
            out[c, i, j] = x[c, i, j] * a_h[i][c] * a_w[j][c]
        return out
    mean, largest = x.flatten(1).mean(dim=1), x.flatten(1).max(dim=1).values
    if kind == "cam":
        weight = sigmoid(
            sum(dense(gate.attention.mlp[2], dense(gate.attention.mlp[0], v).clamp(min=0)) for v in (mean, largest))
        )
    elif kind == "cag":
        terms = [dense(gate.fc1, mean), dense(gate.fc2, largest)]
        weight = sigmoid(sum(t.clamp(min=0) for t in terms) if gate.relu else sum(terms))
    else:
        return x
    return x * weight[:, None, None]


def equations(neck: MSEFPN, C: list[Tensor], finest: int, context: tuple[int, ...], kinds: dict) -> list[Tensor]:
    """The whole neck for one image: C2 to C5, each (C_i, H_i, W_i), to the levels of the pyramid."""
    number = dict(zip(range(2, 6), C))
    size = [math.ceil(side / 2) for side in C[-1].shape[1:]]
    levels = range(finest, 6)
    T = {i: cellwise(neck.lateral[i - finest], number[i]) for i in levels}
    if kinds["sim"] != "none":
        M = torch.cat([pooled(number[i], *size) for i in context])
        sem, reduce = neck.sem if kinds.get("sem_conv") else (neck.sem, None)
        M_ = enhanced(sem, M)
        channels = dict(zip(context, M_.split([number[i].shape[0] for i in context])))
        M_ = cellwise(reduce, M_) if reduce else M_
        for i in levels:
            if kinds["sim"] == "split" and i not in context:
                continue
            part = channels[i] if kinds["sim"] == "split" else M_
            sim, (h, w) = neck.sim[str(i - finest)], T[i].shape[1:]
            if kinds["sim"] == "conv1x1":
                T[i] = T[i] + bilinear(cellwise(sim.conv, part), h, w)
            elif kinds["sim"] == "add":
                T[i] = T[i] + bilinear(part, h, w)
            else:
                x = cellwise(sim.local, T[i]) if kinds.get("pre_conv") else T[i]
                weight, shift = (group_norm(norm, cellwise(layer, part)) for layer, norm in (sim.gate, sim.semantics))
                T[i] = x * bilinear(sigmoid(weight), h, w) + bilinear(shift, h, w)
    topdown = kinds.get("gate_place") == "topdown"
    from_c = kinds.get("gate_source") == "backbone"
    if not topdown:
        T = {i: gated(neck.gate[i - finest], kinds["gate"], T[i], number[i] if from_c else T[i]) for i in levels}
    for i in reversed(levels[:-1]):
        above = T[i + 1]
        if topdown:
            above = gated(neck.gate[i - finest], kinds["gate"], above, number[i + 1] if from_c else above)
        (_, H, W), (_, h, w) = T[i].shape, above.shape
        for y, z in product(range(H), range(W)):
            T[i][:, y, z] += above[:, y * h // H, z * w // W]
    outputs = [F.conv2d(T[i][None], m.weight, m.bias, padding=1) for i, m in zip(levels, neck.output)]
    return [p[0] for p in outputs + neck.top(C[-1][None], outputs[-1])]


FULL = {"sem": "full", "sim": "full", "gate": "gcg"}
VARIANTS = [
    {},
    OFF,
    {"pool_first": False},
    {"norm": "none"},
    {"norm": "none", "pool_first": False},
    {"sem": "channel"},
    {"sem": "spatial", "v_groups": 3},
    {"sem": "conv1x1", "pre_conv": True},
    {"sem": "none", "gate": "none"},
    {"sim": "split"},
    {"sim": "split", "pre_conv": True, "context": (4, 5), "v_groups": 3},
    {"sim": "conv1x1", "gate": "none"},
    {"context": (2, 3, 4, 5)},
    {"gate_place": "topdown"},
    OFF | {"gate": "cag"},
    OFF | {"gate": "cag", "cag_relu": True},
    OFF | {"gate": "ca"},
    OFF | {"gate": "cam", "gate_reduction": 2},
    {"gate": "ca", "gate_place": "topdown"},
    {"gate_source": "backbone"},
    {"gate_source": "backbone", "gate_place": "topdown"},
    {"sem_conv": True, "sim": "add", "gate": "none"},
    {"sem_conv": True},
]


PYRAMIDS = [(2, 6, "max_pool"), (3, 7, "on_input")]


@pytest.mark.parametrize(
    ("options", "finest", "coarsest", "top"),
    [
        pytest.param(
            options,
            *pyramid,
            id=",".join([*(f"{k}={v}" for k, v in options.items()), f"P{pyramid[0]}"]),
            marks=() if i % 2 == k or not options else pytest.mark.slow,
        )
        for i, options in enumerate(VARIANTS)
        for k, pyramid in enumerate(PYRAMIDS)
    ],
)
@torch.no_grad()
def test_the_equations(options: dict, finest: int, coarsest: int, top: str) -> None:
    pyramid = {"channels": 4, "finest": finest, "coarsest": coarsest, "top": top}
    neck = shuffled(MSEFPN(TINY, **pyramid, embed=3, reduction=4, sim_groups=2, **options).double()).eval()
    C = maps(TINY, (40, 72), n=2, dtype=torch.float64)  # C5 is 2 x 3, the context 1 x 2 ...
    C[-1] = torch.randn(2, 5, 3, 5, dtype=torch.float64)  # ... and here 2 x 3 from an odd 3 x 5
    kept = [c.clone() for c in C]
    actual = neck(C)
    for image in range(2):
        expected = equations(neck, [c[image] for c in C], finest, options.get("context", (3, 4, 5)), FULL | options)
        assert len(actual) == len(expected) == coarsest - finest + 1
        for a, b in zip(actual, expected):
            assert torch.allclose(a[image], b, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(C, kept))


# -- eq. 6


@pytest.mark.parametrize("cells", [1, 2, 7, 30])
@pytest.mark.parametrize("gn1", [True, False])
def test_pooling_needs_no_matrix(cells: int, gn1: bool) -> None:
    """The mean over the N maps, from means and Gram products, equals that of the matrix, with large means too."""
    for offset in (0, 5):
        Q, K = (
            torch.randn(2, 6, cells, dtype=torch.float64) + offset * torch.randn(2, 6, 1, dtype=torch.float64)
            for _ in range(2)
        )
        R = torch.stack([relation_matrix(q, k, gn1) for q, k in zip(Q, K)])
        assert torch.allclose(relation(Q, K, gn1), sigmoid(R.mean(dim=1)), atol=1e-12)
        assert torch.allclose(relation(Q, K, gn1, pool_first=False), sigmoid(R).mean(dim=1), atol=1e-12)
        assert torch.allclose(relation(Q.float(), K.float(), gn1).double(), relation(Q, K, gn1), atol=1e-5)


@pytest.mark.parametrize(("gn1", "pool_first"), list(product([True, False], [True, False])))
@torch.no_grad()
def test_both_readings_of_the_pooling_are_equal(gn1: bool, pool_first: bool) -> None:
    """The mean over the cells of each map is the mean over the maps with W_q and W_k exchanged."""
    sem = shuffled(SEM(6, 3, 2, 1, gn1, pool_first, channel=True, spatial=True).double())
    M = torch.randn(2, 6, 2, 3, dtype=torch.float64)
    Q, K = sem.w_q(M).flatten(2), sem.w_k(M).flatten(2)
    R = torch.stack([relation_matrix(q, k, gn1) for q, k in zip(Q, K)])
    over_cells = sigmoid(R.mean(dim=2)) if pool_first else sigmoid(R).mean(dim=2)
    other = (
        over_cells.view(2, 1, 2, 3) * sem.w_v(M) * sem.fc1(sem.fc2(M.mean(dim=(2, 3), keepdim=True)).relu()).sigmoid()
        + M
    )
    assert not torch.allclose(sem(M), other)
    sem.w_q, sem.w_k = sem.w_k, sem.w_q
    assert torch.allclose(sem(M), other, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("gn1", "pool_first", "own"), list(product([True, False], [True, False], [True, False])))
def test_autocast_does_not_change_the_relation(kind: torch.dtype, gn1: bool, pool_first: bool, own: bool) -> None:
    """Its sums of products of 256 channels are beyond float16's range; the maps come in autocast's precision or in
    float32."""
    Q, K = (0.3 * (torch.randn(2, 256, 273) + torch.randn(2, 256, 1)) for _ in range(2))
    Q, K = (x.to(kind if own else torch.float32).requires_grad_() for x in (Q, K))
    with torch.autocast("cpu", kind):
        actual = relation(Q, K, gn1, pool_first)
        (actual * torch.randn_like(actual)).sum().backward()
    assert actual.dtype == torch.float32
    assert torch.allclose(actual.double(), relation(Q.double(), K.double(), gn1, pool_first), rtol=0, atol=1e-4)
    assert all(x.grad.isfinite().all() and x.grad.any() for x in (Q, K))


def test_order_of_pooling_and_sigmoid_matters() -> None:
    Q, K = torch.randn(2, 1, 6, 20).unbind(0)
    assert not torch.allclose(relation(Q, K), relation(Q, K, pool_first=False), atol=1e-3)


# -- invariants


@pytest.mark.parametrize(("finest", "coarsest", "top"), [(2, 6, "max_pool"), (3, 7, "on_input"), (3, 7, "on_output")])
@torch.no_grad()
def test_without_its_parts_it_is_fpn(finest: int, coarsest: int, top: str) -> None:
    pyramid = {"channels": 16, "finest": finest, "coarsest": coarsest, "top": top}
    fpn, neck = FPN(SMALL, **pyramid), MSEFPN(SMALL, **pyramid, **OFF)
    neck.load_state_dict(fpn.state_dict())  # strict: exactly the same names
    C = maps(SMALL, (75, 129))
    assert neck.levels == fpn.levels
    assert all(torch.equal(a, b) for a, b in zip(neck(C), fpn(C)))


def test_fpn_weights_load_into_the_full_neck() -> None:
    missing = MSEFPN(SMALL, channels=32).load_state_dict(FPN(SMALL, channels=32).state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[0] for name in missing.missing_keys} == {"sem", "sim", "gate"}


@torch.no_grad()
def test_a_gate_of_zeros_halves() -> None:
    gate = GCG(6)
    for p in gate.parameters():
        nn.init.zeros_(p)
    x = torch.randn(2, 6, 5, 3)
    assert torch.equal(gate(x), x / 2)


@torch.no_grad()
def test_gate_of_row_and_column_means_by_hand() -> None:
    """By hand, one channel of means: rows 1 and 3, columns 2 and 2; the gate is the sigmoid of their products."""
    gate = GCG(1)
    for layer in (gate.fc1, gate.fc2):
        nn.init.ones_(layer.weight)
        nn.init.zeros_(layer.bias)
    x = torch.tensor([[0.0, 2.0], [4.0, 2.0]]).view(1, 1, 2, 2)
    assert torch.allclose(gate(x), torch.sigmoid(torch.tensor([[2.0, 2.0], [6.0, 6.0]])) * x)


@pytest.mark.parametrize(
    ("options", "reaches"), [({}, True), (OFF, False), (OFF | {"sem": "none", "sim": "full"}, True)]
)
@torch.no_grad()
def test_a_far_pixel_changes_the_output_through_the_context(options: dict, reaches: bool) -> None:
    """The finest level's first cell depends on the last cell of C3, 40 cells away, only where the context is
    injected."""
    neck = MSEFPN(SMALL, channels=32, **({"gate": "none"} | options))
    C = maps(SMALL, (320, 320), n=1)
    changed = [c.clone() for c in C]
    changed[1][..., -1, -1] += 10
    before, after = (neck(c)[0][..., 0, 0] for c in (C, changed))
    assert torch.equal(before, after) is not reaches


# -- counts


COUNTS = [
    (OFF, 3_344_384, 60.90),
    ({"sim": "conv1x1", "gate": "none"}, 23_309_024, 65.93),
    ({"sem": "channel", "sim": "conv1x1", "gate": "none"}, 8_624_864, 61.90),
    ({"sem": "spatial", "sim": "conv1x1", "gate": "none"}, 21_699_584, 65.93),
    ({"sem": "conv1x1", "gate": "none"}, 23_539_200, 66.41),
    ({"sem": "conv1x1", "pre_conv": True, "gate": "none"}, 23_802_368, 72.26),
    ({"gate": "none"}, 26_984_160, 66.93),
    ({"gate": "none", "context": (2, 3, 4, 5)}, 29_778_160, 67.63),
    ({"gate": "none", "context": (4, 5)}, 21_838_528, 65.64),
    (OFF | {"gate": "gcg"}, 3_870_720, 60.90 + 0.066),
    (OFF | {"gate": "cag"}, 3_870_720, 60.90 + 0.001),
    (OFF | {"gate": "ca"}, 3_371_104, 60.90 + 0.004),
    (OFF | {"gate": "cam"}, 3_378_240, 60.90),
    ({}, 27_510_496, 67.00),
    ({"sim": "split"}, 22_003_936, 65.49),
    ({"v_groups": 32}, 15_066_848, 63.60),
    ({"sim": "split", "v_groups": 32}, 9_560_288, 62.10),
    # gates of 256, 512, 1024 and 2048 instead of 256 inputs
    ({"gate_source": "backbone"}, 27_510_496 + 2 * 256 * (3840 - 4 * 256), 67.00 - 0.066 + 0.141),
    # the enhancement and one convolution of 3584 channels
    ({"sem_conv": True, "sim": "add", "gate": "none"}, 3_344_384 + 16_293_600 + 3584 * 256 + 256, 65.18),
]


@pytest.mark.parametrize(
    ("options", "parameters", "cost"),
    COUNTS,
    ids=lambda o: ",".join(map(str, o.values())) if isinstance(o, dict) else None,
)
def test_parameters_and_multiply_adds(options: dict, parameters: int, cost: float) -> None:
    """Of ResNet-50's P2 to P6 at 800 x 1344; eq. 6 by Gram products costs 0.017 G more than its matrix would."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        neck = MSEFPN(BACKBONE, finest=2, coarsest=6, top="max_pool", **options).eval()
        neck(maps(BACKBONE, (800, 1344), n=1))
    assert sum(p.numel() for p in neck.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(cost, abs=0.023)


def test_parts_of_the_count() -> None:
    with torch.device("meta"):
        neck = MSEFPN(BACKBONE)
    count = {k: sum(p.numel() for p in m.parameters()) for k, m in neck.named_children()}
    assert {k: count[k] for k in ("sem", "sim", "gate")} == {
        "sem": 16_293_600,
        "sim": 3 * 1_836_544,
        "gate": 3 * 131_584,
    }
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in neck.sem.named_children()} == {
        "fc2": 803_040,
        "fc1": 806_400,
        "w_q": 917_760,
        "w_k": 917_760,
        "w_v": 12_848_640,
    }


# -- contracts


def steps(neck: MSEFPN, C: list[Tensor]) -> list[Tensor]:
    """Run forward and backward, check that every parameter has a gradient, and return the outputs."""
    outputs = neck(C)
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())
    assert [name for name, p in neck.named_parameters() if not p.grad.any()] == []
    return outputs


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_every_variant_trains(options: dict) -> None:
    options = {k: 8 if k == "v_groups" else v for k, v in options.items()}
    neck = MSEFPN(SMALL, channels=64, **options)
    outputs = steps(neck, maps(SMALL, (75, 129)))
    assert [o.shape for o in outputs] == [(2, 64, math.ceil(75 / s), math.ceil(129 / s)) for s in (8, 16, 32, 64, 128)]


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (75, 129), (8, 8)])
@pytest.mark.parametrize(("channels", "gate"), [(32, "gcg"), (64, "ca")])
def test_any_size(size: tuple[int, int], channels: int, gate: str) -> None:
    """One image, as small as one cell of context: there GroupNorm of one value gives the shift, without an
    error."""
    neck = MSEFPN(SMALL, channels=channels, gate=gate)
    outputs = neck(maps(SMALL, size, n=1))
    assert [o.shape[2:] for o in outputs] == [
        (math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in neck.levels.strides
    ]
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in neck.parameters())


@pytest.mark.parametrize(
    ("widths", "strides", "options"),
    [
        ((64, 128, 256, 512), (4, 8, 16, 32), {"v_groups": 32}),  # ResNet-18: a context of 896 channels
        ((24, 40, 112), (8, 16, 32), {}),  # three levels
        ((24, 40, 112), (4, 8, 16), {"context": (3, 4), "coarsest": 6}),
    ],
)
def test_other_backbones(widths: tuple[int, ...], strides: tuple[int, ...], options: dict) -> None:
    backbone = Levels(widths, strides)
    neck = MSEFPN(backbone, channels=64, **options)
    assert neck.sem.w_v.in_channels == sum(widths[-3:]) if strides[-1] == 32 else 64
    steps(neck, maps(backbone, (160, 224)))


def test_channels_last_is_kept() -> None:
    neck = MSEFPN(SMALL, channels=32).to(memory_format=torch.channels_last)
    C = maps(SMALL, (64, 96))
    plain = neck(C)
    last = neck([c.contiguous(memory_format=torch.channels_last) for c in C])
    assert all(o.is_contiguous(memory_format=torch.channels_last) for o in last)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(plain, last))


@pytest.mark.parametrize("options", [{}, {"pool_first": False}, {"sim": "split", "gate": "ca"}])
@torch.no_grad()
def test_bfloat16(options: dict) -> None:
    neck = MSEFPN(SMALL, channels=64, **options).eval()
    C = maps(SMALL, (160, 224))
    plain = neck(C)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = neck(C)
    half = neck.to(torch.bfloat16)([c.bfloat16() for c in C])
    assert all(h.dtype == torch.bfloat16 for h in half)
    for a, b, c in zip(plain, mixed, half):
        assert torch.allclose(a, b.float(), atol=0.05 * float(a.abs().max()))
        assert torch.allclose(a, c.float(), atol=0.05 * float(a.abs().max()))


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"sim": "split", "gate": "ca", "gate_place": "topdown", "pool_first": False}, marks=pytest.mark.slow
        ),
    ],
)
@torch.no_grad()
def test_export(options: dict) -> None:
    neck = MSEFPN(SMALL, channels=32, **options).eval()
    check_export(neck, (maps(SMALL, (75, 129)),), (maps(SMALL, (75, 129)),), atol=1e-5)


def test_options_from_a_config() -> None:
    offered = {"model.pyramid": {"channels": 32, "finest": 3, "coarsest": 7, "top": "on_input"}}

    def make(**options: object) -> MSEFPN:
        return build("model.neck", {"type": "mse_fpn"} | options, NECKS, {"levels": SMALL}, offered)

    assert make(context=[4, 5], sem="channel", gate_reduction=None).sources == [2, 3]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sim": "none"}, "sem=full needs a sim"),
        ({"channels": 48}, "channels=48 must be a multiple of sim_groups=32"),
        ({"sim_groups": 0}, "sim_groups=0"),
        ({"context": (3, 6)}, r"context=\(3, 6\) must name some of the backbone's levels \[2, 3, 4, 5\]"),
        ({"context": ()}, "context="),
        ({"context": (4, 4)}, "each once"),
        ({"context": (2,), "sim": "split"}, "sim=split needs a level"),
        ({"v_groups": 5}, "v_groups=5 must divide the 72 channels"),
        ({"reduction": 0}, "reduction=0"),
        ({"gate_reduction": 0}, "gate_reduction=0"),
        ({"finest": 6}, "finest=6"),
        ({"sem_conv": True, "sim": "split"}, "sem_conv=true mixes the channels of all levels, sim=split"),
        ({"sem": "none", "sem_conv": True, "sim": "none"}, "sim=none does not take them"),
        ({"sim": "add"}, "sim=add needs a context of the laterals' 64 channels: set sem_conv=true"),
        ({"gate": "ca", "gate_source": "backbone"}, "gate_source=backbone is an option of gate=gcg, got gate=ca"),
    ],
)
def test_bad_options_are_refused(options: dict, text: str) -> None:
    with pytest.raises(InputError, match=text):
        MSEFPN(SMALL, **({"channels": 64} | options))
