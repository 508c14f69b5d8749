"""SMSL against its equations, its printed parameter counts and the contract of a neck."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fakes import check_export, maps, shuffled
from fusedet.errors import InputError
from fusedet.models.build import build
from fusedet.models.necks import NECKS
from fusedet.models.necks.smsl import SMSL, add_resized, combine
from fusedet.models.ops.pyramid_resize import resize_nearest
from fusedet.types import Levels

BACKBONE = Levels((256, 512, 1024, 2048), (4, 8, 16, 32))
SMALL_BODY = Levels((8, 16, 24, 32), (4, 8, 16, 32))


def pyramid(channels: int, count: int = 5) -> Levels:
    return Levels((channels,) * count, tuple(8 * 2**i for i in range(count)))


# -- the equations implemented independently, value by value


def resized(x: Tensor, h: int, w: int) -> Tensor:
    """(C, H, W) at a size: the maximum of each window where it shrinks, the nearest value where it grows."""
    C, H, W = x.shape
    out = torch.empty(C, h, w, dtype=x.dtype)
    for i, j in product(range(h), range(w)):
        if h >= H and w >= W:
            out[:, i, j] = x[:, i * H // h, j * W // w]
        else:
            rows, columns = (i * H // h, -(-(i + 1) * H // h)), (j * W // w, -(-(j + 1) * W // w))
            out[:, i, j] = x[:, rows[0] : rows[1], columns[0] : columns[1]].amax(dim=(1, 2))
    return out


def equations(smsl: SMSL, P: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Eq. 1-15 for one image, P^l (C, H_l, W_l), to the levels and A (T, L, C)."""
    T, L, C = smsl.select.shape
    middle = (L - 1) // 2
    _, H, W = P[middle].shape
    cells = list(product(range(H), range(W)))
    D = [resized(p, H, W) for p in P]
    D_all = [D[i][c] for i in range(L) for c in range(C)]  # (1), LC maps
    x = torch.stack([sum(d[y, z] for y, z in cells) / len(cells) for d in D_all])  # (2)
    s = torch.ones(L * C, dtype=x.dtype)
    if smsl.rescale:
        W1, W2 = smsl.rescale.W1, smsl.rescale.W2
        s = 1 / (1 + torch.exp(-(W2.weight @ (W1.weight @ x + W1.bias).clamp(min=0) + W2.bias)))  # (3)
    J = [scale * d for scale, d in zip(s, D_all)]  # (4)
    Q = [J[i * C : (i + 1) * C] for i in range(L)]  # (5-6)
    g = torch.stack([sum(Q[i][c][y, z] for i in range(L) for y, z in cells) / len(cells) for c in range(C)])  # (7-8)
    A = torch.empty(T, L, C, dtype=x.dtype)
    F = torch.zeros(T, C, H, W, dtype=x.dtype)
    k = smsl.select.W.shape[1]
    for t in range(T):
        fc1 = smsl.select.W[t] @ g + smsl.select.W_bias[t * k : (t + 1) * k]
        normal = (fc1 - fc1.mean()) / torch.sqrt(((fc1 - fc1.mean()) ** 2).mean() + 1e-5)
        z = normal * smsl.select.norm_weight[t * k : (t + 1) * k] + smsl.select.norm_bias[t * k : (t + 1) * k]
        U = smsl.select.V[t] @ z.clamp(min=0) + smsl.select.V_bias[t * L * C : (t + 1) * L * C]  # (9-10)
        for c in range(C):
            total = sum(torch.exp(U[j * C + c]) for j in range(L))
            for i in range(L):
                A[t, i, c] = torch.exp(U[i * C + c]) / total  # (11)
                F[t, c] += A[t, i, c] * Q[i][c]  # (12-13)
    if smsl.non_local:
        F = F[:L] + non_local(smsl.non_local, F[L])  # (14)
    return [p + resized(F[i], *p.shape[1:]) for i, p in enumerate(P)], A  # (15)


