"""The contracts of every backbone, neck, head and shipped config."""

import math
from dataclasses import replace
from inspect import signature
from itertools import product

import pytest
import timm
import torch
from torch import nn

from fakes import Call, batch, check_export, detect, maps, objects
from fusedet import config
from fusedet.errors import InputError
from fusedet.models.backbones import TimmBackbone
from fusedet.models.detectors import NeckChain, OneStage, TwoStage, create_model, prepare_for_inference
from fusedet.models.heads import HEADS
from fusedet.models.necks import FPN, NECKS
from fusedet.types import Batch, Levels
from pairs import pairwise
from small import make

BACKBONES = [
    "resnet18",
    "resnext50_32x4d",
    "convnext_tiny",
    "mobilenetv3_large_100",
    "resnet10t",
    "regnetx_002",
]
SIZES = [(64, 96), (33, 47), (75, 129)]
LEVELS = Levels((8, 16, 24, 32), (4, 8, 16, 32))
PYRAMIDS = [(3, 7, "on_input"), (3, 7, "on_output"), (2, 6, "max_pool"), (3, 5, "on_input"), (2, 5, "max_pool")]

EMPTY = objects([])
SOME = objects([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2])


def small(*overrides: str, **head: object) -> OneStage:
    options = [
        "model.backbone.name=test_resnet",
        "model.pyramid.channels=16",
        "model.head.convs=1",
        "model.head.norm=false",
    ]
    return create_model("retinanet_tiny", *options, *overrides, num_classes=3, model={"head": head})


# -- backbones


@pytest.mark.parametrize("name", BACKBONES)
def test_backbones_give_maps_of_their_levels(name: str) -> None:
    with torch.device("meta"):  # shapes only
        backbone = TimmBackbone(name, pretrained=False).eval()
        assert backbone.levels.strides == (4, 8, 16, 32)
        for size in SIZES[:2]:
            features = backbone(torch.randn(1, 3, *size))
            assert [f.shape[1] for f in features] == list(backbone.levels.channels)
            for f, stride in zip(features, backbone.levels.strides):
                # convnext's stem drops the rest of a division, others round up
                assert all(a // stride <= b <= math.ceil(a / stride) for a, b in zip(size, f.shape[2:]))


@pytest.mark.parametrize(("stages", "frozen"), [(-1, 0), (0, 9_536), (1, 225_344), (2, 1_444_928), (4, 23_508_032)])
def test_frozen_stages_of_resnet50(stages: int, frozen: int) -> None:
    """The stem has 9,536 parameters, with layer1 225,344 (the papers' counting rule), with all four stages
    everything."""
    with torch.device("meta"):
        backbone = TimmBackbone("resnet50", pretrained=False, frozen_stages=stages)
    assert sum(p.numel() for p in backbone.parameters() if not p.requires_grad) == frozen
    eval_norms = [m for m in backbone.train().modules() if isinstance(m, nn.BatchNorm2d) and not m.training]
    assert len(eval_norms) == {-1: 0, 0: 1, 1: 11, 2: 24, 4: 53}[stages]


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_parts_are_the_first_ones(name: str) -> None:
    """With k stages frozen, the gradient reaches the first map beyond them and no frozen weight."""
    with torch.device("meta"):
        backbone = TimmBackbone(name, pretrained=False, frozen_stages=1).train()
        features = backbone(torch.randn(2, 3, 64, 64))
    assert not features[0].requires_grad
    assert features[1].requires_grad
    assert 0 < sum(p.requires_grad for p in backbone.parameters()) < len(list(backbone.parameters()))


def test_norm_eval_freezes_statistics_and_trains_scale_and_shift() -> None:
    backbone = TimmBackbone("test_resnet", pretrained=False, norm_eval=True).train()
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)
    assert all(m.weight.requires_grad for m in norms)
    before = norms[0].running_mean.clone()
    backbone(torch.randn(2, 3, 64, 64))
    assert torch.equal(norms[0].running_mean, before)


def test_normalization_is_the_pretrained_one() -> None:
    model = small("model.backbone.name=resnet10t")
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.allclose(model.normalize(image), (image / 255 - mean) / std, atol=1e-5)


