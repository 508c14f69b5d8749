"""Complete MMDetection models have the recorded detections after conversion."""

from __future__ import annotations

import json
import runpy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from fusedet import config
from fusedet.errors import InputError
from fusedet.interop import ConvertedCheckpoint, convert_checkpoint
from fusedet.interop.class_names import resolve_class_names
from fusedet.interop.mmdetection.backbone_config import read_resizing
from fusedet.interop.mmdetection.detector_config import convert_config
from fusedet.interop.mmdetection.load_checkpoint import extract_weights
from fusedet.interop.mmdetection.weight_names import build_rules, rename_weight
from fusedet.models.detectors import build_detector
from fusedet.models.heads import RPNHead
from fusedet.types import Batch, Detections, Levels
from partners import partners

FOLDER = Path(__file__).with_name("parity")
CASES = sorted(path.stem for path in (FOLDER / "checkpoints").glob("*.json"))
FILLED = runpy.run_path(str(FOLDER / "filled.py"))
# Names and shapes show all of these models. They do not show BGR, mean, caffe style, norm_on_bbox and Dynamic R-CNN.
INFERRED = [
    "libra_retinanet_r18",
    "vfnet_r50_mdconv",
    "reppoints_r18_gn",
    "faster_rcnn_r18_pafpn",
    "faster_rcnn_x50_dconv",
    "cascade_mask_rcnn_r18",
    "grid_rcnn_r18",
]
NAMED = {"dataset_meta": {"classes": ("a", "b", "c", "d", "e")}}


def load_case(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "checkpoints" / f"{name}.json").read_text())


@lru_cache(maxsize=1)
def make_weights(name: str) -> dict[str, Tensor]:
    spec = load_case(name)
    return {k: torch.from_numpy(np.array(FILLED["fill"](k, tuple(s), spec["stem"]))) for k, s in spec["keys"].items()}


def convert(
    tmp_path: Path, content: dict[str, Any], model: dict[str, Any] | None, *overrides: str
) -> ConvertedCheckpoint:
    torch.save(content, tmp_path / "model.pth")
    if model is not None:
        (tmp_path / "config.py").write_text(f"model = {model!r}")
    return convert_checkpoint(
        tmp_path / "model.pth", str(tmp_path / "config.py") if model is not None else None, overrides
    )


def predict(converted: ConvertedCheckpoint, size: tuple[int, int]) -> Detections:
    detector = build_detector(converted.config, len(converted.names)).eval()
    detector.load_state_dict(converted.weights)
    height, width = size
    padded = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32, dtype=torch.uint8)
    padded[0, :, :height, :width] = torch.from_numpy(FILLED["image"](height, width)).permute(2, 0, 1)
    return detector.predict(Batch(padded, torch.tensor([[height, width]]), (0,), torch.ones(1, 2)))[0]


def assert_same(ours: Detections, theirs: dict[str, Any]) -> None:
    """Assert that detections match one to one in box, score, label and mask."""
    boxes, scores, labels = (torch.tensor(theirs[key]) for key in ("boxes", "scores", "labels"))
    close = (ours.boxes[:, None] - boxes).abs().amax(dim=2) <= 0.05
    close &= (ours.scores[:, None] - scores).abs() <= 2e-4
    close &= ours.labels[:, None] == labels
    assert len(ours) == len(boxes)
    for i, counts in enumerate(theirs.get("masks", [])):  # every tenth detection has one
        assert ours.masks is not None
        mask = torch.from_numpy(
            coco_mask.decode({"size": list(ours.masks.shape[1:]), "counts": counts.encode()})
        ).bool()
        close[:, 10 * i] &= (ours.masks ^ mask).sum(dim=(1, 2)) <= 1 + 1e-3 * int(mask.sum())
    assert -1 not in partners(close)