def non_local(block: nn.Module, x: Tensor) -> Tensor:
    """x + out(softmax(theta^T phi / sqrt(C)) g), cell by cell."""
    C, H, W = x.shape

    def dense(layer: nn.Module, v: Tensor) -> Tensor:
        return layer.weight.flatten(1) @ v + layer.bias

    cells = [x[:, i, j] for i, j in product(range(H), range(W))]
    out = torch.empty_like(x)
    for n, (i, j) in enumerate(product(range(H), range(W))):
        likeness = torch.stack(
            [dense(block.theta, cells[n]) @ dense(block.phi, other) / math.sqrt(C) for other in cells]
        )
        share = torch.exp(likeness) / torch.exp(likeness).sum()
        out[:, i, j] = cells[n] + dense(block.out, sum(a * dense(block.g, other) for a, other in zip(share, cells)))
    return out


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (75, 129)])
@pytest.mark.parametrize(("rescaling", "glob"), [(True, True), (False, True), (True, False), (False, False)])
@torch.no_grad()
def test_the_equations(size: tuple[int, int], rescaling: bool, glob: bool) -> None:
    levels = pyramid(4)
    smsl = shuffled(SMSL(levels, channel_rescaling=rescaling, global_feature=glob, reduction=2).double())
    P = maps(levels, size, n=2, dtype=torch.float64)
    actual, A = smsl(P), smsl.weights(P)
    for image in range(2):
        expected, wanted_A = equations(smsl, [p[image] for p in P])
        assert torch.allclose(A[image], wanted_A, atol=1e-12)
        for a, b in zip(actual, expected):
            assert torch.allclose(a[image], b, atol=1e-10)


@pytest.mark.parametrize(("count", "middle"), [(2, 0), (3, 1), (4, 1), (5, 2)])
@torch.no_grad()
def test_any_number_of_levels(count: int, middle: int) -> None:
    levels = pyramid(4, count)
    smsl = shuffled(SMSL(levels, reduction=2).double())
    P = maps(levels, (40, 64), n=1, dtype=torch.float64)
    assert smsl.gather_level == middle
    expected, _ = equations(smsl, [p[0] for p in P])
    assert all(torch.allclose(a[0], b, atol=1e-10) for a, b in zip(smsl(P), expected))


# -- invariants


@pytest.mark.parametrize("mode", ["on_neck", "standalone"])
@torch.no_grad()
def test_weights_sum_to_one_over_levels(mode: str) -> None:
    levels = pyramid(16) if mode == "on_neck" else SMALL_BODY
    smsl = shuffled(SMSL(levels, mode, channels=16))
    A = smsl.weights(maps(levels, (64, 96)))
    assert A.shape == (2, 6, 5, 16)  # five levels and the global feature
    assert (A > 0).all()
    assert torch.allclose(A.sum(dim=2), torch.tensor(1.0))
    assert SMSL(levels, mode, channels=16, global_feature=False).weights(maps(levels, (64, 96))).shape == (2, 5, 5, 16)


@torch.no_grad()
def test_equal_levels_by_hand() -> None:
    """Shares of equal maps give that map whatever the weights: once, and once more from the global feature, which
    starts unrefined."""
    P = [torch.full_like(p, 3.0) for p in maps(pyramid(16), (64, 96))]
    local = SMSL(pyramid(16), channel_rescaling=False, global_feature=False)
    both = SMSL(pyramid(16), channel_rescaling=False)
    assert all(torch.allclose(out, torch.tensor(6.0)) for out in local(P))
    assert all(torch.allclose(out, torch.tensor(9.0)) for out in both(P))
    rescaled = SMSL(pyramid(16))
    nn.init.zeros_(rescaled.rescale.W2.weight)
    nn.init.zeros_(rescaled.rescale.W2.bias)  # every scale is 1/2
    assert all(torch.allclose(out, torch.tensor(6.0)) for out in rescaled(P))


@torch.no_grad()
def test_every_target_has_its_own_weights() -> None:
    smsl = SMSL(pyramid(16))
    P = maps(pyramid(16), (64, 96))
    before, A = smsl(P), smsl.weights(P)
    smsl.select.V_bias.view(6, 5, 16)[0, 3] += 2  # raises the share of level 3 in target 0
    after, B = smsl(P), smsl.weights(P)
    assert (B[:, 0, 3] > A[:, 0, 3]).all()
    assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, True, True, True, True]


def test_large_levels_are_summed_in_blocks() -> None:
    p, f = torch.randn(2, 3, 12, 10), torch.randn(2, 3, 4, 5)
    for form in (torch.contiguous_format, torch.channels_last):
        actual = add_resized(p.contiguous(memory_format=form), f.contiguous(memory_format=form), 0, 2)
        assert torch.equal(actual, p + resize_nearest(f, (12, 10)))
        assert actual.is_contiguous(memory_format=form)


def test_combination_is_a_sum_over_levels() -> None:
    D, weights = (
        [torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(4)],
        torch.randn(2, 6, 4, 3, dtype=torch.float64),
    )
    assert torch.allclose(combine(D, weights), torch.einsum("nlchw,ntlc->ntchw", torch.stack(D, 1), weights))


# -- counts


