"""Two-stage detectors: shipped configs, training, prediction and export."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import (
    FasterRCNN_ResNet50_FPN_Weights,
    FCOS_ResNet50_FPN_Weights,
    MaskRCNN_ResNet50_FPN_Weights,
    RetinaNet_ResNet50_FPN_Weights,
)
from torchvision.ops import roi_align

from fakes import batch, maps
from fusedet import config as configs
from fusedet.errors import InputError
from fusedet.models.detectors import create_model, prepare_for_inference
from fusedet.models.detectors.two_stage import TwoStage
from fusedet.models.profiling import count_cost
from fusedet.models.roi import DynamicStage
from fusedet.models.roi.sampling import RoISamples
from fusedet.types import Batch, BatchDetections, Target

TINY = [
    "model.backbone.name=test_resnet",
    "model.backbone.frozen_stages=-1",
    "model.backbone.norm_eval=false",
    "model.pyramid.channels=16",
]
FEW = {"proposals": 100, "train_proposals": 100, "train_pre_nms": 200}


def instances(boxes: list, labels: list, masks: bool = False) -> Target:
    corners = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
    return Target(
        corners,
        torch.tensor(labels, dtype=torch.int64),
        torch.ones(len(boxes), 64, 96, dtype=torch.bool) if masks else None,
    )


EMPTY = instances([], [])
SOME = instances([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2])


def make(name: str, *overrides: str, num_classes: int = 80, **model: Any) -> TwoStage:
    """Build the detector of a config, with sections of the model merged into it."""
    sections = {"model": model} if model else {}
    made = create_model(name, "model.backbone.pretrained=false", *overrides, num_classes=num_classes, **sections)
    assert isinstance(made, TwoStage)
    return made


def small(name: str = "faster_rcnn_r18", **model: Any) -> TwoStage:
    """Build a tiny detector whose scores and boxes differ from RoI to RoI."""
    roi = model.pop("roi", None) or configs.load(name).model.roi
    roi = roi | {"stages": [{"channels": 32, "num": 64} | stage for stage in roi["stages"]]}
    made = make(name, *TINY, "test.score=0.02", num_classes=3, roi=roi, head=FEW, **model)
    for stage in made.stages:
        box = stage.box if isinstance(stage, DynamicStage) else stage
        nn.init.normal_(box.cls.weight, std=0.2)
        nn.init.normal_(made.head.cls.weight, std=0.2)
    return made


# -- configs


def test_cost_counts_a_thousand_proposals() -> None:
    with torch.device("meta"):
        made = make("faster_rcnn_r50")
    layers = 12544 * 1024 + 1024 * 1024 + 1024 * 81 + 1024 * 320
    cost = count_cost(made, 800, 1344)
    parts = sum(part["multiply_adds"] for name, part in cost["parts"].items() if name in ("backbone", "neck", "head"))
    assert cost["multiply_adds"] - parts == 1000 * layers


@pytest.mark.parametrize(
    ("roi", "message"),
    [
        ({"stages": []}, r"model\.roi\.stages=\[\]"),
        ({"stages": "box"}, r"model\.roi\.stages='box' must be a list"),
        ({"stage": ["box"], "stages": ["box"]}, "did you mean 'stages'"),
        ({"stages": ["boks"]}, r"unknown model\.roi\.stages\.0 'boks': did you mean 'box'"),
        ({"stages": [{"type": "box", "lose": "l1"}]}, "did you mean 'loss'"),
        (
            {"stages": [{"type": "box", "pooling": "softer"}]},
            r"model\.roi\.stages\.0\.pooling 'softer': did you mean 'soft'",
        ),
        ({"stages": [{"type": "box", "pooling": {"type": "level", "size": 3}}]}, r"pooling\.size is not set here"),
        ({"stages": ["box"], "branches": ["musk"]}, r"unknown model\.roi\.branches\.0 'musk': did you mean 'mask'"),
    ],
)
def test_roi_mistakes_are_refused(roi: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make("faster_rcnn_r18", *TINY, roi=roi)


def test_parts_that_do_not_fit_roi_are_refused() -> None:
    with pytest.raises(InputError, match="must be rpn"):
        make("faster_rcnn_r18", *TINY, head="retina")


# -- training and prediction


@pytest.mark.parametrize("mode", [True, False])
def test_prediction_is_the_same_in_both_modes_and_for_each_image(mode: bool) -> None:
    made = small().train(mode)
    if mode:
        for m in made.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.eval()
    together = batch(EMPTY, EMPTY)
    for i, joint in enumerate(made.predict(together)):
        single = Batch(together.images[i : i + 1], together.sizes[i : i + 1], (i,), together.scales[i : i + 1])
        (separate,) = made.predict(single)
        assert len(separate) > 0
        assert torch.allclose(separate.boxes, joint.boxes, atol=1e-3)
        assert torch.equal(separate.labels, joint.labels)
    assert made.training is mode


def test_seed_determines_the_sampling() -> None:
    made, images = small(roi={"stages": [{"type": "box", "num": 16}]}), batch(SOME, SOME)
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(made.loss(images)["loss_cls"])
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_no_detection_in_the_padding() -> None:
    made = small().eval()
    images = dataclasses.replace(batch(EMPTY), sizes=torch.tensor([[40, 50]]))
    (detections,) = made.predict(images)
    assert len(detections) > 0
    assert (detections.boxes <= torch.tensor([50, 40, 50, 40])).all()


def test_half_precision() -> None:
    half = prepare_for_inference(small(), "bf16")
    (detections,) = half.predict(batch(EMPTY))
    assert detections.boxes.dtype == torch.float32
    assert detections.boxes.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "score"), [("mask_rcnn_r18", 0.3), ("mask_rcnn_r18", 1.0), ("grid_rcnn_r18", 0.3)]
)  # some detections, and none
def test_padding_of_detections_changes_nothing(name: str, score: float) -> None:
    made, images = small(name).eval(), batch(EMPTY, EMPTY)
    made.selection["score"] = score
    with torch.no_grad():
        padded, trimmed = (made.detect(images.images, images.sizes, padded=p) for p in (True, False))
    assert trimmed.boxes.shape[1] == int(padded.counts.max()) < padded.boxes.shape[1]
    assert bool(padded.counts.any()) is (score < 1)
    for i, n in enumerate(padded.counts.tolist()):
        for ours, theirs in zip(padded, trimmed):
            if ours is not None and ours.ndim > 1:
                assert torch.allclose(ours[i, :n].float(), theirs[i, :n].float(), atol=1e-4)


@torch.no_grad()
def test_the_order_of_the_branches_changes_nothing() -> None:
    """Masks lie inside the boxes that the grid branch has refined."""
    branches = [{"type": "mask", "convs": 1, "channels": 8}, {"type": "grid", "convs": 1, "point_channels": 4}]
    made = small(roi=configs.load("faster_rcnn_r18").model.roi | {"branches": branches}).eval()
    nn.init.normal_(made.branches[1][0].heat.weight)
    features, boxes = maps(made.neck.levels, n=1), torch.tensor([[[10.0, 10, 60, 40]]])
    detections = BatchDetections(boxes, torch.ones(1, 1), torch.tensor([[2]]), torch.tensor([1]))
    first = made.run_branches(features, detections)
    made.branches = made.branches[::-1]
    second = made.run_branches(features, detections)
    assert not torch.allclose(first.boxes, boxes)
    assert torch.equal(first.boxes, second.boxes)
    assert torch.equal(first.masks, second.masks)
    assert torch.equal(first.masks, made.branches[1][0].predict(features, first))


def test_a_branch_has_the_weight_of_its_stage() -> None:
    with torch.device("meta"):
        weights = make("cascade_rcnn_r50", "model.roi.branches=[mask]").loss_weights
    for term in ("loss_cls", "loss_box", "loss_mask"):
        assert [weights[f"s{i}_{term}"] for i in range(3)] == [1.0, 0.5, 0.25]


# -- stages and branches


def test_each_stage_trains_on_the_boxes_of_the_one_before() -> None:
    """The proposals of a later stage are the refined samples of the one before, without ground-truth boxes."""
    made, images = small("cascade_rcnn_r18"), batch(SOME, instances([[30, 10, 80, 50]], [1]))
    seen: list[Any] = []
    for stage in made.stages:
        draw = stage.sample

        def sample(proposals: Any, targets: Any, draw: Any = draw) -> Any:
            seen.append((proposals, draw(proposals, targets)))
            return seen[-1][1]

        stage.sample = sample
    features = made.neck(made.backbone(made.normalize(images.images)))
    losses = made.loss(images)
    assert list(losses)[2:] == [f"s{i}_{k}" for i in range(3) for k in ("loss_cls", "loss_box")]
    assert [made.loss_weights[f"s{i}_loss_cls"] for i in range(3)] == [1.0, 0.5, 0.25]
    for i in (1, 2):
        proposals, _ = seen[i]
        _, samples = seen[i - 1]
        raw = made.stages[i - 1](features, samples.rois)
        boxes = made.stages[i - 1].refine(raw, samples.rois, images.sizes)
        for image in (0, 1):
            own = (samples.image == image) & ~samples.is_ground_truth
            assert proposals.counts[image] == own.sum()
            assert torch.allclose(proposals.boxes[image, : own.sum()], boxes[own], atol=1e-3)


def test_cascade_scores_come_from_mean_logits() -> None:
    made, images = small("cascade_rcnn_r18").eval(), batch(EMPTY)
    with torch.no_grad():
        outputs = made(images.images, images.sizes)
        rois = torch.cat(
            [torch.zeros(len(outputs.rois), 1), made.head.propose(outputs.outputs, images.sizes).boxes[0]], dim=1
        )
        logits = []
        for stage in made.stages:
            logits.append(stage(outputs.features, rois)[0])
            last, rois = (
                rois,
                torch.cat([rois[:, :1], stage.refine(stage(outputs.features, rois), rois, images.sizes)], dim=1),
            )
    assert torch.allclose(outputs.raw[0], sum(logits) / 3, atol=1e-4)
    assert torch.allclose(outputs.rois, last, atol=1e-3)


@pytest.mark.parametrize(("name", "stages"), [("faster_rcnn_r18", 1), ("cascade_rcnn_r18", 3)])
def test_each_stage_has_a_mask_branch(name: str, stages: int) -> None:
    roi = configs.load(name).model.roi | {"branches": [{"type": "mask", "convs": 1, "channels": 8}]}
    made, masked = small(name, roi=roi), instances([[4, 4, 30, 30], [10, 20, 60, 44]], [0, 2], masks=True)
    assert len(made.branches[0]) == stages
    losses = made.loss(batch(masked, instances([], [], masks=True)))
    names = [f"s{i}_loss_mask" for i in range(3)] if stages == 3 else ["loss_mask"]
    assert [k for k in losses if "mask" in k] == names
    assert set(losses) == set(made.loss_weights)
    sum(losses.values()).backward()
    assert all(p.grad.any() for p in made.branches.parameters())
    images = batch(EMPTY)
    padded = made.eval().detect(images.images, images.sizes)
    assert padded.masks is not None
    assert padded.masks.shape == (1, 100, 28, 28)
    (detections,) = made.predict(images)
    assert detections.masks.shape == (len(detections), 64, 96)
    assert detections.masks.dtype == torch.bool


def test_grid_branch_replaces_the_boxes() -> None:
    branch = {"type": "grid", "convs": 1, "point_channels": 4, "groups": 9}
    made = small(roi={"stages": [{"type": "box", "regress": False}], "branches": [branch]})
    losses = made.loss(batch(SOME, EMPTY))
    assert set(losses) == set(made.loss_weights) == {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_grid"}
    sum(losses.values()).backward()
    (detections,) = made.eval().predict(batch(EMPTY))
    assert len(detections) > 0
    assert detections.masks is None


def test_soft_pooling_and_auxiliary_losses() -> None:
    """AugFPN: each lateral has losses of an auxiliary head, beside the stage and its pooling; all are trained."""
    made = small(neck="aug_fpn", roi={"stages": [{"type": "box", "pooling": "soft"}]})
    losses = made.loss(batch(SOME, EMPTY))
    assert set(losses) == set(made.loss_weights)
    extra = {f"auxiliary_level{i}_{name}": 0.25 for i in range(4) for name in ("loss_cls", "loss_box")}
    assert {k: v for k, v in made.loss_weights.items() if k.startswith("auxiliary")} == extra
    sum(losses.values()).backward()
    assert all(p.grad.any() for part in (made.stages, made.auxiliary_stages) for p in part.parameters())


def test_auxiliary_head_scores_every_roi_on_every_lateral(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small and large RoIs are pooled from all four laterals, two points per side of a cell; the head is separate."""
    made = small(neck="aug_fpn")
    (stage,), (head,) = made.stages, made.auxiliary_stages
    rois = torch.tensor([[0, 4, 4, 12, 12], [1, 0, 0, 96, 64], [1, 10, 20, 60, 44.0]])
    samples = RoISamples(rois, torch.tensor([0, -1, 1]), rois[:, 0].long())
    targets = [instances([[4, 4, 12, 12]], [1]), instances([[0, 0, 9, 9], [10, 20, 60, 44]], [0, 2])]
    features = made.backbone(torch.rand(2, 3, 64, 96))
    _, auxiliary = made.neck.with_auxiliary(features)
    losses = made.auxiliary_loss(0, auxiliary, samples, targets)
    levels = zip(made.neck.lateral, features, (4, 8, 16, 32), strict=True)
    for i, (lateral, feature, stride) in enumerate(levels):
        x = roi_align(lateral(feature), rois, 7, 1 / stride, sampling_ratio=2, aligned=True).flatten(1)
        for layer in head.shared:
            x = layer(x).relu()
        expected = head.loss((head.cls(x), head.reg(x)), samples, targets)
        for name, value in expected.items():
            assert torch.allclose(losses[f"auxiliary_level{i}_{name}"], value, rtol=1e-4)
    assert len(losses) == 8
    # the stage's own layers do not see the laterals
    gradients = torch.autograd.grad(sum(losses.values()), list(stage.parameters()), allow_unused=True)
    assert all(g is None for g in gradients)
    monkeypatch.setattr(made, "auxiliary_stages", None)
    assert len(made.eval().predict(batch(SOME))) == 1


