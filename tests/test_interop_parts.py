"""Options of model parts for weights of other projects: caffe style, normalization, extra levels, anchors, points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.resnet import Bottleneck
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

from fusedet.errors import InputError
from fusedet.models.backbones import TimmBackbone
from fusedet.models.heads import FCOSHead, RetinaHead
from fusedet.models.necks import FPN
from fusedet.models.roi import BoxStage
from fusedet.types import Levels


def caffe_block(block: Bottleneck, x: Tensor, stride: int) -> Tensor:
    """Compute a bottleneck whose first convolution has the stride."""
    short = x if block.downsample is None else block.downsample(x)
    y = F.relu(block.bn1(F.conv2d(x, block.conv1.weight, stride=stride)))
    y = F.relu(block.bn2(F.conv2d(y, block.conv2.weight, padding=1)))
    return F.relu(block.bn3(F.conv2d(y, block.conv3.weight)) + short)


@torch.no_grad()
def test_caffe_style_has_the_stride_in_the_first_convolution() -> None:
    backbone = TimmBackbone("resnet26", pretrained=False, style="caffe").eval()
    resnet = backbone.body
    x = torch.rand(1, 3, 64, 96)
    features = backbone(x)
    y = F.max_pool2d(F.relu(resnet.bn1(resnet.conv1(x))), 3, 2, 1)
    for layer, (name, level) in enumerate(zip(("layer1", "layer2", "layer3", "layer4"), features)):
        for i, block in enumerate(resnet[name]):
            y = caffe_block(block, y, 2 if layer and not i else 1)
        assert torch.allclose(y, level, atol=1e-5)


def test_caffe_style_with_deformable_stages() -> None:
    backbone = TimmBackbone("resnet26", pretrained=False, style="caffe", deformable_stages=(3,))
    block = backbone.body["layer3"][0]
    assert (block.conv1.stride, block.conv2.stride, block.conv2.offset.stride) == ((2, 2), 1, (1, 1))
    assert [f.shape[-1] for f in backbone(torch.rand(1, 3, 64, 64))] == [16, 8, 4, 2]


def test_mean_and_std_of_the_config() -> None:
    backbone = TimmBackbone("resnet18", pretrained=False, mean=(100.0, 50.0, 25.0), std=(1.0, 2.0, 5.0))
    pixel = torch.tensor([110.0, 52.0, 35.0]).view(3, 1, 1)
    assert torch.allclose(
        pixel * backbone.scale + backbone.shift, torch.tensor([10.0, 1.0, 2.0]).view(3, 1, 1), atol=1e-5
    )
    assert not {"scale", "shift"} & set(backbone.state_dict())


def test_wrong_backbone_options_are_refused() -> None:
    with pytest.raises(InputError, match=r"style=caffe: 'resnet18' has no bottlenecks"):
        TimmBackbone("resnet18", pretrained=False, style="caffe")
    with pytest.raises(InputError, match=r"std=.* must be above 0"):
        TimmBackbone("resnet18", pretrained=False, std=(1.0, 0.0, 1.0))


@pytest.mark.parametrize(("top", "source", "relu"), [("on_input_relu", 0, True), ("on_output_plain", 1, False)])
@torch.no_grad()
def test_extra_levels_with_and_without_relu(top: str, source: int, relu: bool) -> None:
    neck = FPN(Levels((8, 16), (16, 32)), 4, finest=4, coarsest=7, top=top)  # type: ignore[arg-type]
    features = [torch.randn(1, 8, 8, 8), torch.randn(1, 16, 4, 4)]
    levels = neck(features)
    p6 = neck.top.convs[0](features[-1] if source == 0 else levels[1])
    assert torch.equal(levels[2], p6)
    assert torch.equal(levels[3], neck.top.convs[1](F.relu(p6) if relu else p6))


@torch.no_grad()
def test_fpn_with_group_norm() -> None:
    neck = FPN(Levels((8,), (32,)), 32, finest=5, coarsest=6, norm=True)
    for parameter in neck.parameters():
        nn.init.normal_(parameter)
    assert all(m.bias is None for m in neck.modules() if isinstance(m, nn.Conv2d))
    x = torch.randn(2, 8, 5, 5)

    def layer(pair: nn.Sequential, y: Tensor, **options: int) -> Tensor:
        y = F.conv2d(y, pair[0].weight, **options)
        groups = y.view(2, 32, -1)  # 32 groups of one channel
        flat = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return flat.view_as(y) * pair[1].weight.view(-1, 1, 1) + pair[1].bias.view(-1, 1, 1)

    p5 = layer(neck.output[0], layer(neck.lateral[0], x), padding=1)
    levels = neck([x])
    assert torch.allclose(levels[0], p5, atol=1e-4)
    assert torch.allclose(levels[1], layer(neck.top.convs[0], x, padding=1, stride=2), atol=1e-4)
    with pytest.raises(InputError, match="multiples of 32"):
        FPN(Levels((8,), (32,)), 16, finest=5, coarsest=5, norm=True)


def test_torchvisions_anchors() -> None:
    """Sizes and corners are rounded as in torchvision's anchor generator."""
    sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    generator = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    features = [torch.zeros(1, 32, 256 // s, 384 // s) for s in (8, 16, 32, 64, 128)]
    theirs = generator(ImageList(torch.zeros(1, 3, 256, 384), [(256, 384)]), features)[0]
    head = RetinaHead(Levels((32,) * 5, (8, 16, 32, 64, 128)), 2, convs=0, round_anchors=True, whole_sizes=True)
    assert torch.equal(head(features).priors.boxes, theirs)
    plain = RetinaHead(Levels((32,) * 5, (8, 16, 32, 64, 128)), 2, convs=0)(features).priors.boxes
    difference = (theirs - plain).abs().amax().item()
    assert 0.5 < difference < 3  # pixels between the two definitions


def test_offset_of_anchors_in_their_cells() -> None:
    features = [torch.zeros(1, 32, 2, 2)]
    levels = Levels((32,), (16,))
    for offset in (0.0, 0.5):
        expected = 16 * (torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]) + offset)
        retina = RetinaHead(levels, 2, convs=0, scales_per_octave=1, ratios=(1.0,), offset=offset)
        fcos = FCOSHead(levels, 2, convs=1, offset=offset)
        for head in (retina, fcos):
            boxes = head(features).priors.boxes
            assert torch.allclose((boxes[:, :2] + boxes[:, 2:]) / 2, expected)


