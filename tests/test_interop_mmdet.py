"""MMDetection's checkpoints: whole models of its, converted, see what they saw there."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco_mask
from torch import Tensor

from fusedet.errors import InputError
from fusedet.interop import ConvertedCheckpoint, convert_checkpoint
from fusedet.interop.mmdetection.backbone_config import read_resizing
from fusedet.interop.mmdetection.detector_config import convert_config
from fusedet.models.detectors import build_detector
from fusedet.models.heads import RPNHead
from fusedet.types import Batch, Detections, Levels
from partners import partners

FOLDER = Path(__file__).with_name("parity")
CASES = sorted(path.stem for path in (FOLDER / "checkpoints").glob("*.json"))
FILLED = runpy.run_path(str(FOLDER / "filled.py"))
# those of which names and shapes tell all; not BGR and its mean, the place of a stride, norm_on_bbox, Dynamic R-CNN's suppression
TOLD = [
    "libra_retinanet_r18",
    "vfnet_r50_mdconv",
    "reppoints_r18_gn",
    "faster_rcnn_r18_pafpn",
    "faster_rcnn_x50_dconv",
    "cascade_mask_rcnn_r18",
    "grid_rcnn_r18",
]


def case(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / "checkpoints" / f"{name}.json").read_text())


def weights(spec: dict[str, Any]) -> dict[str, Tensor]:
    return {k: torch.from_numpy(np.array(FILLED["fill"](k, tuple(s), spec["stem"]))) for k, s in spec["keys"].items()}


def converted(
    tmp_path: Path, content: dict[str, Any], model: dict[str, Any] | None, *overrides: str
) -> ConvertedCheckpoint:
    torch.save(content, tmp_path / "model.pth")
    if model is not None:
        (tmp_path / "config.py").write_text(f"model = {model!r}")
    return convert_checkpoint(
        tmp_path / "model.pth", str(tmp_path / "config.py") if model is not None else None, overrides
    )


def seen(found: ConvertedCheckpoint, size: tuple[int, int]) -> Detections:
    detector = build_detector(found.config, len(found.names)).eval()
    detector.load_state_dict(found.weights)
    height, width = size
    padded = torch.zeros(1, 3, -(-height // 32) * 32, -(-width // 32) * 32, dtype=torch.uint8)
    padded[0, :, :height, :width] = torch.from_numpy(FILLED["image"](height, width)).permute(2, 0, 1)
    return detector.predict(Batch(padded, torch.tensor([[height, width]]), (0,), torch.ones(1, 2)))[0]


def agree(ours: Detections, theirs: dict[str, Any]) -> None:
    """The same set: every detection of either side has a partner of its own on the other, with its box, score, label and mask."""
    boxes, scores, labels = (torch.tensor(theirs[key]) for key in ("boxes", "scores", "labels"))
    close = (ours.boxes[:, None] - boxes).abs().amax(dim=2) <= 0.05
    close &= (ours.scores[:, None] - scores).abs() <= 2e-4
    close &= ours.labels[:, None] == labels
    assert len(ours) == len(boxes)
    for i, code in enumerate(theirs.get("masks", [])):  # of every tenth detection
        assert ours.masks is not None
        mask = torch.from_numpy(coco_mask.decode({"size": list(ours.masks.shape[1:]), "counts": code.encode()})).bool()
        close[:, 10 * i] &= (ours.masks ^ mask).sum(dim=(1, 2)) <= 1 + 1e-3 * int(mask.sum())
    assert -1 not in partners(close)


@pytest.mark.parametrize("name", CASES)
def test_the_same_detections(tmp_path: Path, name: str) -> None:
    spec = case(name)
    content = {"state_dict": weights(spec), "meta": {"dataset_meta": {"classes": ("a", "b", "c", "d", "e")}}}
    found = converted(tmp_path, content, spec["model"])
    assert len(set(found.names)) == 5
    assert not found.notes or name == "libra_retinanet_r18"  # whose loss RetinaNet has not here
    agree(seen(found, spec["size"]), spec["predictions"])


@pytest.mark.parametrize("name", TOLD)
def test_told_from_the_weights_alone(tmp_path: Path, name: str) -> None:
    """Without a config the detector is the same, and what cannot be told is said."""
    spec = case(name)
    found = converted(tmp_path, weights(spec), None)
    assert any("no config" in note for note in found.notes)
    agree(seen(found, spec["size"]), spec["predictions"])


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A two-stage state dict as the 1.x line would have it, with known rows for background."""
    found = {}
    for key, value in state.items():
        layer = key.rpartition(".")[0]
        if layer.endswith("fc_cls"):  # background first
            value = torch.cat([value[-1:], value[:-1]])
        elif layer.endswith("fc_reg") and len(value) > 4:
            value = torch.cat([torch.full_like(value[:4], 7.0), value])
        elif layer.endswith("conv_logits"):
            value = torch.cat([torch.full_like(value[:1], 7.0), value])
        found[key.removeprefix("roi_head.")] = value
    return found


