"""MSFM against its equations in float64 loops, and its insertion into backbones."""

import copy
import math
from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fusedet.errors import InputError
from fusedet.models.backbones import TimmBackbone, insert_plugin
from fusedet.models.build import build
from fusedet.models.modules import MSFM, PLUGINS, MSFMPlugin
from fusedet.models.modules.msfm import scale_size
from fusedet.models.ops.layers import fold_batch_norm
from fusedet.models.profiling import count_cost

ALL = ("after_conv1", "after_conv2", "after_conv3")
BACKBONES = [
    "resnet10t",
    "resnetblur18",
    "resnet26t",
    "convnext_atto",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "efficientnet_es",
]
# with blocks as in EfficientNet, and bottlenecks as in the tests at the end
SIMILAR_BACKBONES = ("mobilenetv2_100", "resnet26t")


def modules(root: nn.Module) -> list[MSFM]:
    return [m for m in root.modules() if isinstance(m, MSFM)]


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def moved(module: nn.Module) -> Any:
    """Every parameter somewhere else, so that none hides behind a zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


def lively(name: str, **options: Any) -> TimmBackbone:
    """A backbone whose branches all say something: timm starts the last norm of every residual branch at zero."""
    backbone = TimmBackbone(name, pretrained=False, **options)
    for m in backbone.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.constant_(m.weight, 0.7)
    return backbone


# -- the paper's equations, once more, cell by cell


def literal_resize(x: Tensor, height: int, width: int, corners: bool = False) -> Tensor:
    """Bilinear: the images' corners meet and what lies outside takes the border's value, or the centers of the corner
    cells meet."""
    (rows, columns), out = x.shape[2:], x.new_zeros(*x.shape[:2], height, width)
    for i, j in product(range(height), range(width)):
        y, z = max(0.0, (i + 0.5) * rows / height - 0.5), max(0.0, (j + 0.5) * columns / width - 0.5)
        if corners:
            y, z = i * (rows - 1) / max(1, height - 1), j * (columns - 1) / max(1, width - 1)
        top, left = min(int(y), rows - 1), min(int(z), columns - 1)
        low, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
        a, b = y - top, z - left
        upper = (1 - b) * x[:, :, top, left] + b * x[:, :, top, right]
        lower = (1 - b) * x[:, :, low, left] + b * x[:, :, low, right]
        out[:, :, i, j] = (1 - a) * upper + a * lower
    return out


def literal_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    (n, _, height, width), k = x.shape, conv.weight.shape[-1] // 2
    out = (
        torch.stack([conv.bias.view(1, -1).expand(n, -1)] * (height * width), dim=-1).view(n, -1, height, width).clone()
    )
    for i, j, dy, dx in product(range(height), range(width), range(-k, k + 1), range(-k, k + 1)):
        if 0 <= i + dy < height and 0 <= j + dx < width:
            out[:, :, i, j] = out[:, :, i, j] + x[:, :, i + dy, j + dx] @ conv.weight[:, :, dy + k, dx + k].T
    return out


def literal_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    images = []
    for image in x:
        parts = [
            (part - part.mean()) / torch.sqrt(((part - part.mean()) ** 2).mean() + norm.eps)
            for part in image.chunk(norm.num_groups)
        ]
        images.append(torch.cat(parts) * norm.weight[:, None, None] + norm.bias[:, None, None])
    return torch.stack(images)


def literal(
    module: MSFM,
    x: Tensor,
    scales: tuple[float, ...],
    fusion: str = "add",
    squeeze_relu: bool = True,
    restore_relu: bool = False,
    align_corners: bool = False,
    **_: Any,
) -> Tensor:
    """M(x) = x + U(C[F_1(S(x)), ..., F_n(S(x))]) with F_n(a) = R^-1(CGN(...(CGN(R(a)))))."""
    height, width = x.shape[2:]

    def cgn(x, block):
        return literal_norm(literal_conv(x, block[0]), block[1]).clamp(min=0)

    a, branches = cgn(x, module.squeeze), []
    if not squeeze_relu:
        a = literal_norm(literal_conv(x, module.squeeze[0]), module.squeeze[1])
    for scale, branch in zip(scales, module.branches, strict=True):
        r = (
            literal_resize(a, max(1, math.floor(height * scale)), max(1, math.floor(width * scale)), align_corners)
            if scale != 1
            else a
        )
        for block in branch:
            r = cgn(r, block)
        branches.append(literal_resize(r, height, width, align_corners) if scale != 1 else r)
    combined = sum(branches[1:], branches[0]) if fusion == "add" else torch.cat(branches, dim=1)
    u = literal_norm(literal_conv(combined, module.unsqueeze.conv), module.unsqueeze.norm)
    return x + (u.clamp(min=0) if restore_relu else u)


FINAL = (0.5, 0.7, 1, 1.4, 2)
CASES: list[tuple[dict, tuple[int, ...]]] = [
    ({"scales": FINAL}, (2, 8, 3, 4)),
    ({"scales": FINAL, "conv_num_large_only": True}, (1, 8, 3, 5)),
    ({"scales": FINAL, "fusion": "cat", "conv_num": 1}, (2, 8, 3, 4)),
    ({"scales": (1, 1, 2), "groups": 1}, (1, 8, 3, 3)),
    ({"scales": (0.5, 0.7), "groups": 4}, (2, 8, 1, 2)),
    ({"scales": (0.5, 1.4), "fusion": "cat"}, (1, 8, 1, 1)),
    ({"scales": FINAL, "align_corners": True, "conv_num": 1}, (1, 8, 4, 3)),
    ({"scales": (0.5, 1), "squeeze_relu": False}, (2, 8, 4, 3)),
    ({"scales": (0.5, 2), "restore_relu": True, "zero_init": False}, (2, 8, 4, 3)),
]


@pytest.mark.parametrize(("options", "shape"), CASES)
def test_it_is_the_papers_equation(options: dict, shape: tuple[int, ...]) -> None:
    """Values, and gradients of the input and of all parameters, in float64."""
    module = moved(MSFM(shape[1], **({"ratio": 2, "groups": 2} | options))).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    seed = torch.randn(shape, dtype=torch.float64)
    expected = literal(module, x, **options)
    sources = [x, *module.parameters()]
    slopes = torch.autograd.grad(expected, sources, seed)
    for form in (x, x.to(memory_format=torch.channels_last)):
        actual = module(form)
        assert torch.allclose(actual, expected, rtol=1e-10, atol=1e-10)
        for a, b in zip(torch.autograd.grad(actual, sources, seed), slopes):
            assert torch.allclose(a, b, rtol=1e-6, atol=1e-8)


def test_sizes_of_branches() -> None:
    """floor(size * scale), exactly (90 * 0.7 is 62.99... in floating point), and never nothing."""
    actual = {s: [scale_size((side, side), s)[0] for side in (1, 2, 3, 25, 90)] for s in MSFM(64).scales}
    assert [actual[s] for s in sorted(actual)] == [
        [1, 1, 1, 12, 45],
        [1, 1, 2, 17, 63],
        [1, 2, 3, 25, 90],
        [1, 2, 4, 35, 126],
        [2, 4, 6, 50, 180],
    ]


def test_groups_of_one_single_value_become_the_shift() -> None:
    """A 1x1 map of one image, where every channel is its own group: what a backbone gives for a tiny image."""
    module = moved(MSFM(64, ratio=2, groups=32))
    actual = module(x := torch.randn(1, 64, 1, 1))
    assert actual.isfinite().all()
    assert torch.allclose(module.squeeze(x).flatten(), module.squeeze[1].bias.clamp(min=0), atol=1e-3)


# -- the start


@pytest.mark.parametrize("fusion", ["add", "cat"])
def test_it_starts_as_the_identity(fusion: Any) -> None:
    """The first step moves U's norm alone, the second one everything."""
    module = MSFM(32, ratio=2, groups=4, fusion=fusion)
    x = torch.randn(2, 32, 6, 9)
    assert torch.equal(module(x), x)
    (module(x) * torch.randn(2, 32, 6, 9)).sum().backward()
    moving = {name for name, p in module.named_parameters() if p.grad.any()}
    assert moving == {"unsqueeze.norm.weight", "unsqueeze.norm.bias"}
    torch.optim.SGD(module.parameters(), 0.1).step()
    module.zero_grad()
    (module(x) * torch.randn(2, 32, 6, 9)).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in module.parameters())