@torch.no_grad()
def test_convolutions_of_the_box_head() -> None:
    """Four convolutions and one linear layer, computed by hand."""
    stage = BoxStage(Levels((8,), (4,)), 3, size=2, channels=16, layers=1, convs=4)
    assert (len(stage.convs), len(stage.shared)) == (4, 1)
    features = [torch.randn(1, 8, 16, 16)]
    rois = torch.tensor([[0.0, 3.0, 5.0, 40.0, 50.0]])
    x = stage.pooling(features, rois)
    for layer in stage.convs:
        x = F.conv2d(x, layer.weight, layer.bias, padding=1).relu()
    x = (x.flatten(1) @ stage.shared[0].weight.T + stage.shared[0].bias).relu()
    assert torch.allclose(stage(features, rois)[0], stage.cls(x), atol=1e-5)
    with pytest.raises(InputError, match=r"layers=-1 and convs=0 at least 0"):
        BoxStage(Levels((8,), (4,)), 3, layers=-1)


def test_padding_is_zero_after_normalization() -> None:
    """Padding is 0 for any mean, because MMDetection pads after normalization."""
    backbone = TimmBackbone("resnet18", pretrained=False, mean=(122.77, 115.95, 102.98), std=(1.0, 1.0, 1.0))
    from fusedet.models.ops.image_normalization import normalize_images

    images = torch.from_numpy(np.full((1, 3, 4, 6), 200, np.uint8))
    out = normalize_images(images, backbone.scale, backbone.shift, torch.tensor([[3, 4]]))
    assert torch.allclose(out[0, 0, :3, :4], torch.tensor(77.23), atol=1e-4)
    assert out[0, :, 3:].abs().sum() + out[0, :, :, 4:].abs().sum() == 0
