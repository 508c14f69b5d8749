"""The necks that the papers compare with: PAFPN, BFP, BiFPN and AugFPN."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fakes import check_export, shuffled
from fusedet.errors import InputError
from fusedet.models.necks import BFP, FPN, PAFPN, AugFPN, BiFPN
from fusedet.models.necks.aug_fpn import Context, pooled_size
from fusedet.models.necks.bifpn import BiFPNLayer, Node, downsample
from fusedet.models.necks.mse_fpn import SEM
from fusedet.models.ops.exporting import exporting
from fusedet.models.ops.layers import BatchNorm, init_xavier
from fusedet.types import Features, Levels

BACKBONE = Levels((8, 16, 24, 32), (4, 8, 16, 32))
R50 = Levels((256, 512, 1024, 2048), (4, 8, 16, 32))
PYRAMID = Levels((32,) * 5, (8, 16, 32, 64, 128))
SIZES = [(64, 96), (33, 47), (75, 129)]

# every form of every neck on BACKBONE's levels; bfp refines a pyramid
FORMS = {
    "pafpn": lambda **o: PAFPN(BACKBONE, 32, **o),
    "pafpn_smsl": lambda **o: PAFPN(BACKBONE, 32, form="smsl", **o),
    "bifpn": lambda **o: BiFPN(BACKBONE, 32, **o),
    "bifpn_gn": lambda **o: BiFPN(BACKBONE, 32, norm="gn", repeats=1, separable=False, **o),
    "aug_fpn": lambda **o: AugFPN(BACKBONE, 32, **o),
    "aug_fpn_plain": lambda **o: AugFPN(BACKBONE, 32, augment=False, **o),
    "bfp": lambda **o: BFP(PYRAMID, **o),
    "bfp_conv": lambda **o: BFP(PYRAMID, refine="conv", **o),
    "bfp_none": lambda **o: BFP(PYRAMID, refine="none", **o),
}


def maps(levels: Levels, size: tuple[int, int], n: int = 2, rounded: object = math.ceil) -> Features:
    """Random maps of a backbone or neck; each level halves the size of the one before, rounded up or down."""
    actual, scale = [], 1
    for channels, stride in zip(levels.channels, levels.strides):
        while scale < stride:
            size, scale = tuple(max(1, rounded(s / 2)) for s in size), 2 * scale
        actual.append(torch.randn(n, channels, *size))
    return actual


def source(neck: nn.Module) -> Levels:
    return PYRAMID if isinstance(neck, BFP) else BACKBONE


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def make_identity(module: nn.Module) -> None:
    """Make every convolution the identity on the channels that both sides have."""
    for m in module.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.dirac_(m.weight, groups=m.groups)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def doubled(x: Tensor, like: Tensor) -> Tensor:
    """Nearest neighbors in the size of `like`, by indices."""
    rows = torch.arange(like.shape[-2]) * x.shape[-2] // like.shape[-2]
    columns = torch.arange(like.shape[-1]) * x.shape[-1] // like.shape[-1]
    return x[..., rows, :][..., columns]


# -- all necks


@pytest.mark.parametrize(("form", "size", "rounded"), list(product(FORMS, SIZES, [math.ceil, math.floor])))
def test_shapes_gradients_and_unchanged_inputs(form: str, size: tuple[int, int], rounded: object) -> None:
    neck = FORMS[form]()
    inputs = [m.requires_grad_() for m in maps(source(neck), size, rounded=rounded)]
    kept = [m.detach().clone() for m in inputs]
    outputs = neck(inputs)
    assert neck.levels == PYRAMID
    used = inputs if source(neck) is PYRAMID else inputs[1:]
    shapes = [tuple(m.shape[2:]) for m in used]
    while len(shapes) < 5:  # the levels that the neck makes round up
        shapes.append(tuple(math.ceil(s / 2) for s in shapes[-1]))
    assert [tuple(o.shape) for o in outputs] == [(2, 32, *s) for s in shapes]
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    # the block's last convolution starts at 0
    constant = ("refine.theta", "refine.phi", "refine.g.") if form == "bfp" else ()
    for name, p in neck.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert p.grad.any() or name.startswith(constant), name
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [True, False])
def test_a_batch_of_one_down_to_one_cell(form: str, train: bool) -> None:
    neck = FORMS[form]().train(train)
    for out in neck(maps(source(neck), (33, 47), n=1)):
        assert out.isfinite().all()
    assert all(b.isfinite().all() for b in neck.buffers())


@pytest.mark.parametrize(
    ("form", "top"), list(product([k for k in FORMS if "bfp" not in k], ["max_pool", "on_output"]))
)
def test_other_pyramids(form: str, top: str) -> None:
    neck = FORMS[form](finest=2, coarsest=6, top=top)
    outputs = neck(maps(BACKBONE, (75, 129)))
    assert neck.levels == Levels((32,) * 5, (4, 8, 16, 32, 64))
    assert [tuple(o.shape[2:]) for o in outputs] == [(19, 33), (10, 17), (5, 9), (3, 5), (2, 3)]
    single = FORMS[form](finest=5, coarsest=5, top=top)  # without fusion
    assert [tuple(o.shape[2:]) for o in single(maps(BACKBONE, (75, 129)))] == [(3, 5)]


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_and_channels_last(form: str) -> None:
    neck = FORMS[form]().eval()
    inputs = maps(source(neck), (64, 96))
    expected = neck(inputs)

    def close(actual: Features) -> bool:
        return all((a.float() - b).abs().max() <= 0.05 * b.abs().max() for a, b in zip(actual, expected, strict=True))

    with torch.autocast("cpu", torch.bfloat16):
        assert close(neck(inputs))
    assert all(
        torch.allclose(a, b, atol=1e-5)
        for a, b in zip(neck([m.to(memory_format=torch.channels_last) for m in inputs]), expected)
    )
    actual = neck.to(torch.bfloat16)([m.to(torch.bfloat16) for m in inputs])
    assert all(f.dtype == torch.bfloat16 for f in actual)
    assert close(actual)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["bifpn", "pafpn", "pafpn_smsl", "aug_fpn", "bfp"])
def test_export(form: str) -> None:
    neck = FORMS[form]().eval()
    check_export(neck, (maps(source(neck), (75, 129), n=1),), (maps(source(neck), (75, 129), n=1),), atol=1e-5)


@pytest.mark.parametrize("make", [FPN, PAFPN, BiFPN, AugFPN])
def test_impossible_pyramids_are_refused(make: type[nn.Module]) -> None:
    with pytest.raises(InputError, match="finest=6"):
        make(BACKBONE, finest=6)
    with pytest.raises(InputError, match="coarsest=4"):
        make(BACKBONE, coarsest=4)


# -- PAFPN


def test_pafpn_parameters() -> None:
    """A 3x3 convolution of 256 to 256 channels has 590,080 parameters; MMDetection adds four, SMSL's authors three."""
    with torch.device("meta"):
        plain, conv = count(FPN(R50)), 590_080
        assert count(PAFPN(R50)) - plain == 4 * conv
        assert count(PAFPN(R50, form="smsl")) - plain == 3 * conv
        # RetinaNet, ResNet-50: table 2 of SMSL
        assert 37_743_348 - plain + count(PAFPN(R50, form="smsl")) == 39_513_588
        assert count(PAFPN(R50, finest=2, coarsest=6, form="smsl")) - count(FPN(R50, finest=2, coarsest=6)) == 4 * conv
        assert count(PAFPN(R50, finest=2, coarsest=6)) - count(FPN(R50, finest=2, coarsest=6)) == 6 * conv