def test_auxiliary_heads_of_a_cascade_and_their_parameters() -> None:
    weights = small("cascade_rcnn_r18", neck="aug_fpn").loss_weights
    assert [weights[f"s{i}_auxiliary_level3_loss_box"] for i in range(3)] == [0.25, 0.125, 0.0625]
    with torch.device("meta"):
        plain, augmented = (make("faster_rcnn_r50", f"model.neck={neck}") for neck in ("fpn", "aug_fpn"))
        without = make("faster_rcnn_r50", "model.neck={type: aug_fpn, auxiliary_weight: 0}")
    counts = [sum(p.numel() for p in made.parameters()) for made in (plain, without, augmented)]
    assert counts[1] - counts[0] == 1_777_411  # residual feature augmentation
    assert counts[2] - counts[1] == 14_306_705  # a box head


def test_auxiliary_stages_must_fit_the_neck() -> None:
    made = small(neck="aug_fpn")
    parts = (made.backbone, made.neck, made.head, made.stages)
    with pytest.raises(InputError, match=r"^0 auxiliary stages for 1 stages: the neck needs 1, one per stage"):
        TwoStage(*parts)
    assert TwoStage(*parts, auxiliary_stages=made.auxiliary_stages).loss_weights == made.loss_weights


# -- cost, against other libraries' numbers for the same detectors


