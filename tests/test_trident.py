"""TridentNet: branches with shared weights, valid ranges, C4 detectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fakes import Call, batch, check_export, detect, objects, shuffled
from fusedet.errors import InputError
from fusedet.models.backbones import TimmBackbone
from fusedet.models.backbones.trident import TridentConv
from fusedet.models.detectors import TwoStage, create_model, prepare_for_inference
from fusedet.models.necks import Identity
from fusedet.models.ops.scale_ranges import ignore_outside_ranges, is_in_range, merge_branches
from fusedet.models.roi.sampling import match_proposals
from fusedet.types import BatchDetections, Levels, Proposals

SOME = objects([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2])
EMPTY = objects([])
ALL = "model.roi.valid_ranges=[[0,null],[0,null],[0,null]]"


def trident(*overrides: str) -> TwoStage:
    """A small one on ResNet-10, whose RoIs are pooled to 4x4 cells."""
    fixed = ["model.backbone.name=resnet10t", "model.backbone.pretrained=false", "model.head.channels=16"]
    fewer = ["model.head.proposals=20", "model.head.train_proposals=20", "model.head.scale=[1,2,4]"]
    stages = "model.roi.stages=[{type: c4, size: 4, num: 16, fraction: 0.5}]"
    return create_model("tridentnet_r18", *fixed, *fewer, stages, *overrides, num_classes=3)


def backbone(**options: Any) -> TimmBackbone:
    return TimmBackbone("resnet10t", pretrained=False, norm_eval=True, **options)


# -- branches


@pytest.mark.parametrize("stride", [1, 2])
def test_a_trident_convolution_is_one_convolution_per_dilation(stride: int) -> None:
    conv = nn.Conv2d(4, 6, 3, stride, padding=1, groups=2, bias=False)
    ours = TridentConv(conv, (1, 2, 3), 1)
    assert list(ours.state_dict()) == ["weight"]
    x = torch.randn(6, 4, 9, 11)
    expected = [F.conv2d(own, conv.weight, None, stride, d, d, 2) for own, d in zip(x.chunk(3), (1, 2, 3))]
    assert torch.equal(ours(x), torch.cat(expected))
    assert torch.equal(ours.eval()(x[:2]), F.conv2d(x[:2], conv.weight, None, stride, 2, 2, 2))


def test_the_maps_of_training_are_those_of_every_branch() -> None:
    """Each branch by itself, in eval mode, gives its part of the maps; names and shapes of the weights are ResNet's."""
    ours = shuffled(backbone(trident_stages=(3, 4)), 0.1).train()
    plain = backbone()
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in ours.state_dict().items()}
    images = torch.randn(2, 3, 64, 96)
    maps = ours(images)
    assert (ours.branches, [len(m) for m in maps]) == (3, [6] * 4)
    for branch in range(3):
        single = backbone(trident_stages=(3, 4), trident_branch=branch).eval()
        single.load_state_dict(ours.state_dict())
        for own, x in zip(single(images), maps):
            assert torch.allclose(own, x.chunk(3)[branch], atol=1e-5)
    assert [len(m) for m in ours.eval()(images)] == [2] * 4
    merged = backbone(trident_stages=(3,), trident_branch=None).eval()
    assert [len(m) for m in merged(images)] == [6] * 4


def test_dilation_one_is_the_plain_backbone() -> None:
    ours = shuffled(backbone(trident_stages=(3,), trident_dilations=(1, 1)), 0.1).train()
    plain = backbone().train()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert all(torch.allclose(a, torch.cat([b, b]), atol=1e-5) for a, b in zip(ours(images), plain(images)))