@pytest.mark.parametrize("form", ["mmdet", "smsl"])
def test_pafpn_by_hand(form: str) -> None:
    """With identity convolutions every step is a sum; a stride-2 identity takes every second cell, a pooling the
    largest of four."""
    neck = PAFPN(Levels((1, 1), (8, 16)), channels=1, coarsest=5, top="max_pool", form=form)
    make_identity(neck)
    fine, coarse = torch.arange(6.0).reshape(1, 1, 2, 3), torch.tensor([[10.0, 20.0]]).reshape(1, 1, 1, 2)
    n3, n4, n5 = neck([fine, coarse])
    assert n3.flatten().tolist() == [10, 11, 22, 13, 14, 25]  # = P3
    assert n4.flatten().tolist() == ([10 + 10, 20 + 22] if form == "mmdet" else [10 + 14, 20 + 25])
    assert n5.flatten().tolist() == n4.flatten().tolist()[:1]


@pytest.mark.parametrize("form", ["mmdet", "smsl"])
@pytest.mark.parametrize("size", SIZES)
def test_pafpn_against_its_equations(form: str, size: tuple[int, int]) -> None:
    neck = PAFPN(BACKBONE, 8, form=form).double()
    c = [m.double() for m in maps(BACKBONE, size)]

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight, bias = neck.get_parameter(f"{name}.weight"), neck.get_parameter(f"{name}.bias")
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2)

    m5 = conv("fpn.lateral.2", c[3])
    m4 = conv("fpn.lateral.1", c[2]) + doubled(m5, c[2])
    m3 = conv("fpn.lateral.0", c[1]) + doubled(m4, c[1])
    p3, p4, p5 = (conv(f"fpn.output.{i}", m) for i, m in enumerate([m3, m4, m5]))
    if form == "mmdet":
        s4 = p4 + conv("down.0", p3, 2)
        s5 = p5 + conv("down.1", s4, 2)
        expected = [p3, conv("output.0", s4), conv("output.1", s5)]
    else:
        n3 = conv("output.0", p3)
        n4 = conv("output.1", p4 + halved(n3))
        expected = [n3, n4, conv("output.2", p5 + halved(n4))]
    p6 = conv("top.convs.0", c[3], 2)
    expected += [p6, conv("top.convs.1", p6, 2)]
    assert all(torch.allclose(a, b) for a, b in zip(neck(c), expected, strict=True))