def test_the_form_with_a_relu_is_the_other_one_cut_off_at_zero() -> None:
    """x + relu(U) is done as it is written, x + U as one product: the same U."""
    plain = moved(MSFM(32, ratio=2, groups=4, zero_init=False)).double()
    cut = MSFM(32, ratio=2, groups=4, zero_init=False, restore_relu=True).double()
    cut.load_state_dict(plain.state_dict())
    x = torch.randn(2, 32, 6, 9, dtype=torch.float64)
    assert torch.allclose(cut(x) - x, (plain(x) - x).relu(), atol=1e-12)
    assert cut(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_choices_have_the_same_parameters() -> None:
    other = MSFM(64, zero_init=False, squeeze_relu=False, restore_relu=True, align_corners=True)
    assert size(other) == size(MSFM(64))


def test_without_zero_init_it_is_not() -> None:
    module, x = MSFM(32, ratio=2, groups=4, zero_init=False), torch.randn(1, 32, 6, 9)
    change = (module(x) - x).detach()
    assert torch.allclose(
        change.reshape(4, -1).std(dim=1, correction=0), torch.ones(4), atol=1e-3
    )  # U ends with its norm


@pytest.mark.parametrize("restore_relu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype: torch.dtype, restore_relu: bool) -> None:
    """Autocast and bfloat16 weights give the type of the input, near the exact result; statistics are never taken in
    bfloat16."""
    module = moved(MSFM(64, ratio=4, groups=4, zero_init=not restore_relu, restore_relu=restore_relu))
    x = (torch.randn(2, 64, 9, 13) + 3).to(memory_format=torch.channels_last)
    exact = module(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        actual = module(x.to(dtype))
    half = copy.deepcopy(module).to(torch.bfloat16)(x.bfloat16())
    assert actual.dtype == dtype
    assert half.dtype == torch.bfloat16
    for near in (actual, half):
        assert near.is_contiguous(memory_format=torch.channels_last)
        assert float((near.detach() - exact).abs().mean()) < 0.03 * float(exact.std())


def test_inputs_are_unchanged() -> None:
    x = torch.randn(1, 64, 5, 5)
    kept = x.clone()
    moved(MSFM(64))(x)
    assert torch.equal(x, kept)


# -- parameters


def parameters(c: int, m: int, branches: int, convs: int, cat: bool) -> int:
    """The specification's formula; convs: 3x3 convolutions in all."""
    return c * m + c * m * (branches if cat else 1) + 9 * m * m * convs + 3 * c + 3 * m + 3 * m * convs


SCALES = [(0.5, 0.7, 1), (0.5, 0.6, 0.7, 0.85, 1), (1, 1.4, 2), (0.5, 0.7, 1.4, 2), FINAL]
CONVOLUTIONS = [(1, False), (2, False), (2, True)]


@pytest.mark.parametrize(
    ("scales", "conv_num", "large_only", "fusion"),
    [
        # in the normal suite all scales once, with each number of convolutions and each fusion
        pytest.param(scales, *convolutions, fusion, marks=() if (i % 3, i % 2) == (n, k) else pytest.mark.slow)
        for (i, scales), (n, convolutions) in product(enumerate(SCALES), enumerate(CONVOLUTIONS))
        for k, fusion in enumerate(("add", "cat"))
    ],
)
def test_parameters_of_every_row(scales: tuple[float, ...], conv_num: int, large_only: bool, fusion: Any) -> None:
    """Table 2's scales, ratios, numbers of convolutions and fusions at all three positions of ResNet-50's widths."""
    convs = sum(conv_num if s > 1 or not large_only else 1 for s in scales)
    for ratios in ((4, 8, 16), (8, 16, 32), (16, 32, 64)):
        plugin = MSFMPlugin(
            ratios=ratios, groups=8, scales=scales, conv_num=conv_num, conv_num_large_only=large_only, fusion=fusion
        )
        for stage, position in product((2, 3, 4), ("after_conv1", "after_conv3")):
            c = 2**stage * (128 if position == "after_conv3" else 32)
            m = c // ratios[stage - 2]
            assert size(plugin.make(c, stage, position)) == parameters(c, m, len(scales), convs, fusion == "cat")


@pytest.mark.parametrize(
    ("name", "count", "blocks"),
    [("resnet50", 2_318_728, 13), pytest.param("resnet101", 5_254_832, 30, marks=pytest.mark.slow)],
)
def test_default_counts(name: str, count: int, blocks: int) -> None:
    with torch.device("meta"):
        backbone = TimmBackbone(name, pretrained=False, frozen_stages=1)
        before = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
        assert insert_plugin(backbone, MSFMPlugin()) == 2 * blocks
    assert sum(p.numel() for p in backbone.parameters() if p.requires_grad) - before == count


def test_multiply_adds() -> None:
    """The convolutions' own, and what the one-product form of U adds: a column of ones, and the covariance of y's
    channels."""

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.msfm = MSFM(64, scales=(0.5, 1), ratio=8, groups=4, conv_num=2)

        def forward(self, images: Tensor) -> Any:
            return self.msfm(images.float()[:, :1].expand(-1, 64, -1, -1))

        def detect(self, images: Tensor, sizes: Tensor) -> Any:
            return self(images)

    c, m, cells = 64, 8, 10 * 12
    convolutions = c * m * cells + 2 * 9 * m * m * (cells + 5 * 6) + c * m * cells
    assert count_cost(Alone(), 10, 12)["multiply_adds"] == convolutions + c * cells + m * m * cells + c * m + c * m * m


# -- insertion


def blocks_of(backbone: TimmBackbone) -> Iterator[nn.Module]:
    for part in backbone.stages("stages", (2, 3, 4)).values():
        for stage in part:
            yield from (m for m in stage.modules() if hasattr(m, "drop_path") and getattr(m, "has_skip", True))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SIMILAR_BACKBONES else n for n in BACKBONES]
)
def test_backbones_keep_their_keys_and_their_maps(name: str) -> None:
    backbone = lively(name).eval()
    before = {key: tensor.clone() for key, tensor in backbone.state_dict().items()}
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = backbone(x)
        count = insert_plugin(backbone, MSFMPlugin())
        after = backbone.state_dict()
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
        for a, b in zip(maps, backbone(x)):
            assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))
        assert backbone(torch.randn(1, 3, 33, 47))[-1].isfinite().all()
    blocks = list(blocks_of(backbone))
    assert count == len(modules(backbone)) == len(blocks) * (2 if hasattr(blocks[0], "conv3") else 1)
    assert {m.squeeze[0].out_channels % m.squeeze[1].num_groups for m in modules(backbone)} == {0}