@pytest.mark.parametrize("name", ["mask_rcnn_r18", "cascade_mask_rcnn_r18"])
def test_the_1x_line_has_background_first(tmp_path: Path, name: str) -> None:
    state = weights(case(name))
    today = converted(tmp_path, {"state_dict": state}, None)
    old = converted(tmp_path, {"state_dict": old_names(state), "meta": {"mmdet_version": "1.2.0+7d0f5ce"}}, None)
    assert len(old.names) == 5
    assert old.weights.keys() == today.weights.keys()
    assert all(torch.equal(old.weights[k], today.weights[k]) for k in old.weights)
    assert any("1.x" in note for note in old.notes)
    head, roi = old.config.model.head, old.config.model.roi
    assert (head["offset"], head["round_anchors"]) == (0.5, True)
    assert all(
        part["pooling"] == {"type": "level", "samples": 2, "aligned": False} for part in roi["stages"] + roi["branches"]
    )
    assert "offset" not in today.config.model.head


def test_1x_config_and_names(tmp_path: Path) -> None:
    """A config of the 1.x line: heads beside each other, anchors in the head, thresholds outside the model."""
    state = weights(case("mask_rcnn_r18"))
    extractor = {
        "type": "SingleRoIExtractor",
        "roi_layer": {"type": "RoIAlign", "out_size": 7, "sample_num": 2},
        "featmap_strides": [4, 8, 16, 32],
    }
    model = {
        "type": "MaskRCNN",
        "pretrained": "torchvision://resnet18",
        "backbone": {
            "type": "ResNet",
            "depth": 18,
            "num_stages": 4,
            "out_indices": (0, 1, 2, 3),
            "frozen_stages": 1,
            "style": "pytorch",
        },
        "neck": {"type": "FPN", "in_channels": [64, 128, 256, 512], "out_channels": 64, "num_outs": 5},
        "rpn_head": {
            "type": "RPNHead",
            "in_channels": 64,
            "feat_channels": 64,
            "anchor_scales": [8],
            "anchor_ratios": [0.5, 1.0, 2.0],
            "anchor_strides": [4, 8, 16, 32, 64],
            "target_means": [0.0, 0.0, 0.0, 0.0],
            "target_stds": [1.0, 1.0, 1.0, 1.0],
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": True},
            "loss_bbox": {"type": "SmoothL1Loss", "beta": 1 / 9},
        },
        "bbox_roi_extractor": extractor,
        "bbox_head": {
            "type": "SharedFCBBoxHead",
            "num_fcs": 2,
            "in_channels": 64,
            "fc_out_channels": 128,
            "roi_feat_size": 7,
            "num_classes": 6,
            "target_means": [0.0, 0.0, 0.0, 0.0],
            "target_stds": [0.1, 0.1, 0.2, 0.2],
            "reg_class_agnostic": False,
        },
        "mask_roi_extractor": extractor | {"roi_layer": {"type": "RoIAlign", "out_size": 14, "sample_num": 2}},
        "mask_head": {
            "type": "FCNMaskHead",
            "num_convs": 4,
            "in_channels": 64,
            "conv_out_channels": 64,
            "num_classes": 6,
        },
    }
    text = f"model = {model!r}\ntest_cfg = dict(rpn=dict(nms_pre=900, max_num=800, nms_thr=0.6), rcnn=dict(score_thr=0.1, max_per_img=70))\n"
    text += "img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)\n"
    text += "test_pipeline = [dict(type='MultiScaleFlipAug', img_scale=(1000, 600), transforms=[dict(type='Normalize', **img_norm_cfg)])]\n"
    (tmp_path / "old.py").write_text(text)
    torch.save({"state_dict": old_names(state), "meta": {"CLASSES": ("v", "w", "x", "y", "z")}}, tmp_path / "old.pth")
    found = convert_checkpoint(tmp_path / "old.pth", str(tmp_path / "old.py"))
    assert found.names == ["v", "w", "x", "y", "z"]
    assert (found.config.data.size, found.config.data.antialias) == ((600, 1000), False)
    test, head = found.config.test, found.config.model.head
    assert (test.score, test.max_det, test.pre_nms, head["nms"], head["proposals"]) == (0.1, 70, 900, 0.6, 800)
    assert (head["offset"], head["round_anchors"]) == (0.5, True)
    body = found.config.model.backbone
    assert body["mean"] == [122.7717, 115.9465, 102.9801]
    assert torch.equal(found.weights["backbone.body.conv1.weight"], state["backbone.conv1.weight"].flip(1))