def test_padding_is_zero_after_normalization() -> None:
    x = small().normalize(torch.full((2, 3, 32, 64), 255, dtype=torch.uint8), torch.tensor([[32, 64], [20, 40]]))
    assert x[0].all()
    assert x[1, :, :20, :40].all()
    assert not x[1, :, 20:].any()
    assert not x[1, :, :, 40:].any()
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert small().backbone.body.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_local_weights_are_loaded_and_checked(tmp_path) -> None:
    import timm

    source = timm.create_model("test_resnet", pretrained=False)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    backbone = TimmBackbone("test_resnet", weights=str(tmp_path / "w.pth"))
    assert torch.equal(backbone.body.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    torch.save(timm.create_model("lcnet_050", pretrained=False).state_dict(), tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth"):
        TimmBackbone("test_resnet", weights=str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match="no such file"):
        TimmBackbone("test_resnet", weights=str(tmp_path / "absent.pth"))


def test_real_imagenet_weights_of_a_file(shared) -> None:
    from safetensors.torch import load_file

    file, name = shared / "weights" / "tf_efficientnet_lite0.safetensors", "tf_efficientnet_lite0"
    state, backbone = load_file(file), TimmBackbone(name, weights=str(file), norm_eval=True)
    taken = backbone.body.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in taken.items() if value.is_floating_point())
    assert backbone.has_weights
    # The images are normalized as the weights expect: mean and standard deviation 127.5.
    assert backbone.scale.flatten().tolist() == pytest.approx([1 / 127.5] * 3)
    assert backbone.shift.flatten().tolist() == pytest.approx([-1.0] * 3)
    with pytest.raises(
        InputError, match=r"holds no weights of 'tf_efficientnet_lite1'|lacks .* 'tf_efficientnet_lite1'"
    ):
        TimmBackbone("tf_efficientnet_lite1", weights=str(file))


def test_unfit_backbones_are_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'resnet50'"):
        TimmBackbone("resnet50x", pretrained=False)
    for _ in range(2):  # the check is cached, its result is not lost
        with pytest.raises(InputError, match="vit_tiny"):
            TimmBackbone("vit_tiny_patch16_224", pretrained=False)


def test_models_that_fail_on_the_meta_device_are_created_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """So is RegNet with torch 2.6: its constructor calls torch.unique, which that torch lacks there."""
    make = timm.create_model

    def create(*args: object, **options: object) -> nn.Module:
        torch.linspace(0, 1, 2)[1].item()
        return make(*args, **options)

    monkeypatch.setattr(timm, "create_model", create)
    with torch.device("meta"):
        backbone = TimmBackbone("resnet10t", pretrained=False)
        assert [f.shape[1] for f in backbone(torch.randn(1, 3, 64, 96))] == [64, 128, 256, 512]
    assert all(x.is_meta for x in backbone.body.state_dict().values())


# -- necks


ON_A_PYRAMID = {"bfp", "dyhead", "smsl"}
FIVE_LEVELS = {"nas_fpn"}  # and levels of its own above the backbone's
PYRAMID_NECKS = [name for name in NECKS if name != "identity"]  # which makes no pyramid
BEFORE_ZERO_INIT = {  # no gradient at the start
    "smsl": ("non_local.theta", "non_local.phi", "non_local.g."),
    "bfp": ("refine.theta", "refine.phi", "refine.g."),
}


def neck_of(name: str, finest: int, coarsest: int, top: str) -> nn.Module:
    """The neck on a backbone's maps; one that refines a pyramid, on an FPN's."""
    shape = {"channels": 32, "finest": finest, "coarsest": coarsest, "top": top}
    if name in FIVE_LEVELS:
        return NECKS[name](LEVELS, 32, finest, finest + 4)
    if name not in ON_A_PYRAMID:
        known = signature(NECKS[name]).parameters
        return NECKS[name](LEVELS, **{k: v for k, v in shape.items() if k in known})
    fpn = FPN(LEVELS, **shape)
    return NeckChain([fpn, NECKS[name](fpn.levels)])


def check_neck(name: str, pyramid: tuple[int, int, str], size: tuple[int, int]) -> None:
    """Levels and shapes as promised, finite gradients everywhere, unchanged inputs."""
    finest, coarsest, top = pyramid
    coarsest = finest + 4 if name in FIVE_LEVELS else coarsest
    neck = neck_of(name, finest, coarsest, top)
    inputs = [m.requires_grad_() for m in maps(LEVELS, size)]
    kept = [m.detach().clone() for m in inputs]
    outputs = neck(inputs)
    assert neck.levels == Levels((32,) * len(outputs), tuple(2**i for i in range(finest, coarsest + 1)))
    for out, stride in zip(outputs, neck.levels.strides):
        expected = size
        for _ in range(int(math.log2(stride))):
            expected = tuple(math.ceil(s / 2) for s in expected)
        assert out.shape == (2, 32, *expected)
    sum(o.square().mean() for o in outputs).backward()
    for key, p in neck.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        # at 33x47 the context is a single cell, whose norm and relation have no gradient
        assert p.grad.any() or size == (33, 47) or any(part in key for part in BEFORE_ZERO_INIT.get(name, ())), key
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs))