@pytest.mark.parametrize(
    ("name", "size", "classes", "figure"),
    [
        ("retinanet_r50", (800, 1280), 80, 239.32),  # MMDetection's page on its tool get_flops
        ("retinanet_r50", (800, 800), 90, RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta["_ops"]),
        ("faster_rcnn_r50", (800, 800), 90, FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["_ops"]),
        ("fcos_r50", (800, 800), 90, FCOS_ResNet50_FPN_Weights.COCO_V1.meta["_ops"]),
    ],
)
def test_multiply_adds_agree_with_other_libraries(
    name: str, size: tuple[int, int], classes: int, figure: float
) -> None:
    """torchvision counts at 800 x 800, with 90 classes and the background."""
    with torch.device("meta"):
        made = create_model(name, "model.backbone.pretrained=false", num_classes=classes)
    assert count_cost(made, *size)["multiply_adds"] / 1e9 == pytest.approx(figure, rel=0.02)


def test_multiply_adds_of_a_mask_branch() -> None:
    """Those of its layers for 100 detections. torchvision prints Mask R-CNN without them, as it detects nothing."""
    with torch.device("meta"):
        made = create_model("mask_rcnn_r50", "model.backbone.pretrained=false", num_classes=90)
        few = create_model("mask_rcnn_r50", "model.backbone.pretrained=false", "test.max_det=10", num_classes=90)
    cost, of_ten = count_cost(made, 800, 800), count_cost(few, 800, 800)
    per_detection = 14 * 14 * (4 * 9 * 256 * 256 + 4 * 256 * 256) + 28 * 28 * 256 * 90
    branches = cost["parts"]["branches"]["multiply_adds"]
    assert branches == 100 * per_detection
    assert cost["multiply_adds"] - of_ten["multiply_adds"] == 90 * per_detection
    printed = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["_ops"]
    assert (cost["multiply_adds"] - branches) / 1e9 == pytest.approx(printed, rel=0.02)


def test_multiply_adds_of_a_grid_branch() -> None:
    """The first layers by hand: a convolution to half the size, seven more, two transposed ones in groups per point."""
    with torch.device("meta"):
        made = make("grid_rcnn_r50")
    branch = made.branches[0][0]
    convs = 7 * 7 * 9 * (256 * 576 + 7 * 576 * 576)
    up = 7 * 7 * 16 * 576 * 64 + 14 * 14 * 16 * 576
    edges = sum(len(t.sources) for t in (branch.first_order, branch.second_order))  # channels of all edges
    fusion = 7 * 7 * edges * (25 + 64)
    assert count_cost(made, 800, 800)["parts"]["branches"]["multiply_adds"] == 100 * (convs + up + fusion)