@pytest.mark.parametrize(
    "name", ["resnetblur18", *(pytest.param(n, marks=pytest.mark.slow) for n in ("resnetaa50", "resnet26t"))]
)
def test_positions_of_the_paper(name: str) -> None:
    """after_conv1 / 2 take what norm and ReLU give and feed the next convolution, the last one comes before the
    residual sum."""
    backbone = lively(name).eval()
    last = hasattr(backbone.body.layer2[0], "conv3")
    positions = ALL[: 3 if last else 2]
    insert_plugin(backbone, MSFMPlugin(positions, ratios=(8, 8, 8), groups=4, zero_init=False))
    block = backbone.body.layer2[0]
    recorded: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(m, inputs, output):
        recorded[m] = (inputs[0].clone(), output.clone())

    for m in block.modules():
        m.register_forward_hook(keep)
    with torch.no_grad():
        backbone(torch.randn(1, 3, 64, 96))
    first, *middle, final = modules(block)
    assert len(middle) == last
    assert torch.equal(recorded[first][1], recorded[block.conv2][0])
    assert (recorded[first][0] >= 0).all()
    for m in middle:
        assert torch.equal(recorded[m][1], recorded[block.conv3][0])
        assert (recorded[m][0] >= 0).all()
    assert torch.equal(recorded[final][0], recorded[block.bn3 if last else block.bn2][1])
    assert torch.allclose((recorded[final][1] + recorded[block.downsample][1]).relu(), recorded[block][1])