def halved(x: Tensor) -> Tensor:
    """2x2 max pooling by a loop; the last row and column of an odd size are windows of their own."""
    height, width = x.shape[-2:]
    rows = [[x[..., i : i + 2, j : j + 2].amax(dim=(2, 3)) for j in range(0, width, 2)] for i in range(0, height, 2)]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


# -- BFP


def test_bfp_by_hand() -> None:
    """Without refinement every level gets the mean of all, gathered by the largest or the nearest cell."""
    neck = BFP(Levels((1, 1, 1), (8, 16, 32)), refine_level=1, refine="none")
    fine = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]]).reshape(1, 1, 2, 4)
    middle = torch.tensor([[10.0, 20.0]]).reshape(1, 1, 1, 2)
    coarse = torch.tensor([[30.0]]).reshape(1, 1, 1, 1)
    a, b, c = neck([fine, middle, coarse])
    left, right = (6 + 10 + 30) / 3, (8 + 20 + 30) / 3
    assert torch.allclose(a - fine, torch.tensor([left, left, right, right]).expand(1, 1, 2, 4))
    assert torch.allclose(b.flatten(), torch.tensor([10 + left, 20 + right]))
    assert torch.allclose(c.flatten(), torch.tensor([30 + right]))


def test_bfp_refines_the_mean() -> None:
    """On levels of one size, the non-local block by loops over cells; no 1 / sqrt(C)."""
    torch.manual_seed(0)
    neck = shuffled(BFP(Levels((4, 4), (8, 16)), refine_level=0)).double()
    p = [torch.randn(1, 4, 2, 3).double() for _ in range(2)]
    mean = ((p[0] + p[1]) / 2).reshape(4, 6)

    def at(name: str, x: Tensor) -> Tensor:
        layer = getattr(neck.refine, name)
        return layer.weight[:, :, 0, 0] @ x + layer.bias

    mixed = torch.zeros(4, 6).double()
    for i in range(6):
        exps = [torch.exp(at("theta", mean[:, i]) @ at("phi", mean[:, j])) for j in range(6)]
        mixed[:, i] = mean[:, i] + at("out", sum(e / sum(exps) * at("g", mean[:, j]) for j, e in enumerate(exps)))
    for before, after in zip(p, neck(p)):
        assert torch.allclose(after - before, mixed.reshape(1, 4, 2, 3))