@pytest.mark.parametrize(
    ("rescaling", "glob", "count"),
    [(False, False, 252_640), (True, False, 663_680), (False, True, 566_336), (True, True, 977_376)],
)
def test_parameters_of_table_1(rescaling: bool, glob: bool, count: int) -> None:
    smsl = SMSL(pyramid(256), channel_rescaling=rescaling, global_feature=glob)
    assert sum(p.numel() for p in smsl.parameters()) == count


def test_parts_of_the_count() -> None:
    smsl = SMSL(pyramid(256))
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in smsl.named_children()} == {
        "rescale": 411_040,
        "select": 49_344 + 384 + 253_440,  # FC1, LN, FC2
        "non_local": 263_168,
    }
    assert sum(p.numel() for p in SMSL(pyramid(256, 4)).parameters()) == 736_864


@pytest.mark.parametrize(
    ("strides", "size", "cost"), [((8, 16, 32, 64, 128), (800, 1344), 0.84), ((4, 8, 16, 32, 64), (640, 640), 1.73)]
)
def test_multiply_adds(strides: tuple[int, ...], size: tuple[int, int], cost: float) -> None:
    levels = Levels((256,) * 5, strides)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        SMSL(levels)(maps(levels, size, n=1))
    assert counter.get_total_flops() / 2e9 == pytest.approx(cost, abs=0.005)


# -- contracts


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (75, 129), (8, 8)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_any_size_trains(size: tuple[int, int], channels_last: bool) -> None:
    levels = pyramid(32)
    smsl = SMSL(levels, zero_init=False)
    form = torch.channels_last if channels_last else torch.contiguous_format
    P = [p.contiguous(memory_format=form) for p in maps(levels, size, n=1)]
    kept = [p.clone() for p in P]
    outputs = smsl(P)
    assert smsl.levels == levels
    assert [o.shape for o in outputs] == [p.shape for p in P]
    assert all(torch.equal(a, b) for a, b in zip(P, kept))
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in smsl.parameters())
    # a bias of phi, or of theta where there is one cell, adds a constant to all products, which the softmax cancels
    idle = (
        {"non_local.phi.bias"}
        if smsl(P)[2].shape[2:].numel() > 1
        else {f"non_local.{m}.{p}" for m in ("theta", "phi") for p in ("weight", "bias")}
    )
    assert all(p.grad.any() for name, p in smsl.named_parameters() if name not in idle)


def test_zero_init_starts_without_refinement() -> None:
    """With zero_init only the last convolution of the non-local block has a gradient at first."""
    smsl = SMSL(pyramid(32))
    sum(o.square().mean() for o in smsl(maps(pyramid(32), (64, 96)))).backward()
    idle = {f"non_local.{m}.{p}" for m in ("theta", "phi", "g") for p in ("weight", "bias")}
    assert {name for name, p in smsl.named_parameters() if not p.grad.any()} == idle


@pytest.mark.parametrize(
    ("finest", "coarsest", "top"), [(3, 7, "on_input"), (3, 7, "on_output"), (2, 6, "max_pool"), (3, 5, "on_input")]
)
def test_standalone_keeps_the_promise_of_a_pyramid(finest: int, coarsest: int, top: str) -> None:
    smsl = SMSL(SMALL_BODY, "standalone", channels=32, finest=finest, coarsest=coarsest, top=top, zero_init=False)
    outputs = smsl(maps(SMALL_BODY, (64, 96)))
    assert smsl.levels == Levels((32,) * len(outputs), tuple(2**i for i in range(finest, coarsest + 1)))
    assert [o.shape for o in outputs] == [(2, 32, math.ceil(64 / s), math.ceil(96 / s)) for s in smsl.levels.strides]
    sum(o.square().mean() for o in outputs).backward()
    assert all(p.grad.any() for name, p in smsl.named_parameters() if name != "non_local.phi.bias")


@torch.no_grad()
def test_standalone_is_laterals_then_the_same_module() -> None:
    """C6 and C7 are strided convolutions of C5, as the text says; what follows is the module that stands on a neck."""
    alone = shuffled(SMSL(SMALL_BODY, "standalone", channels=16), std=0.1)
    on_neck = SMSL(pyramid(16))
    on_neck.load_state_dict({k: v for k, v in alone.state_dict().items() if not k.startswith("sources.")})
    C = maps(SMALL_BODY, (64, 96))
    top = alone.sources.top.convs
    levels = [lateral(c) for lateral, c in zip(alone.sources.lateral, C[1:])]
    levels += [top[0](C[3]), top[1](top[0](C[3]))]
    assert all(torch.allclose(a, b) for a, b in zip(alone(C), on_neck(levels)))
    counts = sum(p.numel() for p in SMSL(BACKBONE, "standalone").parameters())
    assert counts == 977_376 + (512 + 1024 + 2048 + 3) * 256 + (2048 * 9 + 1) * 256 + (256 * 9 + 1) * 256