def test_numbers_of_stages_are_strides() -> None:
    """Stage 3 of a MobileNet has both groups of blocks of stride 16."""
    backbone = TimmBackbone("mobilenetv3_large_100", pretrained=False)
    insert_plugin(backbone, MSFMPlugin(stages=(3,), ratios=(32,)))
    actual = {name.split(".")[2] for name, m in backbone.named_modules() if isinstance(m, MSFM)}
    assert actual == {"3", "4"}
    assert {(m.squeeze[0].in_channels, m.squeeze[0].out_channels) for m in modules(backbone)} == {(80, 4), (112, 4)}


@pytest.mark.parametrize(
    ("channels", "ratio", "groups", "m"),
    [(40, 16, 4, 4), (112, 32, 4, 4), (80, 8, 4, 8), (112, 8, 4, 16), (96, 10, 8, 8), (96, 6, 8, 16)],
)
def test_widths_beyond_the_paper(channels: int, ratio: int, groups: int, m: int) -> None:
    """after_branch: the nearest multiple of groups to C / ratio, at least groups."""
    plugin = MSFMPlugin(stages=(2,), ratios=(ratio,), groups=groups)
    assert plugin.make(channels, 2, "after_branch").squeeze[0].out_channels == m


@cache
def shapes_of(name: str) -> TimmBackbone:
    """A backbone without values, which a refusal leaves as it is."""
    with torch.device("meta"):
        return TimmBackbone(name, pretrained=False)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet10t",
            {"positions": ["after_conv3"]},
            r"\(BasicBlock\) have no after_conv3, they have after_conv1, after_conv2",
        ),
        (
            "resnet26t",
            {"positions": ["after_branch"]},
            "have no after_branch, they have after_conv1, after_conv2, after_conv3",
        ),
        (
            "convnext_atto",
            {"positions": ["after_conv2"]},
            r"\(ConvNeXtBlock\) have no after_conv2, they have after_branch",
        ),
        (
            "resnet10t",
            {"positions": ["after_conv"]},
            "unknown position 'after_conv' of positions: did you mean 'after_conv",
        ),
        ("resnet10t", {"positions": []}, "nothing would be inserted"),
        ("resnet10t", {"positions": ["after_conv2", "after_conv2"]}, "names a position twice"),
        ("resnet10t", {"stages": [], "ratios": []}, "nothing would be inserted"),
        (
            "resnet10t",
            {"stages": [2, 5], "ratios": [16, 16]},
            r"model.plugin.stages=\[2, 5\] must be different ones of .* \[1, 2, 3, 4\]",
        ),
        ("resnet10t", {"stages": [3, 4]}, r"ratios=\[16, 32, 64\] must hold one ratio for each of stages=\[3, 4\]"),
        (
            "resnet10t",
            {"ratios": [10, 32, 64]},
            "ratio=10 must make 128 channels a whole number, divisible by groups=4: 8 would",
        ),
        ("resnet10t", {"ratios": [64, 64, 64]}, "ratio=64 must make 128 channels .* groups=4: 32 would"),
        ("resnet10t", {"groups": {"after_conv2": 3}}, "groups=3"),
        ("resnet10t", {"groups": {"after_conv4": 4}}, "unknown position 'after_conv4' of groups"),
        ("resnet10t", {"groups": {"after_conv2": "x"}}, "model.plugin.groups.after_conv2 must be int, got 'x'"),
        ("resnet10t", {"groups": "many"}, r"model.plugin.groups must be int \| Mapping\[str, int\], got 'many'"),
        ("resnet10t", {"scales": [0.5, 0]}, "must be one or more numbers above 0"),
        ("resnet10t", {"scales": []}, "must be one or more numbers above 0"),
        ("resnet10t", {"conv_num": 0}, "conv_num=0 must be at least 1"),
        ("resnet10t", {"fusion": "sum"}, "fusion"),
        ("resnet10t", {"postions": []}, "did you mean 'positions'"),
        ("resnet10t", {"restore_relu": True}, "restore_relu=true needs zero_init=false"),
        (
            "lcnet_050",
            {},
            r"stage 2 of 'lcnet_050' has DepthwiseSeparableConv \(_efficientnet_blocks\) without a residual sum; plug",
        ),
        (
            "skresnet18",
            {},
            r"stage 2 of 'skresnet18' has SelectiveKernelBasic \(sknet\); plug-ins go into BasicBlock, Bottleneck "
            r"\(res",
        ),
        pytest.param("res2net50_26w_4s", {}, r"has Bottle2neck \(res2net\); plug-ins go into", marks=pytest.mark.slow),
        pytest.param(
            "resnetv2_50",
            {"stages": [3], "ratios": [16]},
            r"stage 3 of 'resnetv2_50' has PreActBottleneck \(resnetv2\); plug-ins go into",
            marks=pytest.mark.slow,
        ),
        pytest.param("regnety_002", {}, r"has Bottleneck \(regnet\); plug-ins go into", marks=pytest.mark.slow),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict, message: str) -> None:
    backbone = shapes_of(name)
    keys = set(backbone.state_dict())
    with pytest.raises(InputError, match=message):
        insert_plugin(backbone, build("model.plugin", {"type": "msfm"} | options, PLUGINS, {}))
    assert set(backbone.state_dict()) == keys