def test_recomputed_stages_have_the_gradients_of_kept_ones() -> None:
    kept, recomputed = backbone(trident_stages=(3,)), backbone(trident_stages=(3,))
    recomputed.load_state_dict(kept.state_dict())
    recomputed.checkpoint_stages()
    images = torch.randn(1, 3, 64, 64)
    for model in (kept, recomputed):
        sum(m.square().mean() for m in model(images)).backward()
    for a, b in zip(kept.parameters(), recomputed.parameters()):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trident_stages": (2, 4)}, "consecutive"),
        ({"trident_stages": (3,), "trident_dilations": (2,)}, "two or more"),
        ({"trident_stages": (3,), "trident_branch": 3}, "must be 0 to 2"),
        ({"trident_stages": (3,), "deformable_stages": (3, 4)}, "stage 3 cannot be in both"),
        ({"trident_stages": (5,)}, "trident_stages"),
    ],
)
def test_wrong_options_of_the_backbone(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        backbone(**options)


# -- C4 detectors


def test_the_last_stage_moves_to_the_roi_stage() -> None:
    ours = backbone()
    whole = sum(p.numel() for p in ours.parameters())
    channels = ours.levels.channels
    stage = ours.take_last_stage()
    assert ours.levels == Levels(channels[:3], (4, 8, 16))
    assert len(ours(torch.randn(1, 3, 64, 64))) == 3
    assert (stage.channels, stage.stride) == (channels[3], 2)
    assert stage(torch.randn(2, channels[2], 14, 14)).shape == (2, channels[3], 7, 7)
    assert sum(p.numel() for part in (ours, stage) for p in part.parameters()) == whole
    norms = [m for m in stage.train().modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(m.training for m in norms)


def test_a_c4_detector_equals_its_parts() -> None:
    """Backbone up to C4, the last stage on pooled features, linear layers on the mean."""
    model = trident("model.backbone.trident_stages=[]", "model.roi.stages.0.size=14").eval()
    images = batch(SOME).images
    outputs = model(images)
    assert [m.shape[1] for m in outputs.features] == [model.backbone.levels.channels[-1]]
    stage = model.stages[0]
    pooled = stage.pooling.pooling(outputs.features, outputs.rois)
    assert pooled.shape[2:] == (14, 14)
    mean = stage.pooling.last_stage(pooled).mean(dim=(2, 3))
    assert torch.allclose(outputs.raw[0], stage.cls(mean), atol=1e-5)
    assert outputs.raw[1] is not None
    assert torch.allclose(outputs.raw[1], stage.reg(mean), atol=1e-5)


def test_a_neck_of_other_channels_than_the_last_stage_takes_is_refused() -> None:
    assert len(trident("model.neck=fpn", "model.pyramid.channels=256").stages) == 1
    with (
        torch.device("meta"),
        pytest.raises(InputError, match=r"takes 256 channels and gets 64: set model\.neck=identity or model\.pyramid"),
    ):
        trident("model.neck=fpn", "model.pyramid.channels=64")


def test_parameters_of_resnet50() -> None:
    """MMDetection's counts: ResNet-50, an RPN of 1024 channels and 15 anchors, layers of 2048 to 81 and 320."""
    rpn = 9 * 1024 * 1024 + 1024 + 75 * (1024 + 1)
    layers = 401 * (2048 + 1)
    with torch.device("meta"):
        for name in ("faster_rcnn_r50_c4", "tridentnet_r50"):
            model = create_model(name, "model.backbone.pretrained=false")
            assert sum(p.numel() for p in model.parameters()) == 23_508_032 + rpn + layers


def test_identity_passes_on_one_level() -> None:
    neck = Identity(Levels((4, 8, 16), (4, 8, 16)), 3, 3)
    maps = [torch.randn(1, c, 16 // c, 16 // c) for c in (4, 8, 16)]
    assert neck.levels == Levels((8,), (8,))
    (own,) = neck(maps)
    assert own is maps[1]
    for finest, coarsest in ((3, 4), (5, 5)):
        with pytest.raises(InputError, match="finest"):
            Identity(Levels((4, 8, 16), (4, 8, 16)), finest, coarsest)


def test_proposals_without_the_ground_truth() -> None:
    proposals = Proposals(torch.tensor([[[0.0, 0, 10, 10], [0, 0, 4, 4]]]), torch.zeros(1, 2), torch.tensor([1]))
    matched = match_proposals(proposals, [objects([[0, 0, 10, 9]])], 0.5, ground_truth=False)
    assert matched.num_ground_truth == 0
    assert matched.instances.tolist() == [[0, -2]]
    assert matched.overlaps[0].tolist() == pytest.approx([0.9, -1])


# -- valid ranges


def test_sizes_in_a_range() -> None:
    """Sizes 10, 20 and 40; both ends are included."""
    boxes = torch.tensor([[0.0, 0, 20, 5], [0, 0, 40, 10], [5, 5, 45, 45]])
    assert is_in_range(boxes, (10.0, 20.0)).tolist() == [True, True, False]
    assert is_in_range(boxes, (20.5, None)).tolist() == [False, False, True]


def test_anchors_of_instances_outside_the_range_are_ignored() -> None:
    """The first instance, of size 10, is outside: its anchor, and the background that overlaps it by 0.5, too."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 5], [50, 50, 90, 90], [0, 90, 10, 99], [0, 0, 10, 2]])
    target = objects([[0, 0, 10, 10], [50, 50, 90, 90]])
    assigned = torch.tensor([[0, -1, 1, -1, -1], [0, -1, 1, -1, -1]])
    ranges = [(20.0, None), (0.0, None)]
    result = ignore_outside_ranges(assigned, anchors, [target, target], ranges)
    assert result.tolist() == [[-2, -2, 1, -1, -1], [0, -1, 1, -1, -1]]


def losses(model: TwoStage, *targets: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    images = batch(*targets)
    torch.manual_seed(1)
    return model.loss(images)


def test_ranges_without_limits_change_nothing() -> None:
    torch.manual_seed(0)
    limited, free = trident(ALL).train(), trident().train()
    limited.load_state_dict(free.state_dict())
    for a, b in zip(losses(limited, SOME, EMPTY).values(), losses(free, SOME, EMPTY).values()):
        assert torch.equal(a, b)


def test_each_branch_is_trained_on_its_range() -> None:
    """The sampled positives of every branch are of instances in its range; 26 and 34.6 pixels are the sizes."""
    model = trident("model.roi.valid_ranges=[[0,20],[20,30],[30,null]]").train()
    seen: list[tuple[int, int]] = []
    loss = model.stages[0].loss

    def record(raw: Any, samples: Any, targets: Any) -> Any:
        for i in samples.positive.tolist():
            image = int(samples.image[i])
            seen.append((image, int(targets[image].labels[samples.instances[i]])))
        return loss(raw, samples, targets)

    model.stages[0].loss = record  # type: ignore[method-assign]
    result = losses(model, SOME, EMPTY)
    assert set(seen) == {(2, 0), (4, 2)}  # images 0 and 1 of the first branch, 2 and 3 of the second, 4 and 5
    sum(result.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_detections_of_all_branches_are_merged() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10]], [[0, 0, 40, 40]]])
    detections = BatchDetections(boxes, torch.tensor([[0.5], [0.25]]), torch.tensor([[1], [0]]), torch.tensor([1, 1]))
    merged = merge_branches(detections, 2, 2)
    assert merged.boxes.tolist() == [[[0, 0, 10, 10], [0, 0, 40, 40]]]
    assert merged.scores.tolist() == [[[0, 0.5], [0.25, 0]]]
    limited = merge_branches(detections, 2, 2, [(0.0, 20.0), (0.0, 20.0)])
    assert limited.scores.tolist() == [[[0, 0.5], [0, 0]]]


@pytest.mark.parametrize("override", ["model.backbone.trident_branch=null", ALL])
def test_all_branches_predict(override: str) -> None:
    """Training and, without a chosen branch, testing merge the branches of each image; other images do not matter."""
    model = trident(override, "test.score=0").train(override == ALL)
    images = batch(SOME, EMPTY)
    both = model.predict(images)
    assert all(len(d) > 0 for d in both)
    single = model.detect(images.images[1:], images.sizes[1:])
    assert torch.allclose(single.scores[0, : len(both[1])], both[1].scores, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.roi.valid_ranges=[[0,90]]"], "1 ranges for 3 branches"),
        (["model.roi.valid_ranges=[[0,9],[9,5],[9,null]]"], r"\[9.0, 5.0\] must be a least and a larger size"),
        (["model.backbone.trident_stages=[]", ALL], "3 ranges for 1 branches"),
        (["model.roi.branches=[mask]"], "takes stages only"),
        (["model.backbone.trident_stages=[3,4]"], "must not include the last stage"),
        (["model.backbone.name=mobilenetv3_large_100"], "no last stage|no blocks of a ResNet"),
        (["model.head.scale=[]"], "one or more"),
    ],
)
def test_wrong_detectors(overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        trident(*overrides)


def test_a_one_stage_detector_has_no_branches() -> None:
    with pytest.raises(InputError, match="one-stage detector has no branches"):
        create_model("fcos_tiny", "model.backbone.trident_stages=[3]")


def test_trident_stages_below_a_pyramid() -> None:
    """FPN takes the maps of all branches: earlier ones are repeated."""
    model = create_model("faster_rcnn_tiny", "model.backbone.trident_stages=[3,4]", num_classes=3).train()
    values = model.loss(batch(SOME, EMPTY))
    sum(values.values()).backward()
    assert all(v.isfinite() for v in values.values())
    assert len(model.eval()(batch(SOME).images).features[0]) == 1


@pytest.mark.slow
def test_prediction_exports_with_folded_norms() -> None:
    model = prepare_for_inference(trident("test.score=0"))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.backbone.modules())
    images, others, sizes = batch(SOME).images, batch(EMPTY).images, torch.tensor([[64, 96]])
    detections = check_export(Call(model, detect), (images, sizes), (others, sizes))
    assert int(detections[3]) > 0