COSTLY = ("vfnet_r50_mdconv", "faster_rcnn_x50_dconv", "cascade_mask_rcnn_r18", "grid_rcnn_r18", "retinanet_r50_caffe")
SIMILAR = (
    "libra_retinanet_r18",
    "reppoints_r18_minmax",
)  # their parts are those of libra_rcnn_r18 and reppoints_r18_gn


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in COSTLY + SIMILAR else n for n in CASES]
)
def test_same_detections(tmp_path: Path, name: str) -> None:
    """With MMDetection's config, and, for models that names and shapes show in full, without it."""
    spec, state = load_case(name), make_weights(name)
    converted = convert(tmp_path, {"state_dict": state, "meta": NAMED}, spec["model"])
    assert len(set(converted.names)) == 5
    assert not converted.notes or name == "libra_retinanet_r18"  # whose loss is not supported
    assert_same(predict(converted, spec["size"]), spec["predictions"])
    if name in INFERRED:
        inferred = convert(tmp_path, state, None)
        assert any("no config" in note for note in inferred.notes)
        assert_same(predict(inferred, spec["size"]), spec["predictions"])


def rename_to_1x(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert a two-stage state dict to the names and rows of 1.x, with constant rows for background."""
    renamed = {}
    for key, value in state.items():
        layer = key.rpartition(".")[0]
        if layer.endswith("fc_cls"):  # background first
            value = torch.cat([value[-1:], value[:-1]])
        elif layer.endswith("fc_reg") and len(value) > 4:
            value = torch.cat([torch.full_like(value[:4], 7.0), value])
        elif layer.endswith("conv_logits"):
            value = torch.cat([torch.full_like(value[:1], 7.0), value])
        renamed[key.removeprefix("roi_head.")] = value
    return renamed


@pytest.mark.parametrize("name", ["mask_rcnn_r18", "cascade_mask_rcnn_r18"])
def test_1x_has_background_first(tmp_path: Path, name: str) -> None:
    state = make_weights(name)
    current = convert(tmp_path, {"state_dict": state}, None)
    old = convert(tmp_path, {"state_dict": rename_to_1x(state), "meta": {"mmdet_version": "1.2.0+7d0f5ce"}}, None)
    assert len(old.names) == 5
    assert old.weights.keys() == current.weights.keys()
    assert all(torch.equal(old.weights[k], current.weights[k]) for k in old.weights)
    assert any("1.x" in note for note in old.notes)
    head, roi = old.config.model.head, old.config.model.roi
    assert (head["offset"], head["round_anchors"]) == (0.5, True)
    assert all(
        part["pooling"] == {"type": "level", "samples": 2, "aligned": False} for part in roi["stages"] + roi["branches"]
    )
    assert "offset" not in current.config.model.head


CONFIG_OF_1X = """
model = dict(
    type='MaskRCNN',
    pretrained='torchvision://resnet18',
    backbone=dict(
        type='ResNet', depth=18, num_stages=4, out_indices=(0, 1, 2, 3), frozen_stages=1, style='pytorch'),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=64, num_outs=5),
    rpn_head=dict(
        type='RPNHead', in_channels=64, feat_channels=64,
        anchor_scales=[8], anchor_ratios=[0.5, 1.0, 2.0], anchor_strides=[4, 8, 16, 32, 64],
        target_means=[.0, .0, .0, .0], target_stds=[1.0, 1.0, 1.0, 1.0],
        loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=True), loss_bbox=dict(type='SmoothL1Loss', beta=1 / 9)),
    bbox_roi_extractor=dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', out_size=7, sample_num=2),
        featmap_strides=[4, 8, 16, 32]),
    bbox_head=dict(
        type='SharedFCBBoxHead', num_fcs=2, in_channels=64, fc_out_channels=128, roi_feat_size=7, num_classes=6,
        target_means=[.0, .0, .0, .0], target_stds=[0.1, 0.1, 0.2, 0.2], reg_class_agnostic=False),
    mask_roi_extractor=dict(
        type='SingleRoIExtractor',
        roi_layer=dict(type='RoIAlign', out_size=14, sample_num=2),
        featmap_strides=[4, 8, 16, 32]),
    mask_head=dict(type='FCNMaskHead', num_convs=4, in_channels=64, conv_out_channels=64, num_classes=6))
test_cfg = dict(
    rpn=dict(nms_pre=900, max_num=800, nms_thr=0.6), rcnn=dict(score_thr=0.1, max_per_img=70))