def test_bfp_starts_with_the_mean_itself() -> None:
    neck = BFP(PYRAMID)
    assert 0.009 < float(neck.refine.theta.weight.detach().std()) < 0.011
    inputs = maps(PYRAMID, (64, 96))
    for ours, plain in zip(neck(inputs), BFP(PYRAMID, refine="none")(inputs)):
        assert torch.equal(ours, plain)


def test_bfp_parameters_and_levels() -> None:
    levels = Levels((256,) * 5, (8, 16, 32, 64, 128))
    assert count(BFP(levels)) == 4 * (256 * 256 + 256)
    assert count(BFP(levels, refine="conv")) == 590_080
    assert count(BFP(levels, refine="none")) == 0
    assert BFP(levels).levels is levels


def test_bfp_refuses_wrong_levels() -> None:
    with pytest.raises(InputError, match=r"equal channels, got \(8, 16, 24, 32\)"):
        BFP(BACKBONE)
    for wrong in (5, -1):
        with pytest.raises(InputError, match=f"refine_level={wrong} must be the index of one of the 5 levels, 0 to 4"):
            BFP(PYRAMID, refine_level=wrong)


# -- BiFPN


def plain(layer: nn.Module) -> None:
    """Identity convolutions and norms: only the fusion and SiLU remain."""
    make_identity(layer)
    for m in layer.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.0


@pytest.mark.parametrize("separable", [True, False])
def test_bifpn_fuses_by_hand(separable: bool) -> None:
    node = Node(3, 2, "bn", separable).eval()
    plain(node)
    node.weight.data = torch.tensor([1.0, 3.0, -5.0])  # a negative weight counts as zero
    x = [torch.full((1, 2, 3, 4), v) for v in (2.0, 4.0, 100.0)]
    mean = (1 * 2 + 3 * 4) / (4 + 1e-4)
    assert torch.allclose(node.fuse(x), torch.tensor(mean))
    assert torch.allclose(node(x), F.silu(torch.tensor(mean)))


def test_bifpn_layer_against_its_figure() -> None:
    """Figure 2d on four levels with equal weights, node by node."""
    layer = BiFPNLayer(4, 2).double().eval()
    plain(layer)
    p3, p4, p5, p6 = maps(Levels((2,) * 4, (8, 16, 32, 64)), (75, 129))
    p3, p4, p5, p6 = (m.double() for m in (p3, p4, p5, p6))

    def node(*x: Tensor) -> Tensor:
        return F.silu(sum(x) / (len(x) + 1e-4))

    m5 = node(p5, doubled(p6, p5))
    m4 = node(p4, doubled(m5, p4))
    o3 = node(p3, doubled(m4, p3))
    o4 = node(p4, m4, downsample(o3, p4))
    o5 = node(p5, m5, downsample(o4, p5))
    o6 = node(p6, downsample(o5, p6))
    assert all(torch.allclose(a, b) for a, b in zip(layer([p3, p4, p5, p6]), [o3, o4, o5, o6], strict=True))


def test_bifpn_pooling_by_hand() -> None:
    x = torch.tensor([[0.0, 1, 2, 3, 4], [9, 0, 0, 0, 5], [0, 0, 7, 0, 0]]).reshape(1, 1, 3, 5)
    assert downsample(x, torch.zeros(2, 3)).flatten().tolist() == [9, 3, 5, 9, 7, 5]
    assert downsample(x, torch.zeros(1, 2)).flatten().tolist() == [9, 3]  # a backbone that rounds down


@pytest.mark.parametrize(("repeats", "separable"), [(1, True), (3, True), (2, False)])
def test_bifpn_parameters(repeats: int, separable: bool) -> None:
    """Eight nodes per layer for five levels: three of the four bottom-up ones have three inputs; laterals have no
    biases but norms."""
    c = 64
    one = (9 * c + c * c if separable else 9 * c * c) + 2 * c
    layer = 8 * one + 4 * 2 + 3 * 3 + 2
    laterals = (512 + 1024 + 2048) * c + 3 * 2 * c
    tops = 9 * 2048 * c + c + 9 * c * c + c
    assert count(BiFPN(R50, c, repeats=repeats, separable=separable)) == repeats * layer + laterals + tops


