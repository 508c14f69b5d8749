"""MMDetection's backbones on timm's models, HRFPN, GCNet's block, and an RPN without RoI head."""

from __future__ import annotations

import gzip
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fusedet import config as configs
from fusedet.errors import InputError
from fusedet.function_skipping import uninitialized
from fusedet.interop.conversion import convert_mmdetection_weights, count_classes
from fusedet.interop.mmdetection.backbone_config import convert_backbone, convert_plugins
from fusedet.interop.mmdetection.backbone_weights import backbone_rules, reorder_weights
from fusedet.interop.mmdetection.config_reader import ConfigReader
from fusedet.interop.mmdetection.detector_config import convert_config
from fusedet.interop.mmdetection.weight_names import rename_weight
from fusedet.models.backbones import TimmBackbone, insert_plugin
from fusedet.models.detectors import build_detector, create_model
from fusedet.models.heads import RPNHead
from fusedet.models.modules import ContextBlock, ContextBlockPlugin
from fusedet.models.necks import HRFPN
from fusedet.models.roi.box import BoxStage
from fusedet.types import Candidates, Levels

PARITY = Path(__file__).parent / "parity"
QUICK = ("regnet", "pvt_v2")
ALL = ("regnet", "hrnet", "resnest", "res2net", "group_norm", "context_block", "swin", "pvt_v2", "convnext")


def reader(values: dict[str, Any]) -> ConfigReader:
    return ConfigReader("model.backbone", values, [])


def make_index(window: int = 7) -> torch.Tensor:
    """MMDetection's index of relative positions in a window of Swin, which the recorded maps were computed with."""
    cells = torch.arange(window**2)
    places = cells // window * (2 * window - 1) + cells % window
    return (places[:, None] + places).flip(1)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in ALL])
def test_backbones_compute_the_maps_of_mmdetection(name: str) -> None:
    """Every weight has its counterpart, and samples of all maps agree with those that MMDetection computed."""
    recorded = json.loads(gzip.decompress((PARITY / "backbones.json.gz").read_bytes()))
    fixtures = runpy.run_path(str(PARITY / "filled.py"))
    case = recorded["cases"][name]
    options = convert_backbone(reader(case["config"]))
    with uninitialized():
        backbone = TimmBackbone(**options)
    if plugin := convert_plugins(reader(case["config"])):
        assert plugin.pop("type") == "context_block"
        insert_plugin(backbone, ContextBlockPlugin(**plugin))
    state = {
        key: make_index()
        if key.endswith("relative_position_index")
        else torch.from_numpy(fixtures["fill"](key, shape, 1.0))
        for key, shape in case["keys"].items()
    }
    rules = backbone_rules(options)
    renamed = {rename_weight(k, rules).removeprefix("backbone."): v for k, v in reorder_weights(state).items()}
    backbone.load_state_dict(renamed)
    pixels = torch.from_numpy(fixtures["image"](*recorded["size"])).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        maps = backbone.eval()((pixels - 127.5) / 64)
    assert [list(m.shape) for m in maps] == case["shapes"]
    for m, samples, largest in zip(maps, case["samples"], case["largest"]):
        step = m.numel() // recorded["samples"]
        values = m.flatten()[::step][: recorded["samples"]]
        assert torch.allclose(values, torch.tensor(samples), atol=2e-5 * largest + 1e-5)
        assert float(m.abs().max()) == pytest.approx(largest, rel=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "RegNet", "arch": "regnety_400mf"}, "regnety_400mf"),
        ({"type": "HRNet", "extra": {"stage2": {"num_channels": [20, 40]}}}, "must be one of 18"),
        ({"type": "ResNeSt", "depth": 50, "radix": 4, "stem_channels": 64}, "radix=4"),
        ({"type": "Res2Net", "depth": 50, "scales": 8}, "scales=8"),
        ({"type": "SwinTransformer", "window_size": 8}, "window_size=8"),
        ({"type": "PyramidVisionTransformer"}, "PyramidVisionTransformer is not supported"),
        ({"type": "PyramidVisionTransformerV2", "embed_dims": 48}, "embed_dims=48"),
        ({"type": "mmpretrain.ConvNeXt", "arch": "tiny", "use_grn": True}, "use_grn=True"),
    ],
)
def test_other_forms_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert_backbone(reader(values))


@pytest.mark.parametrize(("theirs", "ours"), [(-1, -1), (0, -1), (1, 1), (4, 4)])
def test_frozen_stages_of_convnext(theirs: int, ours: int) -> None:
    """There k freezes the stem and k stages, as here, but 0 nothing."""
    values = {"type": "mmpretrain.ConvNeXt", "arch": "tiny", "frozen_stages": theirs}
    assert convert_backbone(reader(values))["frozen_stages"] == ours