@pytest.mark.parametrize(("name", "pyramid", "size"), pairwise(PYRAMID_NECKS, PYRAMIDS, SIZES))
def test_necks_keep_their_contract(name: str, pyramid: tuple[int, int, str], size: tuple[int, int]) -> None:
    check_neck(name, pyramid, size)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pyramid", "size"), list(product(PYRAMID_NECKS, PYRAMIDS, SIZES)))
def test_necks_keep_their_contract_in_every_combination(
    name: str, pyramid: tuple[int, int, str], size: tuple[int, int]
) -> None:
    check_neck(name, pyramid, size)


def test_fpn_by_hand() -> None:
    """With identity convolutions the finest level is the sum of all, each upsampled by nearest."""
    neck = FPN(Levels((1, 1), (8, 16)), channels=1, coarsest=5, top="max_pool")
    for m in [*neck.lateral, *neck.output]:
        nn.init.dirac_(m.weight)
        nn.init.zeros_(m.bias)
    fine, coarse = torch.arange(8.0).reshape(1, 1, 2, 4), torch.tensor([[10.0, 20.0]]).reshape(1, 1, 1, 2)
    p3, p4, p5 = neck([fine, coarse])
    assert p3.flatten().tolist() == [10, 11, 22, 23, 14, 15, 26, 27]
    assert p4.flatten().tolist() == [10, 20]
    assert p5.flatten().tolist() == [10]


# -- heads


FORMS: list[tuple[str, dict[str, object]]] = [
    *((name, {}) for name in HEADS),
    ("fcos", {"center_sampling": True, "normalize_boxes": True, "centerness_on_box": True, "box_loss": "giou"}),
    ("fcos", {"deformable_last": True}),
    ("fcos", {"norm": False, "bias": False, "channels": 16}),
    ("fovea", {"align": True, "norm": True}),
    ("vfnet", {"deformable_last": True}),
    ("gfl", {"quality_channels": 8}),
    ("tood", {"anchor_based": True}),
    ("tood", {"deformable": 1}),
    ("reppoints", {"norm": True, "num_points": 25}),
    ("reppoints", {"transform_method": "minmax"}),
    ("reppoints", {"transform_method": "partial_minmax"}),
]


def check_head(name: str, options: dict[str, object], size: tuple[int, int]) -> None:
    """Shapes, scores and losses as promised, gradients everywhere, unchanged inputs."""
    levels = Levels((32,) * 5, (8, 16, 32, 64, 128))
    # the RPN's default anchors are larger than these instances, and the first boxes do not fit: none would be positive
    options = {"rpn": {"scale": 4.0}, "borderdet": {"positive": 0.05}}.get(name, options)
    head = HEADS[name](levels, num_classes=3, **{"convs": 1, **options})
    if "normalize_boxes" in options or name == "borderdet":
        nn.init.constant_(head.reg.bias, 0.5)  # so that no ReLU of distances is closed
    features = maps(levels, size)
    kept = [f.clone() for f in features]
    outputs = head(features)
    boxes, scores, _ = head.decode(outputs)
    count = len(outputs.priors)
    assert sum(outputs.priors.counts) == count
    assert boxes.shape == (2, count, 4)
    assert scores.shape == (2, count, head.num_classes)
    assert head.num_classes == (1 if name == "rpn" else 3)
    assert 0 <= scores.min() <= scores.max() <= 1
    losses = head.loss(outputs, [SOME, EMPTY])
    assert all(value.ndim == 0 and value.isfinite() for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in head.parameters())
    assert all(torch.equal(a, b) for a, b in zip(features, kept))