def test_options_from_a_config() -> None:
    choices = {"squeeze_relu": False, "restore_relu": True, "align_corners": True, "zero_init": False}
    spec = {
        "type": "msfm",
        "positions": ["after_conv1", "after_conv2"],
        "groups": {"after_conv1": 2},
        "scales": [0.5, 1],
        "fusion": "cat",
    }
    plugin = build("model.plugin", spec | choices, PLUGINS, {})
    assert plugin == MSFMPlugin(
        ("after_conv1", "after_conv2"), groups={"after_conv1": 2}, scales=(0.5, 1.0), fusion="cat", **choices
    )
    backbone = TimmBackbone("resnet10t", pretrained=False)
    insert_plugin(backbone, plugin)
    assert [m.squeeze[1].num_groups for m in modules(backbone)] == [2, 4] * 3
    assert {(m.align_corners, m.unsqueeze.relu, isinstance(m.squeeze[2], nn.ReLU)) for m in modules(backbone)} == {
        (True, True, False)
    }
    assert build("model.plugin", "msfm", PLUGINS, {}) == MSFMPlugin()


# -- backbones with plug-ins


class Normed:
    """Another plug-in: BatchNorm."""

    positions, stages = None, (1, 2)

    def make(self, channels: int, stage: int, position: str) -> nn.Module:
        return nn.BatchNorm2d(channels)


