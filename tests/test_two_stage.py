"""Two-stage detectors: shipped configs, training, prediction and export."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from fakes import Call, batch, check_export, detect
from fusedet import config as configs
from fusedet.errors import InputError
from fusedet.models.detectors import create_model, prepare_for_inference
from fusedet.models.detectors.two_stage import TwoStage
from fusedet.models.profiling import count_cost
from fusedet.models.roi import DynamicStage
from fusedet.types import Batch, Target

TINY = [
    "model.backbone.name=resnet10t",
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


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("mask_rcnn_r18", 0.3),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("mask_rcnn_r18", 1.0), ("grid_rcnn_r18", 0.3))),
    ],
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


def test_a_branch_has_the_weight_of_its_stage() -> None:
    weights = make("cascade_rcnn_r50", "model.roi.branches=[mask]").loss_weights
    for term in ("loss_cls", "loss_box", "loss_mask"):
        assert [weights[f"s{i}_{term}"] for i in range(3)] == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    "name",
    ["mask_rcnn_r18", *(pytest.param(f"{kind}_rcnn_r18", marks=pytest.mark.slow) for kind in ("cascade", "grid"))],
)
def test_detection_exports(name: str) -> None:
    made = prepare_for_inference(small(name))
    images, others, sizes = batch(EMPTY).images, batch(EMPTY).images, torch.tensor([[64, 96]])
    detections = check_export(Call(made, detect), (images, sizes), (others, sizes), atol=1e-3)
    assert int(detections[3]) > 0


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
    features = made.neck(made.backbone(made.normalise(images.images)))
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
    """AugFPN: its neck, on whose auxiliary pyramid each stage's samples are trained too, and its pooling."""
    made = small(neck="aug_fpn", roi={"stages": [{"type": "box", "pooling": "soft"}]})
    losses = made.loss(batch(SOME, EMPTY))
    assert set(losses) == set(made.loss_weights)
    assert made.loss_weights["auxiliary_loss_box"] == made.neck.auxiliary_weight
    sum(losses.values()).backward()
    assert all(p.grad.any() for p in made.stages.parameters())