@pytest.mark.parametrize(("name", "options", "size"), [(*form, SIZES[i % len(SIZES)]) for i, form in enumerate(FORMS)])
def test_heads_keep_their_contract(name: str, options: dict[str, object], size: tuple[int, int]) -> None:
    check_head(name, options, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_heads_keep_their_contract_at_every_size(name: str, options: dict[str, object], size: tuple[int, int]) -> None:
    check_head(name, options, size)


def test_every_anchor_starts_with_the_prior_score() -> None:
    head = HEADS["retina"](Levels((8,), (8,)), num_classes=2, prior=0.01)
    for p in [*head.towers.parameters(), head.cls.weight]:
        nn.init.zeros_(p)
    assert torch.allclose(head.decode(head([torch.zeros(1, 8, 2, 2)]))[1], torch.tensor(0.01))


# -- detectors


def test_a_batch_gives_the_detections_of_its_images() -> None:
    """Prediction on a batch equals prediction on each image with the same padding.

    In float64, since rounding would change the order of nearly equal scores.
    """
    model = small().double().eval()
    model.head.cls.bias.data += 3
    together = batch(EMPTY, EMPTY)
    for i, expected in enumerate(model.predict(together)):
        alone = Batch(together.images[i : i + 1], together.sizes[i : i + 1], (i,), together.scales[i : i + 1])
        (detections,) = model.predict(alone)
        assert len(detections) > 0
        assert torch.allclose(detections.boxes, expected.boxes, atol=1e-3)
        assert torch.equal(detections.labels, expected.labels)


def test_loss_normalizer_by_hand() -> None:
    """Each image counts for its positives, at least one (MMDetection 3.x): the loss of a pair with an empty image shows
    it."""
    head = small().head
    levels = maps(head.levels, (64, 96), n=1)
    twice = [m.repeat(2, 1, 1, 1) for m in levels]
    alone, pair = head.loss(head(levels), [SOME]), head.loss(head(twice), [SOME, EMPTY])
    positives = int((head.assigner.assign(head(levels).priors, SOME) >= 0).sum())
    assert float((pair["loss_box"] / alone["loss_box"]).detach()) == pytest.approx(
        positives / (positives + 1), rel=1e-5
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_inference_copy_gives_the_same_outputs(precision: str) -> None:
    model = small()
    model.train()
    for _ in range(3):
        model(batch(EMPTY, EMPTY).images)  # updates the norms' statistics
    model.eval()
    ready = prepare_for_inference(model, precision)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in ready.modules())
    images, sizes = batch(EMPTY).images, torch.tensor([[64, 96]])
    with torch.no_grad():
        a, b = model(images, sizes), ready(images, sizes)
    for ours, theirs in zip(a.maps["cls"] + a.maps["reg"], b.maps["cls"] + b.maps["reg"]):
        assert torch.allclose(ours, theirs.float(), atol=1e-4 if precision == "fp32" else 0.1 * float(ours.abs().max()))
    assert next(model.parameters()).dtype == torch.float32


def check_bf16(model: OneStage | TwoStage) -> None:
    for detections in prepare_for_inference(model, "bf16").predict(batch(EMPTY)):
        assert detections.boxes.dtype == detections.scores.dtype == torch.float32
        assert detections.boxes.isfinite().all()


@pytest.mark.parametrize("neck", ["bifpn", "nas_fpn", "dilated_encoder", "{type: mse_fpn, gate: ca}"])
def test_bf16_with_a_batch_norm_in_the_neck(neck: str) -> None:
    check_bf16(small(f"model.neck={neck}", "model.pyramid.channels=32"))


def test_bf16_with_a_batch_norm_in_the_head() -> None:
    check_bf16(create_model("yolof_tiny", "model.backbone.name=test_resnet", "model.pyramid.channels=32"))


def test_bf16_with_a_batch_norm_in_the_roi_stage() -> None:
    check_bf16(make("double_head_rcnn"))


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "mobilenetv3_small_050"])
def test_folding_batch_norms_of_other_backbones(name: str) -> None:
    model = create_model("retinanet_tiny", f"model.backbone.name={name}", num_classes=2)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in prepare_for_inference(model).modules())