def test_plugins_other_than_a_context_block_are_refused() -> None:
    assert convert_plugins(reader({})) is None
    attention = {"cfg": {"type": "GeneralizedAttention"}, "position": "after_conv2"}
    with pytest.raises(InputError, match="GeneralizedAttention is not supported"):
        convert_plugins(reader({"plugins": [attention]}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "regnetx_002", "branch_maps": True}, "branch_maps=true"),
        ({"name": "resnet10t", "pool_first": False}, "no Res2Net"),
        ({"name": "resnet10t", "norm": "ln"}, "norm"),
    ],
)
def test_options_that_a_backbone_lacks(options: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(InputError, match=message):
        TimmBackbone(pretrained=False, **options)


def test_hrfpn_by_hand() -> None:
    """With identity convolutions a level is the mean over its cells of the sum of all maps, resized."""
    neck = HRFPN(Levels((1, 1, 1, 1), (4, 8, 16, 32)), channels=1, finest=2, coarsest=5)
    nn.init.ones_(neck.reduction.weight)
    for layer in neck.output:
        nn.init.dirac_(layer.weight)
    fine = torch.arange(64.0).reshape(1, 1, 8, 8)
    constants = [torch.full((1, 1, n, n), float(n)) for n in (4, 2, 1)]
    p2, p3, _, p5 = neck([fine, *constants])
    assert torch.equal(p2, fine + 7)
    assert p3[0, 0, 0].tolist() == [4.5 + 7, 6.5 + 7, 8.5 + 7, 10.5 + 7]
    assert float(p5.detach()) == 31.5 + 7


def test_context_block_by_hand() -> None:
    """With equal weights of all positions the context is their mean; at the start the block is the identity."""
    block, x = ContextBlock(4, 2), torch.randn(2, 4, 3, 5)
    assert torch.equal(block(x), x)
    nn.init.zeros_(block.mask.weight)
    nn.init.normal_(block.transform[3].weight)
    expected = x + block.transform(x.mean(dim=(2, 3), keepdim=True))
    assert torch.allclose(block(x), expected, atol=1e-6)
    assert not torch.allclose(block(x), x)


def test_norms_of_roi_convolutions() -> None:
    levels = Levels((32,) * 4, (4, 8, 16, 32))
    for norm, kind in (("gn", nn.GroupNorm), ("bn", nn.BatchNorm2d)):
        stage = BoxStage(levels, 3, convs=1, norm=norm, channels=8)
        assert isinstance(stage.convs[0][1], kind)
        assert stage.convs[0][0].bias is None
    with pytest.raises(InputError, match="multiples of 32"):
        BoxStage(Levels((16,) * 4, levels.strides), 3, convs=1, norm="gn")


def test_an_rpn_alone_detects_one_class() -> None:
    """NMS is among the boxes of one level; two levels may keep the same box."""
    head = RPNHead(Levels((8, 8), (8, 16)))
    boxes = torch.tensor([[[0.0, 0, 20, 20], [0, 0, 20, 19], [0, 0, 20, 20]]])
    scores = torch.tensor([[[0.9], [0.8], [0.7]]])
    chosen = head.select(Candidates(boxes, scores), torch.tensor([[32, 32]]), (2, 1), score=0.0, iou=0.7)
    assert chosen.counts.tolist() == [2]
    assert chosen.scores[0, :2].tolist() == pytest.approx([0.9, 0.7])
    assert not chosen.labels.any()
    with torch.device("meta"), pytest.raises(InputError, match="data of one class, not of 2"):
        create_model("faster_rcnn_r18", "model.backbone.pretrained=false", "model.roi=null", num_classes=2)


RPN = {
    "type": "RPN",
    "backbone": {"type": "ResNet", "depth": 18},
    "neck": {"type": "FPN", "out_channels": 16, "num_outs": 5},
    "rpn_head": {"type": "RPNHead", "feat_channels": 16, "anchor_generator": {"scales": [8]}},
    "test_cfg": {"rpn": {"nms_pre": 2000, "max_per_img": 300, "nms": {"iou_threshold": 0.6}}},
}


def test_a_converted_rpn_has_its_own_thresholds() -> None:
    options = configs.parse(convert_config({"model": RPN}, {}).tree)
    test = options.test
    assert (test.score, test.nms, test.pre_nms, test.max_det) == (0.0, 0.6, 2000, 300)
    with torch.device("meta"):
        detector = build_detector(options, 1)
        state = {f"rpn_head.rpn_{k}.weight": torch.empty(n, 16, 1, 1) for k, n in (("cls", 3), ("reg", 12))}
        with pytest.raises(InputError, match="without weights in the file"):
            convert_mmdetection_weights(state, options, count_classes(state, options), "rpn.pth")
    assert detector.num_classes == 1


def test_swins_biases_follow_the_checkpoints_index() -> None:
    """A window of 2 x 2 cells has nine relative positions; the checkpoint lists them in reverse here."""
    start = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_"
    own = torch.tensor([[4, 3, 1, 0], [5, 4, 2, 1], [7, 6, 4, 3], [8, 7, 5, 4]])
    table = torch.arange(9.0)[:, None]
    state = {f"{start}bias_table": table, f"{start}index": 8 - own}
    assert torch.equal(reorder_weights(state)[f"{start}bias_table"], table.flip(0))
    state[f"{start}index"] = torch.arange(16).reshape(4, 4) % 9
    with pytest.raises(InputError, match="relative position only"):
        reorder_weights(state)
