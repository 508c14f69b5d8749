"""Wrong options are refused in one sentence, in Python as in a config, and every part takes its own options only."""

import math
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from fusedet.errors import InputError, require_choice
from fusedet.models.backbones import TimmBackbone
from fusedet.models.detectors import NeckChain, OneStage, create_model
from fusedet.models.heads import HEADS, FCOSHead, RepPointsHead, RetinaHead, RPNHead, VFNetHead
from fusedet.models.modules import MSFM, MSIL
from fusedet.models.necks import BFP, FPN, MSEFPN, PAFPN, SMSL, AugFPN, BiFPN
from fusedet.models.necks.fpn import Top, TopLevels
from fusedet.models.roi import BoxStage
from fusedet.types import Levels

BACKBONE = Levels((64, 96, 128, 160), (4, 8, 16, 32))
PYRAMID = Levels((32,) * 5, (8, 16, 32, 64, 128))


def make(*overrides: str) -> OneStage:
    small = ["model.backbone.name=test_resnet", "model.backbone.pretrained=false", "model.pyramid.channels=32"]
    return create_model("retinanet_r18", *small, *overrides, num_classes=3)


# -- names


@pytest.mark.parametrize(
    ("part", "option", "value", "meant"),
    [
        (lambda **o: MSEFPN(BACKBONE, **o), "gate", "gcgs", "gcg"),
        (lambda **o: MSEFPN(BACKBONE, **o), "gate_place", "top_down", "topdown"),
        (lambda **o: MSEFPN(BACKBONE, **o), "sem", "channels", "channel"),
        (lambda **o: MSEFPN(BACKBONE, **o), "sim", "conv1", "conv1x1"),
        (lambda **o: MSEFPN(BACKBONE, **o), "norm", "gn", "gn1"),
        (lambda **o: SMSL(PYRAMID, **o), "mode", "on_necks", "on_neck"),
        (lambda **o: PAFPN(BACKBONE, **o), "form", "mmdets", "mmdet"),
        (lambda **o: BFP(PYRAMID, **o), "refine", "nonlocal", "non_local"),
        (lambda **o: BiFPN(BACKBONE, **o), "norm", "gnn", "gn"),
        (lambda **o: TopLevels(8, 8, 2, **o), "top", "maxpool", "max_pool"),
        (lambda **o: MSFM(64, **o), "fusion", "concat", "cat"),
        (lambda **o: MSIL(32, **o), "gate", "hardsigmoid", "hard_sigmoid"),
        (lambda **o: MSIL(32, **o), "norm", "gnn", "gn"),
        (lambda **o: MSIL(32, **o), "activation", "rely", "relu"),
        (lambda **o: FCOSHead(PYRAMID, 3, **o), "box_loss", "gious", "giou"),
        (lambda **o: VFNetHead(PYRAMID, 3, **o), "box_norm", "strid", "stride"),
        (lambda **o: RepPointsHead(PYRAMID, 3, **o), "transform_method", "momentum", "moment"),
        (lambda **o: RPNHead(PYRAMID, **o), "loss", "smooth", "smooth_l1"),
        (lambda **o: BoxStage(PYRAMID, 3, **o), "loss", "smooth", "smooth_l1"),
        (lambda **o: BoxStage(PYRAMID, 3, **o), "sampling", "balance", "balanced"),
        (lambda **o: TimmBackbone("resnet26", False, **o), "style", "cafe", "caffe"),
        *[
            (lambda neck=neck, **o: neck(BACKBONE, **o), "top", "on_inputs", "on_input")
            for neck in (FPN, PAFPN, BiFPN, AugFPN, MSEFPN, lambda levels, **o: SMSL(levels, "standalone", **o))
        ],
    ],
)
def test_mistyped_names_are_refused(part: Callable[..., Any], option: str, value: str, meant: str) -> None:
    with pytest.raises(InputError) as error:
        part(**{option: value})
    assert str(error.value).startswith(f"unknown {option} '{value}': did you mean '{meant}'? Known: ")
    part(**{option: meant})


def test_values_of_a_literal() -> None:
    require_choice("top", "on_input", Top)
    with pytest.raises(InputError, match=r"unknown top 'None'\. Known: max_pool, "):
        require_choice("top", None, Top)


# -- chains