def test_detection_exports() -> None:
    """torch.export takes all of prediction, MSIL and non-maximum suppression included, with equal results."""
    one_level = ("model.backbone.name=test_resnet", "model.pyramid.finest=5", "model.pyramid.coarsest=5")
    model = prepare_for_inference(small(*one_level, "model.pyramid.channels=32", "model.interact=msil"))
    model.head.cls.bias.data += 3
    images, others, sizes = batch(EMPTY).images, batch(EMPTY).images, torch.tensor([[64, 96]])
    detections = check_export(Call(model, detect), (images, sizes), (others, sizes))
    assert int(detections[3]) > 0


# -- configs


LARGE = ("_r50", "_r101", "_x101")
LARGE_NAMES = [name for name in config.names() if any(size in name for size in LARGE)]
SMALL_NAMES = [name for name in config.names() if name not in LARGE_NAMES]
# every detector in its smallest form, and deformable stages
STEPPED = [name for name in SMALL_NAMES if name.endswith("_tiny") or name == "fcos_r18_dcn"]
# tests of their own have the exact number of their parameters
COUNTED = {
    *("atss_r50", "autoassign_r50", "borderdet_r50", "cascade_rcnn_r50", "ddod_r50", "double_head_rcnn_r50", "dw_r50"),
    *("faster_rcnn_r50", "fcos_r50", "foveabox_r50", "freeanchor_r50"),
    *("fsaf_r50", "gfl_r50", "gflv2_r50", "grid_rcnn_r50", "mask_rcnn_r50", "ota_r50", "paa_r50", "reppoints_r50"),
    *("tood_r50", "vfnet_r50", "yolof_r50"),
}
# every other config of ResNet-50, every backbone with RetinaNet
BUILT = [name for name in LARGE_NAMES if ("_r50" in name or name.startswith("retinanet")) and name not in COUNTED]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL_NAMES if name.endswith("_tiny")])
def test_every_small_detector_predicts_in_bf16(name: str) -> None:
    check_bf16(create_model(name, num_classes=3))


def check_built(name: str) -> None:
    with torch.device("meta"):
        model = create_model(name, "model.backbone.pretrained=false", num_classes=3)
    assert sum(p.numel() for p in model.parameters()) > 25_000_000


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.usefixtures("copied_parts")
def test_shipped_configs_of_large_backbones_are_built(name: str) -> None:
    check_built(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(LARGE_NAMES) - set(BUILT) - COUNTED))
def test_all_other_shipped_configs_of_large_backbones_are_built(name: str) -> None:
    check_built(name)


def check_training_step(name: str) -> None:
    model = create_model(name, "model.backbone.pretrained=false", num_classes=3).train()
    masks = torch.zeros(2, 64, 96, dtype=torch.bool)
    masks[0, 4:30, 4:30] = masks[1, 20:44, 10:60] = True
    some, empty = replace(SOME, masks=masks), replace(EMPTY, masks=masks[:0])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = model.loss(batch(some, empty))
    assert set(losses) == set(model.loss_weights)
    sum(losses.values()).backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


# test_gradients.py has the losses and gradients of the other detectors of one stage
FIRST = ("retinanet_tiny", "fcos_r18_dcn")


@pytest.mark.parametrize(
    "name", [n if n in FIRST or "rcnn" in n else pytest.param(n, marks=pytest.mark.slow) for n in STEPPED]
)
def test_shipped_small_configs_make_a_training_step(name: str) -> None:
    check_training_step(name)


# a config of ResNet-50 is the same one with another backbone; `make test-all` trains the others a step
ONLY_SMALL = [name for name in SMALL_NAMES if name.replace("_r18", "_r50") not in LARGE_NAMES]


@pytest.mark.parametrize("name", sorted(set(ONLY_SMALL) - set(STEPPED)))
def test_shipped_configs_of_resnet18_are_built(name: str) -> None:
    with torch.device("meta"):
        create_model(name, "model.backbone.pretrained=false", num_classes=3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.soak) if name in ("tridentnet_r18", "double_head_rcnn_r18") else name
        for name in sorted(set(SMALL_NAMES) - set(STEPPED))
    ],
)
def test_shipped_configs_of_resnet18_make_a_training_step(name: str) -> None:
    check_training_step(name)