def test_bifpn_repeats_its_layers() -> None:
    neck = BiFPN(BACKBONE, 32, repeats=2).eval()
    inputs = maps(BACKBONE, (64, 96))
    laterals = [lateral(c) for lateral, c in zip(neck.lateral, inputs[1:])]
    p = laterals + neck.top(inputs[-1], laterals[-1])
    assert all(torch.equal(a, b) for a, b in zip(neck.layers[1](neck.layers[0](p)), neck(inputs)))


def test_batch_norm_of_a_single_value() -> None:
    """One value has no variance: the running statistics normalize it and stay; two values are normalized as usual."""
    ours, theirs = BatchNorm(3, eps=1e-3, momentum=0.01), nn.BatchNorm2d(3, eps=1e-3, momentum=0.01)
    x = torch.randn(1, 3, 1, 1)
    assert torch.equal(ours.train()(x), theirs.eval()(x))
    assert torch.equal(ours.running_mean, torch.zeros(3))
    x = torch.randn(2, 3, 1, 1)
    assert torch.equal(ours(x), theirs.train()(x))
    assert torch.equal(ours.running_var, theirs.running_var)


def test_bifpn_norms_and_errors() -> None:
    norms = [m for m in BiFPN(BACKBONE, 32).modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 + 3 * 8
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.01)}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in BiFPN(BACKBONE, 32, norm="gn").modules())
    with pytest.raises(InputError, match="repeats=0 must be at least 1"):
        BiFPN(BACKBONE, repeats=0)
    with pytest.raises(InputError, match="norm=gn needs channels in multiples of 8, got 36"):
        BiFPN(BACKBONE, channels=36, norm="gn")


@pytest.mark.parametrize("groups", [1, 4, 32])
def test_xavier_starts_each_group_like_a_convolution_of_its_own(groups: int) -> None:
    layer = nn.Conv2d(256, 512, 3, groups=groups)
    init_xavier(layer)
    bound = math.sqrt(6 / (9 * (256 + 512) / groups))
    assert 0.98 * bound < layer.weight.abs().max() <= bound
    assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert not layer.bias.any()


def test_grouped_value_convolution_starts_at_the_scale_of_the_dense_one() -> None:
    """W_v of MSE-FPN: V keeps its size for any number of groups, where the map's channels are independent."""
    context = torch.randn(1, 128, 24, 24)
    sizes = []
    for groups in (1, 32):
        sem = SEM(128, 8, 16, groups, True, True, channel=False, spatial=True)
        init_xavier(sem)
        sizes.append(float(sem.w_v(context).detach().std()))
    assert sizes[1] == pytest.approx(sizes[0], rel=0.15)


# -- AugFPN


def test_augfpn_without_its_parts_is_fpn() -> None:
    """Weight for weight: the same names, the same outputs."""
    fpn, aug = FPN(BACKBONE, 32), AugFPN(BACKBONE, 32, augment=False, auxiliary_weight=0)
    aug.load_state_dict(fpn.state_dict())
    inputs = maps(BACKBONE, (75, 129))
    assert all(torch.equal(a, b) for a, b in zip(aug(inputs), fpn(inputs), strict=True))
    assert aug.auxiliary_weight == 0


@pytest.mark.parametrize("top", ["on_input", "on_output", "max_pool"])
@pytest.mark.parametrize("augment", [True, False])
def test_augfpn_auxiliary_pyramid(top: str, augment: bool) -> None:
    """The pyramid is that of forward; the other has the laterals before fusion and the same top on them."""
    neck = AugFPN(BACKBONE, 32, top=top, augment=augment)
    inputs = maps(BACKBONE, (75, 129))
    fused, unfused = neck.with_auxiliary(inputs)
    assert all(torch.equal(a, b) for a, b in zip(fused, neck(inputs), strict=True))
    laterals = [lateral(c) for lateral, c in zip(neck.lateral, inputs[1:])]
    expected = laterals + neck.top(inputs[-1], laterals[-1])
    assert all(torch.equal(a, b) for a, b in zip(unfused, expected, strict=True))
    assert [u.shape for u in unfused] == [f.shape for f in fused]
    assert neck.auxiliary_weight == 0.25