img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [
    dict(type='MultiScaleFlipAug', img_scale=(1000, 600), transforms=[dict(type='Normalize', **img_norm_cfg)])]
"""


def test_1x_config_and_names(tmp_path: Path) -> None:
    """A config of 1.x has heads beside each other, anchors in the head and thresholds outside of the model."""
    state = make_weights("mask_rcnn_r18")
    (tmp_path / "old.py").write_text(CONFIG_OF_1X)
    torch.save(
        {"state_dict": rename_to_1x(state), "meta": {"CLASSES": ("v", "w", "x", "y", "z")}}, tmp_path / "old.pth"
    )
    converted = convert_checkpoint(tmp_path / "old.pth", str(tmp_path / "old.py"))
    assert converted.names == ["v", "w", "x", "y", "z"]
    assert (converted.config.data.size, converted.config.data.antialias) == ((600, 1000), False)
    test, head = converted.config.test, converted.config.model.head
    assert (test.score, test.max_det, test.pre_nms, head["nms"], head["proposals"]) == (0.1, 70, 900, 0.6, 800)
    assert (head["offset"], head["round_anchors"]) == (0.5, True)
    backbone = converted.config.model.backbone
    assert backbone["mean"] == [122.7717, 115.9465, 102.9801]
    assert torch.equal(converted.weights["backbone.body.conv1.weight"], state["backbone.conv1.weight"].flip(1))


def test_anchors_of_1x() -> None:
    """1.x included a box's last pixel and centered anchors in their cells: the same box is one pixel longer here."""
    head = RPNHead(Levels((8,) * 2, (4, 16)), scale=8.0, offset=0.5, round_anchors=True)
    features = [torch.zeros(1, 8, 2, 3), torch.zeros(1, 8, 1, 1)]
    priors = head(features).priors.boxes
    expected = []
    for stride, (height, width) in ((4, (2, 3)), (16, (1, 1))):
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    w, h, center = stride * 8 / ratio**0.5, stride * 8 * ratio**0.5, 0.5 * (stride - 1)
                    box = [
                        center - 0.5 * (w - 1),
                        center - 0.5 * (h - 1),
                        center + 0.5 * (w - 1),
                        center + 0.5 * (h - 1),
                    ]
                    expected.append(
                        [
                            round(v) + shift
                            for v, shift in zip(box, (x * stride, y * stride, x * stride + 1, y * stride + 1))
                        ]
                    )
    assert torch.equal(priors, torch.tensor(expected, dtype=torch.float32))


def test_names_of_deformable_offsets() -> None:
    """1.0 has the offsets beside the convolution, later versions inside it, with two names for modulated ones."""
    model = config.load(
        "vfnet_r50", ["model.backbone.deformable_stages=[2,3,4]", "model.backbone.modulated=true"]
    ).model
    rules = build_rules(model, 3)
    for name in ("conv2_offset", "conv2.conv_offset", "conv2.conv_offset_mask"):
        renamed = rename_weight(f"backbone.layer2.0.{name}.weight", rules)
        assert renamed == "backbone.body.layer2.0.conv2.offset.weight"