@pytest.mark.parametrize("options", [{"frozen_stages": 2}, {"norm_eval": True}])
def test_plugins_are_trained_in_frozen_stages(options: dict) -> None:
    backbone = lively("resnet10t", **options)
    assert insert_plugin(backbone, Normed()) == 2
    backbone.train()
    for stage in (backbone.body.layer1, backbone.body.layer2):
        (norm,) = (m for m in stage.modules() if isinstance(m, nn.BatchNorm2d) and m.training)
        assert all(p.requires_grad for p in norm.parameters())
    sum(m.square().mean() for m in backbone(torch.randn(2, 3, 64, 64))).backward()
    assert norm.weight.grad.any()
    frozen = [p for p in backbone.parameters() if not p.requires_grad]
    assert bool(frozen) == ("frozen_stages" in options)
    assert all(p.grad is None for p in frozen)
    assert not any(m.training for m in backbone.eval().modules())


def test_two_plugins_at_one_position() -> None:
    backbone = TimmBackbone("resnet10t", pretrained=False).eval()
    insert_plugin(backbone, Normed())
    insert_plugin(backbone, MSFMPlugin())
    assert len(modules(backbone)) == 3
    assert backbone(torch.randn(1, 3, 64, 64))[-1].isfinite().all()


STAGE4 = MSFMPlugin(ALL, stages=(4,), ratios=(64,), zero_init=False)