@pytest.mark.parametrize(
    ("size", "sizes"),
    [((25, 42), [(2, 4), (5, 8), (7, 12)]), ((3, 10), [(1, 1), (1, 2), (1, 3)]), ((1, 1), [(1, 1)] * 3)],
)
def test_augfpn_context_keeps_the_aspect(size: tuple[int, int], sizes: list[tuple[int, int]]) -> None:
    assert [pooled_size(size, r) for r in (0.1, 0.2, 0.3)] == sizes
    context = Context(2, 3, (0.1, 0.2, 0.3))
    recorded: list[tuple[int, ...]] = []
    for layer in context.reduce:
        layer.register_forward_hook(lambda _, inputs, output: recorded.append(tuple(inputs[0].shape[2:])))
    assert context(torch.randn(1, 2, *size)).shape == (1, 3, *size)
    assert recorded == sizes


@pytest.mark.parametrize("size", [(25, 42), (3, 10), (1, 1)])
def test_augfpn_context_exports_the_same(size: tuple[int, int]) -> None:
    context, c5 = Context(2, 3, (0.1, 0.2, 0.3)).double(), torch.randn(2, 2, *size).double()
    with exporting():
        exported = context(c5)
    torch.testing.assert_close(exported, context(c5))


def test_augfpn_context_against_its_equations() -> None:
    """Means over windows, 1x1 convolutions, bilinear steps between the corners and weighted sums, cell by cell."""
    context = Context(2, 3, (0.5, 0.25)).double()
    height, width = 4, 8
    c5 = torch.randn(1, 2, height, width).double()
    resized = []
    for layer, (h, w) in zip(context.reduce, [(2, 4), (1, 2)]):
        a, b = height // h, width // w
        pooled = torch.stack(
            [
                torch.stack([c5[0, :, a * i : a * (i + 1), b * j : b * (j + 1)].mean(dim=(1, 2)) for j in range(w)], 1)
                for i in range(h)
            ],
            1,
        )
        small = torch.einsum("oc,chw->ohw", layer.weight[:, :, 0, 0], pooled) + layer.bias[:, None, None]
        large = torch.zeros(3, height, width).double()
        for y, x in product(range(height), range(width)):
            v, u = y * (h - 1) / (height - 1), x * (w - 1) / (width - 1)
            for i, j in product(range(h), range(w)):
                large[:, y, x] += max(0.0, 1 - abs(v - i)) * max(0.0, 1 - abs(u - j)) * small[:, i, j]
        resized.append(large)
    first, _, second = context.weigh
    weights = torch.sigmoid(second(torch.relu(first(torch.cat(resized)[None]))))[0]
    expected = weights[0] * resized[0] + weights[1] * resized[1]
    assert torch.allclose(context(c5)[0], expected)
    neck = AugFPN(Levels((2,), (32,)), 3, finest=5, coarsest=5, ratios=(0.5, 0.25)).double()
    neck.context = context
    make_identity(neck.output)
    assert torch.allclose(neck([c5])[0], neck.lateral[0](c5) + expected)


def test_augfpn_parameters() -> None:
    context = 3 * (2048 * 256 + 256) + (3 * 256 * 256 + 256) + (9 * 256 * 3 + 3)
    with torch.device("meta"):
        assert count(AugFPN(R50)) - count(FPN(R50)) == context
        assert count(AugFPN(R50, ratios=(0.1,))) - count(FPN(R50)) == 2048 * 256 + 256 + 256 * 256 + 256 + 9 * 256 + 1


@pytest.mark.parametrize("ratios", [(), (0.0, 0.1), (0.2, 1.5), (float("nan"),)])
def test_augfpn_refuses_ratios(ratios: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match=r"ratios=.* must be one number or more, each above 0 and at most 1"):
        AugFPN(BACKBONE, ratios=ratios)


def test_augfpn_refuses_weights() -> None:
    for wrong in (-1.0, float("nan")):
        with pytest.raises(InputError, match=r"auxiliary_weight=.* must be at least 0"):
            AugFPN(BACKBONE, auxiliary_weight=wrong)