def test_averaged_weights_and_wrappers(tmp_path: Path) -> None:
    """Averaged weights have the plain names; raw weights, optimizer and training state are left out."""
    spec = load_case("retinanet_r18_gn")
    state = make_weights("retinanet_r18_gn")
    raw = {f"module.{k}": v + 1 for k, v in state.items()} | {"steps": torch.tensor(3)}
    buffers = {f"ema_{k.replace('.', '_')}": v + 1 for k, v in state.items()}
    wrapped = {f"module.{k}": v for k, v in state.items()}
    for content in (
        {"state_dict": state, "ema_state_dict": raw, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
        {"state_dict": state | buffers},
        {"state_dict": wrapped},
        {"ema_state_dict": wrapped | {"steps": torch.tensor(3)}},
    ):
        weights = extract_weights(content, "model.pth")
        assert weights.keys() == state.keys()
        assert all(torch.equal(weights[k], state[k]) for k in state)
    plain = convert(tmp_path, {"state_dict": state}, spec["model"]).weights
    # Old versions of torch have no batch counters.
    old = {"state_dict": {k: v for k, v in state.items() if "num_batches_tracked" not in k}}
    weights = convert(tmp_path, old, spec["model"]).weights
    assert weights.keys() == plain.keys()
    assert all(torch.equal(weights[k], plain[k]) for k in plain)


def test_class_names() -> None:
    default = [f"class_{i}" for i in range(5)]
    for meta, names in (
        ({"dataset_meta": {"CLASSES": ["a", "b", "c", "d", "e"]}}, ["a", "b", "c", "d", "e"]),
        ({"CLASSES": ("p", "q", "r", "s", "t")}, ["p", "q", "r", "s", "t"]),
        ({"CLASSES": ("p", "q")}, default),
        ({}, default),
    ):
        assert resolve_class_names(meta, 5, []) == (names, [1, 2, 3, 4, 5])


def test_config_in_the_checkpoint(tmp_path: Path) -> None:
    """By default the copy of the config that MMDetection stores in the checkpoint is used."""
    spec = load_case("retinanet_r18_gn")
    state = make_weights("retinanet_r18_gn")
    given = convert(tmp_path, {"state_dict": state}, spec["model"])
    for key in ("cfg", "config"):
        inside = convert(tmp_path, {"state_dict": state, "meta": {key: f"model = {spec['model']!r}"}}, None)
        assert inside.config == given.config


def test_config_of_this_project(tmp_path: Path) -> None:
    spec = load_case("retinanet_r18_gn")
    torch.save(make_weights("retinanet_r18_gn"), tmp_path / "model.pth")
    overrides = ["model.pyramid.channels=64", "model.head.norm=true", "model.head.bias=false"]
    converted = convert_checkpoint(tmp_path / "model.pth", "retinanet_r18", overrides)
    assert_same(predict(converted, spec["size"]), spec["predictions"])
    assert not converted.config.data.antialias
    assert convert_checkpoint(
        tmp_path / "model.pth", "retinanet_r18", [*overrides, "data.antialias=true"]
    ).config.data.antialias
    text = f"model = {spec['model']!r}\ntest_pipeline = {make_resize(backend='pillow')['test_pipeline']!r}"
    torch.save({"state_dict": make_weights("retinanet_r18_gn"), "meta": {"cfg": text}}, tmp_path / "model.pth")
    assert convert_checkpoint(tmp_path / "model.pth", "retinanet_r18", overrides).config.data.antialias


def make_resize(**options: Any) -> Any:
    return {"test_pipeline": [{"type": "Resize", "scale": (1333, 800), **options}, {"type": "PackDetInputs"}]}


AUGMENTED = {"type": "MultiScaleFlipAug", "img_scale": (1000, 600)}


@pytest.mark.parametrize(
    ("config", "size", "antialias", "notes"),
    [
        ({}, None, False, []),
        (make_resize(keep_ratio=True), [800, 1333], False, []),
        (make_resize(keep_ratio=True, backend="pillow"), [800, 1333], True, []),
        (
            make_resize(keep_ratio=True, interpolation="area"),
            [800, 1333],
            False,
            ["images were resized by 'area', here bilinear"],
        ),
        (make_resize(keep_ratio=False), [800, 1333], False, ["images were stretched to 1333 x 800"]),
        (make_resize(), [800, 1333], False, ["images were stretched to 1333 x 800"]),
        ({"test_pipeline": [{"type": "Resize", "img_scale": (1333, 800)}]}, [800, 1333], False, []),
        (
            {"test_pipeline": [AUGMENTED | {"transforms": [{"type": "Resize", "backend": "pillow"}]}]},
            [600, 1000],
            True,
            [],
        ),
    ],
)
def test_resizing_of_the_test_pipeline(config: Any, size: Any, antialias: bool, notes: list[str]) -> None:
    seen: list[str] = []
    assert read_resizing(config, seen) == ({"size": size} if size else {}) | {"antialias": antialias}
    assert [text.split(", here their")[0] for text in seen] == notes


def test_duplicates_need_two_counterparts() -> None:
    """Two different detections do not match the same one twice."""
    theirs = {"boxes": [[0, 0, 9, 9], [0, 0, 9, 9.08]], "scores": [0.5, 0.5], "labels": [1, 1]}
    assert_same(Detections(torch.tensor(theirs["boxes"]), torch.tensor([0.5, 0.5]), torch.tensor([1, 1])), theirs)
    between = Detections(
        torch.tensor([[0, 0, 9, 9.04], [0, 0, 9, 9.2]]), torch.tensor([0.5, 0.5]), torch.tensor([1, 1])
    )
    with pytest.raises(AssertionError):
        assert_same(between, theirs)


OTHER_BACKBONE = r"of --config=retinanet_r50 is not what the checkpoint was trained with"


def test_style_and_normalization_come_from_the_checkpoint(tmp_path: Path) -> None:
    """Settings that weights do not show come from the config in the checkpoint, even with a config of this project."""
    spec = load_case("retinanet_r50_caffe")
    state = make_weights("retinanet_r50_caffe")
    meta = NAMED | {"cfg": f"model = {spec['model']!r}"}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "model.pth")
    overrides = [f"model.pyramid.channels={spec['model']['neck']['out_channels']}"]
    own, named = (
        convert_checkpoint(tmp_path / "model.pth"),
        convert_checkpoint(tmp_path / "model.pth", "retinanet_r50", overrides),
    )
    assert named.config.model.backbone["style"] == own.config.model.backbone["style"] == "caffe"
    for key in ("mean", "std"):
        assert list(named.config.model.backbone[key]) == list(own.config.model.backbone[key])
    assert all(torch.equal(named.weights[key], own.weights[key]) for key in own.weights)
    assert torch.equal(named.weights["backbone.body.conv1.weight"], state["backbone.conv1.weight"].flip(1))
    assert any("of the checkpoint's own config" in note for note in named.notes)
    with pytest.raises(InputError, match=OTHER_BACKBONE):
        convert_checkpoint(tmp_path / "model.pth", "retinanet_r50", [*overrides, "model.backbone.style=pytorch"])
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    assumed = convert_checkpoint(tmp_path / "model.pth", "retinanet_r50", overrides)
    assert any("RGB" in note and "caffe" in note for note in assumed.notes)
    assert "style" not in assumed.config.model.backbone