def test_anchors_of_the_1x_line() -> None:
    """1.x counted a box's last pixel in, and had a cell's anchors around its middle: here the same, one pixel longer to the right."""
    head = RPNHead(Levels((8,) * 2, (4, 16)), scale=8.0, offset=0.5, round_anchors=True)
    features = [torch.zeros(1, 8, 2, 3), torch.zeros(1, 8, 1, 1)]
    priors = head(features).priors.boxes
    wanted = []
    for stride, (height, width) in ((4, (2, 3)), (16, (1, 1))):
        for y in range(height):
            for x in range(width):
                for ratio in (0.5, 1.0, 2.0):
                    w, h, centre = stride * 8 / ratio**0.5, stride * 8 * ratio**0.5, 0.5 * (stride - 1)
                    box = [
                        centre - 0.5 * (w - 1),
                        centre - 0.5 * (h - 1),
                        centre + 0.5 * (w - 1),
                        centre + 0.5 * (h - 1),
                    ]
                    wanted.append(
                        [
                            round(v) + shift
                            for v, shift in zip(box, (x * stride, y * stride, x * stride + 1, y * stride + 1))
                        ]
                    )
    assert torch.equal(priors, torch.tensor(wanted, dtype=torch.float32))


def test_spellings_of_deformable_offsets(tmp_path: Path) -> None:
    """1.0 had the offsets beside the convolution, later lines have them inside, modulated ones under another name for a while."""
    spec = case("vfnet_r50_mdconv")
    state = weights(spec)
    today = converted(tmp_path, {"state_dict": state}, spec["model"])
    for name in ("conv2_offset.", "conv2.conv_offset_mask."):
        old = {key.replace("conv2.conv_offset.", name): value for key, value in state.items()}
        found = converted(tmp_path, {"state_dict": old}, spec["model"])
        assert all(torch.equal(found.weights[k], v) for k, v in today.weights.items())


def test_averaged_weights_and_wrappers(tmp_path: Path) -> None:
    """The averaged weights stand under the plain names; the others, the optimiser and the loop's own things are left out."""
    spec = case("retinanet_r18_gn")
    state = weights(spec)
    plain = converted(tmp_path, {"state_dict": state}, spec["model"]).weights
    raw = {f"module.{k}": v + 1 for k, v in state.items()} | {"steps": torch.tensor(3)}
    buffers = {f"ema_{k.replace('.', '_')}": v + 1 for k, v in state.items()}
    wrapped = {f"module.{k}": v for k, v in state.items()}
    for content in (
        {"state_dict": state, "ema_state_dict": raw, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}}},
        {"state_dict": state | buffers},
        {"state_dict": wrapped},
        {"ema_state_dict": wrapped | {"steps": torch.tensor(3)}},
        {"state_dict": {k: v for k, v in state.items() if "num_batches_tracked" not in k}},  # before torch had these
    ):
        found = converted(tmp_path, content, spec["model"]).weights
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[k], plain[k]) for k in plain)


def test_classes_by_name(tmp_path: Path) -> None:
    spec = case("retinanet_r18_gn")
    state = weights(spec)
    for meta, names in (
        ({"dataset_meta": {"CLASSES": ["a", "b", "c", "d", "e"]}}, ["a", "b", "c", "d", "e"]),
        ({"CLASSES": ("p", "q", "r", "s", "t")}, ["p", "q", "r", "s", "t"]),
        ({"CLASSES": ("p", "q")}, [f"class_{i}" for i in range(5)]),
        ({}, [f"class_{i}" for i in range(5)]),
    ):
        found = converted(tmp_path, {"state_dict": state, "meta": meta}, spec["model"])
        assert found.names == names
        assert found.category_ids == [1, 2, 3, 4, 5]