@pytest.mark.parametrize("neck", ["fpn", "pafpn", "bifpn", "aug_fpn", "mse_fpn", "{type: smsl, mode: standalone}"])
def test_necks_on_a_backbone_are_first_in_a_chain(neck: str) -> None:
    make(f"model.neck={neck}")
    make(f"model.neck=[{neck},bfp,smsl]")
    with pytest.raises(InputError) as error:
        make(f"model.neck=[fpn,{neck}]")
    assert "model.neck.1 " in str(error.value)
    assert "it takes a backbone's maps, got levels up to stride 128: put it first in the chain" in str(error.value)


def test_auxiliary_losses_are_not_dropped() -> None:
    """A short pyramid looks like a backbone's maps to a second neck."""
    short = "model.pyramid.coarsest=5"
    with pytest.raises(InputError, match="auxiliary losses must be the first in the chain"):
        make("model.neck=[fpn,aug_fpn]", short)
    assert isinstance(make("model.neck=[fpn,{type: aug_fpn, auxiliary_weight: 0}]", short).neck, NeckChain)
    assert "auxiliary_loss_cls" in make("model.neck=[aug_fpn,bfp]", "model.neck.1.refine_level=1", short).loss_weights


# -- numbers


@pytest.mark.parametrize("channels", [0, -32])
def test_widths_below_one(channels: int) -> None:
    said = f"channels={channels} must be at least 1"
    for neck in (FPN, PAFPN, BiFPN, AugFPN, MSEFPN, lambda levels, channels: SMSL(levels, "standalone", channels)):
        with pytest.raises(InputError, match=said):
            neck(BACKBONE, channels=channels)
    for head in HEADS.values():
        for convs in (1, 2):
            with pytest.raises(InputError, match=f"channels={channels}.* must be at least 1"):
                head(PYRAMID, num_classes=3, convs=convs, channels=channels)
    with pytest.raises(InputError, match=f"point_channels={channels} must be at least 1"):
        RepPointsHead(PYRAMID, 3, point_channels=channels)
    with pytest.raises(InputError, match=said):
        MSIL(channels)
    with pytest.raises(InputError, match=said):
        make(f"model.head.channels={channels}")


FOCAL = [
    ({"prior": 0.0}, r"prior=0\.0 must be above 0 and below 1"),
    ({"prior": 1.0}, r"prior=1\.0 must be"),
    ({"prior": math.nan}, "prior=nan must be"),
    ({"gamma": -1.0}, r"gamma=-1\.0 must be 0 or more"),
    ({"gamma": math.inf}, "gamma=inf must be"),
    ({"alpha": -0.1}, r"alpha=-0\.1 must be 0 to 1"),
    ({"alpha": 1.5}, r"alpha=1\.5 must be 0 to 1"),
]
OVERLAPS = [
    ({"positive": 0.2}, r"negative=0\.\d, positive=0\.2 must be IoU thresholds"),
    ({"negative": -0.1}, r"negative=-0\.1, .* must be IoU thresholds"),
    ({"positive": 1.5}, r"positive=1\.5 must be IoU thresholds"),
]
RATIOS = [({"ratios": r}, "must be one or more numbers above 0") for r in ((), (0.0, 1.0), (-1.0,), (math.inf,))]


def scales(key: str) -> list[tuple[dict[str, float], str]]:
    return [({key: value}, f"{key}={value} must be above 0, in strides") for value in (0.0, -4.0, math.inf)]


@pytest.mark.parametrize(
    ("head", "mistakes"),
    [
        (
            RetinaHead,
            [*FOCAL, *OVERLAPS, *RATIOS, *scales("base_scale"), ({"scales_per_octave": 0}, "scales_per_octave=0")],
        ),
        (
            FCOSHead,
            [
                *FOCAL,
                *scales("radius"),
                ({"ranges": (64.0, 128.0)}, r"ranges=\[64.0, 128.0\] must be 4 increasing numbers"),
                ({"ranges": (64.0, 32.0, 128.0, 256.0)}, "increasing"),
                ({"ranges": (0.0, 32.0, 128.0, 256.0)}, "above 0"),
                ({"convs": -1}, "convs=-1"),
                ({"convs": 0, "deformable_last": True}, "deformable_last=true"),
                ({"channels": 20}, "multiples of 32"),
            ],
        ),
        (
            VFNetHead,
            [
                *FOCAL,
                ({"convs": 0, "deformable_last": True}, "deformable_last=true needs convs"),
                ({"gradient_mul": 1.5}, r"gradient_mul=1\.5 must be 0 to 1"),
                ({"topk": 0}, "topk=0 must be 1 or more"),
                ({"channels": 24}, "multiples of 32"),
            ],
        ),
        (
            RepPointsHead,
            [
                *FOCAL,
                *OVERLAPS,
                *scales("base_scale"),
                ({"num_points": 8}, "num_points=8 must be the square of 3, 5, 7"),
                ({"num_points": 16}, "num_points=16"),
                ({"num_points": 1}, "num_points=1 "),
                ({"num_points": -9}, "num_points=-9"),
                ({"gradient_mul": 1.5}, r"gradient_mul=1\.5 must be 0 to 1"),
                ({"moment_mul": -1.0}, r"moment_mul=-1\.0 must be 0 to 1"),
                ({"beta": -0.1}, r"beta=-0\.1 must be 0 or more"),
                ({"convs": -1}, "convs=-1"),
                ({"channels": 24, "norm": True}, "multiples of 32"),
            ],
        ),
        (RPNHead, [*OVERLAPS, *RATIOS, *scales("scale")]),
    ],
)
def test_values_out_of_their_ranges(head: Callable[..., Any], mistakes: list[tuple[dict, str]]) -> None:
    for options, said in mistakes:
        with pytest.raises(InputError, match=said):
            head(PYRAMID, num_classes=3, **options)