@pytest.mark.slow
def test_another_normalization_than_the_checkpoint_is_refused(tmp_path: Path) -> None:
    """As another style is."""
    spec = load_case("retinanet_r50_caffe")
    meta = NAMED | {"cfg": f"model = {spec['model']!r}"}
    torch.save({"state_dict": make_weights("retinanet_r50_caffe"), "meta": meta}, tmp_path / "model.pth")
    channels = f"model.pyramid.channels={spec['model']['neck']['out_channels']}"
    with pytest.raises(InputError, match=OTHER_BACKBONE):
        convert_checkpoint(
            tmp_path / "model.pth", "retinanet_r50", [channels, "model.backbone.std=[58.395,57.12,57.375]"]
        )


@pytest.mark.parametrize("generator", ["AnchorGenerator", "LegacyAnchorGenerator"])
def test_later_config_for_a_1x_checkpoint(tmp_path: Path, generator: str) -> None:
    """The config's anchor generator decides about the last pixel of boxes, and the note agrees."""
    spec = load_case("retinanet_r18_gn")
    model = alter(spec["model"], "bbox_head.anchor_generator.type", generator)
    if generator == "LegacyAnchorGenerator":
        model = alter(model, "bbox_head.anchor_generator.center_offset", 0.5)
    old = {"state_dict": make_weights("retinanet_r18_gn"), "meta": {"mmdet_version": "1.2.0"}}
    converted = convert(tmp_path, old, model)
    last = any("include their last pixel" in note for note in converted.notes)
    assert last == (generator == "LegacyAnchorGenerator") == (converted.config.model.head.get("offset") == 0.5)
    assert last or any("LegacyAnchorGenerator" in note for note in converted.notes)