@pytest.mark.parametrize("mode", ["on_neck", "standalone"])
@torch.no_grad()
def test_bfloat16(mode: str) -> None:
    levels = pyramid(32) if mode == "on_neck" else SMALL_BODY
    smsl = SMSL(levels, mode, channels=32, zero_init=False).eval()
    P = maps(levels, (75, 129))
    plain = smsl(P)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = smsl(P)
    half = smsl.to(torch.bfloat16)([p.bfloat16() for p in P])
    assert all(h.dtype == torch.bfloat16 for h in half)
    for a, b, c in zip(plain, mixed, half):
        assert torch.allclose(a, b.float(), atol=0.03 * float(a.abs().max()))
        assert torch.allclose(a, c.float(), atol=0.03 * float(a.abs().max()))


@pytest.mark.parametrize("mode", ["on_neck", pytest.param("standalone", marks=pytest.mark.slow)])
@torch.no_grad()
def test_it_exports(mode: str) -> None:
    levels = pyramid(16) if mode == "on_neck" else SMALL_BODY
    smsl = SMSL(levels, mode, channels=16).eval()
    check_export(smsl, (maps(levels, (75, 129)),), (maps(levels, (75, 129)),), atol=1e-5)


def test_a_config_builds_it() -> None:
    offered = {"model.pyramid": {"channels": 16, "finest": 3, "coarsest": 7, "top": "on_input"}}

    def make(levels: Levels, **options: object) -> SMSL:
        return build("model.neck", {"type": "smsl"} | options, NECKS, {"levels": levels}, offered)

    assert make(pyramid(32), channel_rescaling=False).levels == pyramid(32)
    assert make(SMALL_BODY, mode="standalone").levels == pyramid(16)
    with pytest.raises(InputError, match=r"model\.pyramid\.channels"):
        make(SMALL_BODY, mode="standalone", channels=32)


def test_unfit_levels_are_refused() -> None:
    with pytest.raises(InputError, match=r"one width.*mode=standalone"):
        SMSL(BACKBONE)
    with pytest.raises(InputError, match="at least two, got 1"):
        SMSL(pyramid(32, 1))
    with pytest.raises(InputError, match="finest=7"):
        SMSL(BACKBONE, "standalone", finest=7)
    for reduction in (0, 9, 16):
        with pytest.raises(InputError, match=rf"reduction={reduction} .*16 channels"):
            SMSL(pyramid(16), reduction=reduction)


# -- choices


@pytest.mark.parametrize("resizing", ["nearest", "bilinear"])
@torch.no_grad()
def test_resizing_by_interpolation(resizing: str) -> None:
    """Every level to the middle one's size and back; the mixture itself is that of the default."""
    levels = pyramid(4)
    smsl = shuffled(SMSL(levels, reduction=2, resizing=resizing, global_feature=False).double())
    P = maps(levels, (75, 129), dtype=torch.float64)
    size = P[2].shape[-2:]
    D = [nn.functional.interpolate(p, size=size, mode=resizing) for p in P]
    s, A = smsl.attend(D)
    assert torch.equal(smsl.weights(P), A)
    F = torch.einsum("lnchw,ntlc->tnchw", torch.stack(D), A * s)
    expected = [p + nn.functional.interpolate(f, size=p.shape[-2:], mode=resizing) for p, f in zip(P, F)]
    assert all(torch.allclose(a, b) for a, b in zip(smsl(P), expected, strict=True))
    pooled = SMSL(levels, reduction=2, global_feature=False).double()
    pooled.load_state_dict(smsl.state_dict())
    assert not torch.allclose(pooled(P)[0], expected[0])


@torch.no_grad()
def test_scale_of_the_non_local_block() -> None:
    """Without it the products are sqrt(C) times larger: theta times sqrt(C) gives the same block."""
    scaled, plain = (SMSL(pyramid(16), non_local_scale=scale, zero_init=False) for scale in (True, False))
    for layer in (scaled.non_local.theta, scaled.non_local.phi, scaled.non_local.out):
        nn.init.normal_(layer.weight)
    plain.load_state_dict(scaled.state_dict())
    P = maps(pyramid(16), (64, 96))
    assert not torch.allclose(plain(P)[0], scaled(P)[0], atol=1e-5)
    plain.non_local.theta.weight /= math.sqrt(16)
    plain.non_local.theta.bias /= math.sqrt(16)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain(P), scaled(P)))


def test_unknown_resizing_is_refused() -> None:
    with pytest.raises(InputError, match="unknown resizing 'bilinaer': did you mean 'bilinear'"):
        SMSL(pyramid(16), resizing="bilinaer")