def test_the_config_in_the_checkpoint(tmp_path: Path) -> None:
    """Where no config is given, the copy that MMDetection leaves in the checkpoint is read."""
    spec = case("fcos_r50_caffe_dcn")
    state = weights(spec)
    given = converted(tmp_path, {"state_dict": state}, spec["model"])
    for key in ("cfg", "config"):
        inside = converted(tmp_path, {"state_dict": state, "meta": {key: f"model = {spec['model']!r}"}}, None)
        assert inside.config == given.config


def test_a_config_of_this_project(tmp_path: Path) -> None:
    spec = case("retinanet_r18_gn")
    torch.save(weights(spec), tmp_path / "model.pth")
    words = ["model.pyramid.channels=64", "model.head.norm=true", "model.head.bias=false"]
    found = convert_checkpoint(tmp_path / "model.pth", "retinanet_r18", words)
    agree(seen(found, spec["size"]), spec["predictions"])
    assert not found.config.data.antialias
    assert convert_checkpoint(
        tmp_path / "model.pth", "retinanet_r18", [*words, "data.antialias=true"]
    ).config.data.antialias
    text = f"model = {spec['model']!r}\ntest_pipeline = {resize(backend='pillow')['test_pipeline']!r}"
    torch.save({"state_dict": weights(spec), "meta": {"cfg": text}}, tmp_path / "model.pth")
    assert convert_checkpoint(tmp_path / "model.pth", "retinanet_r18", words).config.data.antialias


def resize(**words: Any) -> Any:
    return {"test_pipeline": [{"type": "Resize", "scale": (1333, 800), **words}, {"type": "PackDetInputs"}]}


@pytest.mark.parametrize(
    ("config", "data", "note"),
    [
        ({}, {"antialias": False}, None),
        (resize(keep_ratio=True), {"size": [800, 1333], "antialias": False}, None),
        (resize(backend="pillow"), {"size": [800, 1333], "antialias": True}, None),
        (
            resize(interpolation="area"),
            {"size": [800, 1333], "antialias": False},
            "images were resized by 'area', here bilinearly",
        ),
        (
            {
                "test_pipeline": [
                    {
                        "type": "MultiScaleFlipAug",
                        "img_scale": (1000, 600),
                        "transforms": [{"type": "Resize", "backend": "pillow"}],
                    }
                ]
            },
            {"size": [600, 1000], "antialias": True},
            None,
        ),
        (resize(keep_ratio=False), {"size": [800, 1333], "antialias": False}, "images were stretched to 1333 x 800"),
    ],
)
def test_how_images_are_resized(config: Any, data: Any, note: str | None) -> None:
    notes: list[str] = []
    assert read_resizing(config, notes) == data
    assert [text.split(", here their")[0] for text in notes] == ([note] if note else [])


def test_twins_need_two_partners() -> None:
    """A detection that stands there twice is no partner of two that differ."""
    theirs = {"boxes": [[0, 0, 9, 9], [0, 0, 9, 9.08]], "scores": [0.5, 0.5], "labels": [1, 1]}
    agree(Detections(torch.tensor(theirs["boxes"]), torch.tensor([0.5, 0.5]), torch.tensor([1, 1])), theirs)
    between = Detections(
        torch.tensor([[0, 0, 9, 9.04], [0, 0, 9, 9.2]]), torch.tensor([0.5, 0.5]), torch.tensor([1, 1])
    )
    with pytest.raises(AssertionError):
        agree(between, theirs)


def test_a_name_takes_style_and_pixels_from_the_checkpoint(tmp_path: Path) -> None:
    """What weights do not show comes from MMDetection's config in the checkpoint, whatever config of this project is named."""
    spec = case("retinanet_r50_caffe")
    state = weights(spec)
    meta = {"cfg": f"model = {spec['model']!r}", "dataset_meta": {"classes": ("a", "b", "c", "d", "e")}}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "model.pth")
    words = [f"model.pyramid.channels={spec['model']['neck']['out_channels']}"]
    own, named = (
        convert_checkpoint(tmp_path / "model.pth"),
        convert_checkpoint(tmp_path / "model.pth", "retinanet_r50", words),
    )
    assert named.config.model.backbone["style"] == own.config.model.backbone["style"] == "caffe"
    for key in ("mean", "std"):
        assert list(named.config.model.backbone[key]) == list(own.config.model.backbone[key])
    assert all(torch.equal(named.weights[key], own.weights[key]) for key in own.weights)
    assert torch.equal(named.weights["backbone.body.conv1.weight"], state["backbone.conv1.weight"].flip(1))
    assert any("of the checkpoint's own config" in note for note in named.notes)
    for word in ("model.backbone.style=pytorch", "model.backbone.std=[58.395,57.12,57.375]"):
        with pytest.raises(InputError, match=r"of --config=retinanet_r50 is not what the checkpoint was trained with"):
            convert_checkpoint(tmp_path / "model.pth", "retinanet_r50", [*words, word])
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    blind = convert_checkpoint(tmp_path / "model.pth", "retinanet_r50", words)
    assert any("RGB" in note and "caffe" in note for note in blind.notes)
    assert "style" not in blind.config.model.backbone