def alter(model: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Copy a config with another value at a dotted path."""
    copy = json.loads(json.dumps(model))
    *above, last = path.split(".")
    inner = copy
    for key in above:
        inner = inner.setdefault(key, {})
    inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("fcos_r50_caffe_dcn", "backbone.stage_with_dcn", 3, r"model\.backbone\.stage_with_dcn must be a list"),
        ("fcos_r50_caffe_dcn", "backbone.stage_with_dcn", [True], r"stage_with_dcn=\[True\] must have four items"),
        ("fcos_r50_caffe_dcn", "bbox_head.regress_ranges", 5, r"bbox_head\.regress_ranges must be a list"),
        ("fcos_r50_caffe_dcn", "bbox_head.regress_ranges", [1, 2], r"bbox_head\.regress_ranges\.0 must be"),
        ("retinanet_r18_gn", "backbone.norm_eval", "False", r"backbone\.norm_eval must be bool"),
        ("retinanet_r18_gn", "neck.add_extra_convs", [1], r"neck\.add_extra_convs must be"),
        ("retinanet_r18_gn", "neck.num_outs", 10**6, r"neck\.num_outs=1000000 must be from 1 to 16"),
        ("retinanet_r18_gn", "bbox_head.stacked_convs", 10**5, r"stacked_convs=100000 must be from 0 to 100"),
        ("retinanet_r18_gn", "test_cfg", 3, r"model\.test_cfg must be a mapping"),
        ("retinanet_r18_gn", "test_cfg.score_thr", 10**400, r"test_cfg\.score_thr must lie between"),
        (
            "mask_rcnn_r18",
            "roi_head.bbox_roi_extractor.roi_layer.output_size",
            [],
            r"roi_layer\.output_size=\[\] must be one side",
        ),
        (
            "mask_rcnn_r18",
            "roi_head.bbox_roi_extractor.roi_layer.output_size",
            [],
            r"output_size=\[\] must be one side",
        ),
        ("mask_rcnn_r18", "roi_head.bbox_head.with_reg", 3, r"bbox_head\.with_reg must be bool"),
        ("cascade_mask_rcnn_r18", "roi_head.num_stages", 10**9, r"num_stages=1000000000 must be from 1 to 16"),
        ("grid_rcnn_r18", "roi_head.grid_head.grid_points", -1, r"grid_points=-1 must be from 1"),
    ],
)
def test_wrong_values_of_a_config(name: str, path: str, value: Any, message: str) -> None:
    model = load_case(name)["model"]
    if path == "roi_head.num_stages":  # is used if one mapping is for all stages
        model = alter(model, "roi_head.bbox_head", model["roi_head"]["bbox_head"][0])
    with pytest.raises(InputError, match=message):
        convert_config({"model": alter(model, path, value)}, {})


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("bbox_head.retina_reg.weight", ()),
        ("bbox_head.retina_cls.weight", (0,)),
        ("backbone.layer1.0.conv2.weight", ()),
    ],
)
def test_weights_without_axes(tmp_path: Path, with_config: bool, key: str, shape: tuple[int, ...]) -> None:
    spec = load_case("libra_retinanet_r18")
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        convert(
            tmp_path,
            {"state_dict": make_weights("libra_retinanet_r18") | {key: torch.zeros(shape)}},
            spec["model"] if with_config else None,
        )


def test_scalar_weights_are_refused(tmp_path: Path) -> None:
    """Any weight without axes is reported, in 1.x checkpoints too."""
    state = rename_to_1x(make_weights("mask_rcnn_r18"))
    for key in (
        "bbox_head.fc_cls.bias",
        "mask_head.conv_logits.bias",
        "rpn_head.rpn_cls.weight",
        "neck.lateral_convs.0.conv.weight",
    ):
        with pytest.raises(InputError, match=key.rpartition(".")[0].replace(".", r"\.")):
            convert(tmp_path, {"state_dict": state | {key: torch.tensor(1.0)}}, None)


def test_other_balanced_l1_loss_is_noted() -> None:
    spec = load_case("libra_rcnn_r18")
    loss = {"type": "BalancedL1Loss", "alpha": 0.3, "gamma": 1.5, "beta": 1.0, "loss_weight": 1.0}
    notes = convert_config({"model": alter(spec["model"], "roi_head.bbox_head.loss_bbox", loss)}, {}).notes
    assert any("alpha=0.3" in note for note in notes)
    assert not any("alpha" in note for note in convert_config({"model": spec["model"]}, {}).notes)