def test_numbers_at_the_ends_of_their_ranges() -> None:
    head = RetinaHead(PYRAMID, 3, alpha=1, gamma=0, positive=0.5, negative=0.5)
    assert (head.alpha, head.gamma) == (1, 0)


@pytest.mark.parametrize("scale", [math.inf, math.nan, -1.0, 0.0])
def test_scales_of_msfm(scale: float) -> None:
    with pytest.raises(InputError, match=r"scales=.* must be one or more numbers above 0"):
        MSFM(64, scales=(0.5, scale))


def test_modulated_needs_deformable_stages() -> None:
    with pytest.raises(InputError, match=r"modulated=true .* set deformable_stages"):
        make("model.backbone.modulated=true")
    make("model.backbone.modulated=true", "model.backbone.deformable_stages=[4]")


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "resnet14t", "regnetx_002"])
@pytest.mark.parametrize("zero_init", [True, False])
def test_zero_init_of_residual_blocks(name: str, zero_init: bool) -> None:
    backbone = TimmBackbone(name, pretrained=False, zero_init=zero_init)
    zero = [n for n, m in backbone.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()]
    assert bool(zero) is zero_init


def test_backbones_without_that_option_are_refused() -> None:
    with pytest.raises(InputError, match=r"model.backbone.zero_init=false: timm's 'convnext_tiny' has no such option"):
        TimmBackbone("convnext_tiny", pretrained=False, zero_init=False)


@pytest.mark.parametrize("options", [{"sim": "conv1x1"}, {"sim": "none", "sem": "none"}])
def test_pre_conv_needs_sim(options: dict) -> None:
    MSEFPN(BACKBONE, **options)
    with pytest.raises(InputError, match=f"pre_conv=true .* sim={options['sim']} has none"):
        MSEFPN(BACKBONE, pre_conv=True, **options)


# -- messages


@pytest.mark.parametrize(
    ("interact", "begins"),
    [
        ("{type: msil, encoder_kernel: 2}", "model.interact 'msil': encoder_kernel=2 "),
        ("{type: msil, align: 2}", "model.interact.align must be bool"),
        ("{type: msil, aling: true}", "unknown option 'aling' of model.interact 'msil'"),
        ("{type: msil, norm: gns}", "unknown value 'gns' of model.interact.norm"),
        ("msli", "unknown model.interact 'msli'"),
    ],
)
def test_only_the_innermost_slot_is_named(interact: str, begins: str) -> None:
    with pytest.raises(InputError) as error:
        make(f"model.interact={interact}")
    assert str(error.value).startswith(begins)


# -- options that a head passes on


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("convz: 1", "unknown option 'convz' of model.head 'atss': did you mean 'convs'?"),
        ("convs: two", "model.head.convs"),
        ("alphas: 0.3", "did you mean 'alpha'?"),
        ("options: {}", "unknown option 'options' of model.head 'atss'"),
        ("channels: 48", "model.head 'atss': norm=true needs channels in multiples of 32"),
    ],
)
def test_options_passed_on_are_checked_like_own_ones(option: str, message: str) -> None:
    with pytest.raises(InputError) as error:
        make(f"model.head={{type: atss, {option}}}")
    assert message in str(error.value)


def test_options_passed_on_arrive() -> None:
    head: Any = make("model.head={type: dw, convs: 1, channels: 64, bias: false}").head
    assert [type(layer).__name__ for layer in head.towers.cls] == ["Conv2d", "GroupNorm", "ReLU"]
    assert (head.reg.in_channels, head.towers.cls[0].bias) == (64, None)