@pytest.mark.parametrize("generator", ["AnchorGenerator", "LegacyAnchorGenerator"])
def test_a_later_config_for_the_1x_line(tmp_path: Path, generator: str) -> None:
    """The config's class decides where boxes end, and the note says the same."""
    spec = case("retinanet_r18_gn")
    model = json.loads(json.dumps(spec["model"]))
    model["bbox_head"]["anchor_generator"] |= {"type": generator} | (
        {"center_offset": 0.5} if generator.startswith("L") else {}
    )
    old = {"state_dict": weights(spec), "meta": {"mmdet_version": "1.2.0"}}
    found = converted(tmp_path, old, model)
    last = any("include their last pixel" in note for note in found.notes)
    assert last == (generator == "LegacyAnchorGenerator") == (found.config.model.head.get("offset") == 0.5)
    assert last or any("LegacyAnchorGenerator" in note for note in found.notes)


def altered(model: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a config with another value at a dotted path."""
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
        ("retinanet_r18_gn", "test_cfg.score_thr", 10**400, r"test_cfg\.score_thr=1\d* must be a number"),
        (
            "mask_rcnn_r18",
            "roi_head.bbox_roi_extractor.roi_layer.output_size",
            [],
            r"roi_layer\.output_size=\[\] must be one side",
        ),
        ("mask_rcnn_r18", "roi_head.bbox_head.with_reg", 3, r"bbox_head\.with_reg must be bool"),
        ("cascade_mask_rcnn_r18", "roi_head.num_stages", 10**9, r"num_stages=1000000000 must be from 1 to 16"),
        ("grid_rcnn_r18", "roi_head.grid_head.grid_points", -1, r"grid_points=-1 must be from 1"),
    ],
)
def test_values_of_another_type(name: str, path: str, value: Any, message: str) -> None:
    model = case(name)["model"]
    if path == "roi_head.num_stages":  # counts where one mapping stands for all stages
        model = altered(model, "roi_head.bbox_head", model["roi_head"]["bbox_head"][0])
    with pytest.raises(InputError, match=message):
        convert_config({"model": altered(model, path, value)}, {})


@pytest.mark.parametrize("told", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize(
    "key", ["bbox_head.retina_reg.weight", "bbox_head.retina_cls.weight", "backbone.layer1.0.conv2.weight"]
)
@pytest.mark.parametrize("shape", [(), (0,)])
def test_weights_without_axes(tmp_path: Path, told: bool, key: str, shape: tuple[int, ...]) -> None:
    spec = case("libra_retinanet_r18")
    with pytest.raises(InputError, match=key.replace(".", r"\.")):
        converted(tmp_path, {"state_dict": weights(spec) | {key: torch.zeros(shape)}}, spec["model"] if told else None)


def test_the_whole_of_a_state_may_be_odd(tmp_path: Path) -> None:
    """Any one weight without axes is told of, in the 1.x line as well."""
    state = old_names(weights(case("mask_rcnn_r18")))
    for key in (
        "bbox_head.fc_cls.bias",
        "mask_head.conv_logits.bias",
        "rpn_head.rpn_cls.weight",
        "neck.lateral_convs.0.conv.weight",
    ):
        with pytest.raises(InputError, match=key.rpartition(".")[0].replace(".", r"\.")):
            converted(tmp_path, {"state_dict": state | {key: torch.tensor(1.0)}}, None)


def test_another_balanced_loss_is_said() -> None:
    spec = case("libra_rcnn_r18")
    loss = {"type": "BalancedL1Loss", "alpha": 0.3, "gamma": 1.5, "beta": 1.0, "loss_weight": 1.0}
    notes = convert_config({"model": altered(spec["model"], "roi_head.bbox_head.loss_bbox", loss)}, {}).notes
    assert any("alpha=0.3" in note for note in notes)
    assert not any("alpha" in note for note in convert_config({"model": spec["model"]}, {}).notes)
