"""torchvision's detectors with untrained weights have the same detections after conversion."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection, resnet18
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.retinanet import RetinaNetHead, _default_anchorgen
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fusedet.errors import InputError
from fusedet.interop import ConvertedCheckpoint, convert_checkpoint
from fusedet.models.detectors import build_detector
from fusedet.types import Batch, Detections
from partners import partners

SIZE = (128, 256)  # for other sizes, torchvision's anchors of P6 and P7 are not a stride apart
OPTIONS = {"min_size": SIZE[0], "max_size": SIZE[1]}


def make_dense_backbone(v2: bool = False) -> nn.Module:
    """ResNet-18 with a pyramid P3 to P7."""
    return _resnet_fpn_extractor(
        resnet18(), 5, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(512 if v2 else 256, 256)
    )


def retinanet(v2: bool) -> nn.Module:
    if not v2:
        return detection.RetinaNet(make_dense_backbone(), 7, **OPTIONS)
    head = RetinaNetHead(256, 9, 7, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    return detection.RetinaNet(
        make_dense_backbone(v2=True), 7, anchor_generator=_default_anchorgen(), head=head, **OPTIONS
    )


def two_stage(v2: bool, masks: bool) -> nn.Module:
    backbone = _resnet_fpn_extractor(resnet18(), 5, norm_layer=nn.BatchNorm2d if v2 else None)
    parts = {}
    if v2:
        parts["rpn_head"] = RPNHead(256, 3, conv_depth=2)
        parts["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=nn.BatchNorm2d)
        if masks:
            parts["mask_head"] = MaskRCNNHeads(256, [256] * 4, 1, norm_layer=nn.BatchNorm2d)
    return (detection.MaskRCNN if masks else detection.FasterRCNN)(
        backbone, 6, rpn_post_nms_top_n_test=200, **parts, **OPTIONS
    )


MODELS = {
    "retinanet": lambda: retinanet(False),
    "retinanet_v2": lambda: retinanet(True),
    "fcos": lambda: detection.FCOS(make_dense_backbone(), 7, **OPTIONS),
    "fasterrcnn": lambda: two_stage(False, False),
    "fasterrcnn_v2": lambda: two_stage(True, False),
    "maskrcnn": lambda: two_stage(False, True),
    "maskrcnn_v2": lambda: two_stage(True, True),
}


def fill_weights(model: nn.Module) -> nn.Module:
    """Fill weights so that activations stay near one and most anchors are background."""
    for name, value in model.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(std=0.05)
        elif name.endswith("running_var"):
            value.uniform_(0.75, 1.25)
        elif value.ndim > 1:
            # Deltas stay below the bound that torchvision has for growing boxes only, this project for shrinking too.
            value.normal_(std=(0.3 if "bbox_pred" in name else 1.0) * value[0].numel() ** -0.5)
        elif name.endswith("weight"):
            value.normal_(1.0, 0.1).mul_(0.3 if name.endswith("bn2.weight") else 1.0)
        elif value.is_floating_point():
            value.normal_(-2.0 if "cls" in name else 0.0, 0.1)
    return model.eval()


def convert(model: nn.Module, folder: Path, name: str = "model.pth") -> ConvertedCheckpoint:
    torch.save(model.state_dict(), folder / name)
    return convert_checkpoint(folder / name, overrides=["model.head.proposals=200"] if hasattr(model, "rpn") else [])


def predict(converted: ConvertedCheckpoint, image: Tensor) -> Detections:
    detector = build_detector(converted.config, len(converted.names)).eval()
    detector.load_state_dict(converted.weights)
    return detector.predict(Batch(image[None], torch.tensor([SIZE]), (0,), torch.ones(1, 2)))[0]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if "rcnn" in n or n.endswith("_v2") else n for n in MODELS],
)
@torch.no_grad()
def test_same_detections(tmp_path: Path, name: str) -> None:
    model = fill_weights(MODELS[name]())
    converted = convert(model, tmp_path)
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)
    masks: list[Tensor] = []
    if name.startswith("maskrcnn"):
        model.roi_heads.mask_predictor.register_forward_hook(lambda *call: masks.append(call[2]))
    theirs = model([image / 255])[0]
    ours = predict(converted, image)
    assert not converted.config.data.antialias
    scores = ours.scores.sqrt() if name == "fcos" else ours.scores  # torchvision's FCOS scores are square roots
    background = 0 if name.startswith(("retinanet", "fcos")) else 1  # torchvision's label of background
    close = (theirs["boxes"][:, None] - ours.boxes).abs().amax(dim=2) <= 0.05
    close &= (theirs["scores"][:, None] - scores).abs() <= 1e-4
    close &= theirs["labels"][:, None] - background == ours.labels
    wh = theirs["boxes"][:, 2:] - theirs["boxes"][:, :2]
    real = (wh > 0).all(dim=1)  # torchvision's dense detectors keep clipped boxes without area
    assert real.sum() > 50
    pairs = partners(close[real])
    assert -1 not in pairs
    # Detections without area count in torchvision's limit, so ours continue below its last score.
    complete = bool(real.all()) or len(real) < converted.config.test.max_det
    last = 0.0 if complete else float(theirs["scores"].min())
    unpaired = set(range(len(ours))) - set(pairs)
    assert not [j for j in unpaired if scores[j] > last + 1e-4]
    assert len(ours) <= converted.config.test.max_det
    if masks:
        detector = build_detector(converted.config, len(converted.names)).eval()
        detector.load_state_dict(converted.weights)
        detections = detector.detect(image[None], torch.tensor([SIZE]))
        own = masks[0][torch.arange(len(close)), theirs["labels"]].sigmoid()
        for i in range(len(close)):
            j = int(close[i].nonzero()[0])
            assert float((own[i] - detections.masks[0, j]).abs().max()) <= 1e-3 or close[i].sum() > 1


def test_class_rows_of_coco(tmp_path: Path) -> None:
    """torchvision's 91 rows are category ids; those that COCO does not use are dropped."""
    model = fill_weights(detection.FCOS(make_dense_backbone(), 91, **OPTIONS))
    converted = convert(model, tmp_path)
    assert (len(converted.names), converted.names[11], converted.category_ids[11]) == (80, "stop sign", 13)
    assert torch.equal(
        converted.weights["head.cls.weight"][11], model.state_dict()["head.classification_head.cls_logits.weight"][13]
    )
    faster = two_stage(False, False)
    faster.roi_heads.box_predictor = detection.faster_rcnn.FastRCNNPredictor(1024, 91)
    state = fill_weights(faster).state_dict()
    converted = convert(faster, tmp_path)
    assert torch.equal(
        converted.weights["stages.0.cls.weight"][11], state["roi_heads.box_predictor.cls_score.weight"][13]
    )
    assert torch.equal(
        converted.weights["stages.0.cls.weight"][80], state["roi_heads.box_predictor.cls_score.weight"][0]
    )
    assert torch.equal(
        converted.weights["stages.0.reg.bias"][44:48], state["roi_heads.box_predictor.bbox_pred.bias"][52:56]
    )


def test_first_published_weights(tmp_path: Path) -> None:
    """The first published files have other names, frozen batch norms and no epsilon."""
    model = fill_weights(two_stage(False, False))
    state = {}
    for key, value in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            continue
        for kind in ("inner", "layer"):
            for i in range(4):
                key = key.replace(f"{kind}_blocks.{i}.0.", f"{kind}_blocks.{i}.")
        state[key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")] = value
    current = convert(model, tmp_path).weights
    torch.save(state, tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    first = convert_checkpoint(tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth")
    assert any("epsilon" in note for note in first.notes)
    for key, value in current.items():
        if key.endswith("running_var"):
            assert torch.allclose(first.weights[key] + 1e-5, value)
        elif not key.endswith("num_batches_tracked"):
            assert torch.equal(first.weights[key], value), key


def test_unsupported_models(tmp_path: Path) -> None:
    model = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    with pytest.raises(InputError, match="no ResNet or ResNeXt"):
        convert(model, tmp_path)
    torch.save(two_stage(False, False).state_dict(), tmp_path / "model.pth")
    with pytest.raises(InputError, match="leave --config out"):
        convert_checkpoint(tmp_path / "model.pth", "faster_rcnn_r18")