@pytest.fixture(scope="module")
def furnished() -> TimmBackbone:
    """A small bottleneck backbone with randomized modules at all positions of stage 4."""
    torch.manual_seed(0)
    backbone = lively("resnet14t")
    insert_plugin(backbone, STAGE4)
    backbone.train()
    for _ in range(2):
        backbone(torch.randn(2, 3, 64, 64))  # updates the norms' statistics
    return backbone.eval().to(memory_format=torch.channels_last)


def test_every_parameter_is_trained(furnished: TimmBackbone) -> None:
    """Where every channel is its own group (after_conv3), the biases before the norms of S and F have no gradient."""
    backbone = copy.deepcopy(furnished).train()
    sum((m * torch.randn_like(m)).sum() for m in backbone(torch.randn(2, 3, 128, 128))).backward()
    inside = {
        name
        for name, m in backbone.named_modules()
        if isinstance(m, MSFM) and m.squeeze[1].num_groups == m.squeeze[0].out_channels
    }
    for name, p in backbone.named_parameters():
        idle = name.endswith(".0.bias") and any(name.startswith(f"{i}.") for i in inside)
        assert p.grad.isfinite().all()
        assert p.grad.any() or idle, name


def test_copies_round_trips_and_folding(furnished: TimmBackbone) -> None:
    # float64: float32's rounding grows in stage 4 by the processor, to 3e-4 of the largest value
    furnished, x = copy.deepcopy(furnished).double(), torch.randn(1, 3, 64, 96, dtype=torch.float64)
    other = TimmBackbone("resnet14t", pretrained=False).double()
    insert_plugin(other, STAGE4)
    other.load_state_dict(furnished.state_dict())
    with torch.no_grad():
        maps = furnished(x)
        folded = fold_batch_norm(furnished, x)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
        for twin, tolerance in ((copy.deepcopy(furnished), 0.0), (other.eval(), 1e-9), (folded, 1e-9)):
            for a, b in zip(maps, twin(x)):
                assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * float(a.abs().max()))


@pytest.mark.slow
def test_export_and_compile(furnished: TimmBackbone) -> None:
    block, other = furnished.body.layer4[0], torch.randn(1, 1024, 4, 6)
    exported = torch.export.export(block, (torch.randn(1, 1024, 4, 6),), strict=False).module()
    module, x = moved(MSFM(32, scales=(0.5, 1), ratio=2, conv_num=1)), torch.randn(1, 32, 5, 7)
    with torch.no_grad():
        assert torch.allclose(block(other), exported(other), atol=1e-4)
        assert torch.allclose(module(x), torch.compile(module, backend="eager", fullgraph=True)(x), atol=1e-5)


@pytest.mark.slow
def test_exported_sizes_can_be_free() -> None:
    side = torch.export.Dim("side", min=8, max=64)
    module = moved(MSFM(32, ratio=2)).eval()
    exported = torch.export.export(
        module, (torch.randn(1, 32, 11, 12),), dynamic_shapes=({2: side},), strict=False
    ).module()
    for height in (8, 13, 40):
        x = torch.randn(1, 32, height, 12)
        assert torch.allclose(exported(x), module(x), atol=1e-5)
