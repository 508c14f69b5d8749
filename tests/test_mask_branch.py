"""The mask branch: crops, losses and pasted masks against literal computations and torchvision."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from fakes import check_export
from fusedet.errors import InputError
from fusedet.models.roi import mask as module
from fusedet.models.roi.mask import MaskBranch, crop_masks, paste_masks
from fusedet.models.roi.sampling import RoISamples
from fusedet.types import BatchDetections, Levels, Target

LEVELS = Levels((16,) * 5, (4, 8, 16, 32, 64))
SIZES = torch.tensor([[75, 129], [64, 100]])


def pyramid(size: tuple[int, int] = (75, 129), n: int = 2) -> list[Tensor]:
    return [torch.randn(n, 16, math.ceil(size[0] / s), math.ceil(size[1] / s)) for s in LEVELS.strides]


def discs(boxes: Tensor, size: tuple[int, int] = (96, 160)) -> Tensor:
    """The ellipse inside each box."""
    y, x = torch.meshgrid(torch.arange(size[0]) + 0.5, torch.arange(size[1]) + 0.5, indexing="ij")
    cx, cy = ((boxes[:, i] + boxes[:, i + 2])[:, None, None] / 2 for i in (0, 1))
    rx, ry = ((boxes[:, i + 2] - boxes[:, i])[:, None, None] / 2 for i in (0, 1))
    return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1


def two_targets() -> list[Target]:
    a, b = torch.tensor([[4.0, 6, 40, 50], [60, 10, 120, 70]]), torch.tensor([[10.0, 8, 90, 60]])
    return [Target(a, torch.tensor([2, 0]), discs(a)), Target(b, torch.tensor([1]), discs(b))]


def samples() -> RoISamples:
    """Positives and negatives of both images, mixed."""
    rows = [
        (1, 12.5, 9.0, 80.3, 61.0, 0),
        (0, 1.0, 1.0, 20.0, 20.0, -1),
        (0, 62.0, 8.5, 128.9, 75.0, 1),
        (1, 0.0, 0.0, 30.0, 12.0, -1),
        (0, 5.0, 7.7, 37.2, 49.0, 0),
    ]
    table = torch.tensor(rows)
    return RoISamples(table[:, :5], table[:, 5].long(), table[:, 0].long())


def everyone(targets: list[Target], sampled: RoISamples) -> tuple[Tensor, Tensor, Tensor]:
    positive = sampled.instances >= 0
    return sampled.rois[positive, 1:], sampled.image[positive], sampled.instances[positive]


# -- the network


def test_parameters_and_shapes() -> None:
    """2,643,280 parameters at 256 channels and 80 classes, as the papers' Mask R-CNN has them."""
    branch = MaskBranch(Levels((256,) * 5, LEVELS.strides), 80)
    assert sum(p.numel() for p in branch.parameters()) == 2_643_280
    assert branch.loss_weights == {"loss_mask": 1.0}
    small = MaskBranch(LEVELS, 3, size=7, convs=0, channels=8)
    assert small(pyramid(), samples().rois).shape == (5, 3, 14, 14)


def test_logits_against_torchvision() -> None:
    """With torchvision's mask head and predictor and the same weights, on the same pooled features."""
    branch = MaskBranch(LEVELS, 3, convs=2, channels=8)
    head, predictor = MaskRCNNHeads(16, (8, 8), 1), MaskRCNNPredictor(8, 8, 3)
    for ours, theirs in zip(
        [*branch.convs, branch.upsample, branch.logits], [head[0][0], head[1][0], predictor[0], predictor[2]]
    ):
        ours.load_state_dict(theirs.state_dict())
    features, rois = pyramid(), samples().rois
    assert torch.allclose(branch(features, rois), predictor(head(branch.pooling(features, rois))), atol=1e-5)


@pytest.mark.parametrize("size", [(75, 129), (64, 96), (33, 47)])
def test_every_parameter_has_a_gradient_at_any_size(size: tuple[int, int]) -> None:
    branch = MaskBranch(LEVELS, 3, convs=2, channels=8)
    features = [f.requires_grad_() for f in pyramid(size)]
    kept = [f.detach().clone() for f in features]
    branch.loss(features, samples(), two_targets(), SIZES)["loss_mask"].backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, features))
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in branch.parameters())


def test_forward_exports_with_other_rois() -> None:
    branch, features, rois = MaskBranch(LEVELS, 3, convs=1, channels=8), pyramid(), samples().rois
    check_export(branch, (features, rois), (features, rois + torch.tensor([0, 0, 0, 30, 40])))


def test_half_precision() -> None:
    """Autocast gives a float32 loss; bf16 weights do not shift the RoIs."""
    branch, features = MaskBranch(LEVELS, 3, convs=1, channels=8), pyramid()
    exact = branch.loss(features, samples(), two_targets(), SIZES)["loss_mask"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = branch.loss(features, samples(), two_targets(), SIZES)["loss_mask"]
    assert loss.dtype == torch.float32
    assert float((loss - exact).abs().detach()) < 0.02 * float(exact.detach())
    logits = branch(features, samples().rois)
    half = branch.to(torch.bfloat16)([f.bfloat16() for f in features], samples().rois)
    assert float((half.float() - logits).detach().abs().max()) < 0.05 * float(logits.detach().abs().max())


@pytest.mark.parametrize("options", [{"size": 0}, {"convs": -1}, {"channels": 0}])
def test_bad_options_are_refused(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        MaskBranch(LEVELS, 3, **options)


# -- crops


def test_crops_by_hand() -> None:
    """A box on the pixels' grid, at its own size, cuts the mask out; where it leaves the image, it is clipped."""
    mask = torch.rand(1, 8, 10) < 0.5
    target = [Target(torch.tensor([[0.0, 0, 10, 8]]), torch.tensor([0]), mask)]
    boxes = torch.tensor([[2.0, 1, 6, 5], [-3, -2, 4, 4], [6, 4, 99, 77]])
    zero = torch.zeros(3, dtype=torch.int64)
    crops = crop_masks(target, boxes, zero, zero, 4)
    assert torch.equal(crops[0].bool(), mask[0, 1:5, 2:6])
    assert torch.equal(crops[1].bool(), mask[0, :4, :4])
    assert torch.equal(crops[2].bool(), mask[0, 4:, 6:])


def literal_crop(mask: Tensor, box: list[float], size: int) -> list[list[float]]:
    """RoIAlign with ceil(side / size) samples per cell and axis, bilinear between pixel centers, then a threshold."""
    height, width = mask.shape

    def pixel(y: float, x: float) -> float:
        if y < -1 or x < -1 or y > height or x > width:
            return 0.0
        y, x = max(y, 0.0), max(x, 0.0)
        top, left = min(int(y), height - 1), min(int(x), width - 1)
        bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
        dy, dx = (0.0 if top == height - 1 else y - top), (0.0 if left == width - 1 else x - left)
        upper = (1 - dx) * float(mask[top, left]) + dx * float(mask[top, right])
        lower = (1 - dx) * float(mask[bottom, left]) + dx * float(mask[bottom, right])
        return (1 - dy) * upper + dy * lower

    x1, y1, x2, y2 = box
    cell_h, cell_w = (y2 - y1) / size, (x2 - x1) / size
    rows, columns = math.ceil(cell_h), math.ceil(cell_w)
    out = []
    for i in range(size):
        line = []
        for j in range(size):
            total = 0.0
            for a in range(rows):
                for b in range(columns):
                    total += pixel(
                        y1 + (i + (a + 0.5) / rows) * cell_h - 0.5, x1 + (j + (b + 0.5) / columns) * cell_w - 0.5
                    )
            line.append(total / (rows * columns))
        out.append(line)
    return out


def test_crops_against_the_definition() -> None:
    targets, sampled = two_targets(), samples()
    boxes, image, instances = everyone(targets, sampled)
    crops = crop_masks(targets, boxes, image, instances, 5)
    for crop, box, p, o in zip(crops, boxes.double().tolist(), image.tolist(), instances.tolist()):
        values = torch.tensor(literal_crop(targets[p].masks[o], box, 5))
        clear = (values - 0.5).abs() > 1e-5
        assert torch.equal((values >= 0.5)[clear], crop.bool()[clear])
        assert 0 < crop.mean() < 1


def test_crops_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = two_targets()
    boxes, image, instances = everyone(targets, samples())
    whole = crop_masks(targets, boxes, image, instances, 14)
    for pixels in (1, 2 * 96 * 160):
        monkeypatch.setattr(module, "_CROP_PIXELS", pixels)
        assert torch.equal(crop_masks(targets, boxes, image, instances, 14), whole)


# -- the loss


def test_loss_against_the_definition() -> None:
    """Mean over positives of the mean cross-entropy in the own class's channel; the other channels learn nothing."""
    branch, features, targets, sampled = MaskBranch(LEVELS, 3, convs=1, channels=8), pyramid(), two_targets(), samples()
    loss = branch.loss(features, sampled, targets, SIZES)["loss_mask"]
    boxes, image, instances = everyone(targets, sampled)
    logits = branch(features, sampled.rois[sampled.instances >= 0]).double()
    crops = crop_masks(targets, boxes, image, instances, 28).double()
    total = 0.0
    for i, (p, o) in enumerate(zip(image.tolist(), instances.tolist())):
        score = logits[i, targets[p].labels[o]].sigmoid()
        total += -(crops[i] * score.log() + (1 - crops[i]) * (1 - score).log()).mean() / len(boxes)
    assert float(loss.detach()) == pytest.approx(float(total.detach()), rel=1e-5)
    only = [Target(t.boxes, torch.ones_like(t.labels), t.masks) for t in targets]
    branch.loss(features, sampled, only, SIZES)["loss_mask"].backward()
    assert branch.logits.bias.grad.ne(0).tolist() == [False, True, False]


def test_order_of_samples_does_not_matter() -> None:
    branch, features, sampled = MaskBranch(LEVELS, 3, convs=1, channels=8), pyramid(), samples()
    order = torch.tensor([3, 4, 0, 2, 1])
    mixed = RoISamples(sampled.rois[order], sampled.instances[order], sampled.image[order])
    ours, theirs = (branch.loss(features, s, two_targets(), SIZES)["loss_mask"] for s in (sampled, mixed))
    assert torch.allclose(ours, theirs, rtol=1e-5)


EMPTY = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("masks", [None, torch.zeros(0, 96, 160, dtype=torch.bool)])
def test_loss_without_positives_is_zero_and_connected(masks: Tensor | None) -> None:
    branch = MaskBranch(LEVELS, 3, convs=1, channels=8)
    empty = Target(EMPTY.boxes, EMPTY.labels, masks)
    none = replace(samples(), instances=torch.full((5,), -1))
    loss = branch.loss(pyramid(), none, [empty, empty], SIZES)["loss_mask"]
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and not p.grad.any() for p in branch.parameters())


def test_one_image_without_instances() -> None:
    """The other image changes nothing, whether its target names masks or not."""
    branch, features, targets = MaskBranch(LEVELS, 3, convs=1, channels=8), pyramid(), two_targets()
    sampled = samples()
    second = replace(sampled, instances=torch.where(sampled.image == 1, sampled.instances, -1))
    only = RoISamples(second.rois[:1] - torch.eye(5)[:1], second.instances[:1], torch.tensor([0]))
    alone = branch.loss([f[1:] for f in features], only, targets[1:], SIZES[1:])
    for first in (EMPTY, Target(EMPTY.boxes, EMPTY.labels, torch.zeros(0, 96, 160, dtype=torch.bool)), targets[0]):
        both = branch.loss(features, second, [first, targets[1]], SIZES)
        assert torch.allclose(both["loss_mask"], alone["loss_mask"], rtol=1e-5)


def test_instances_without_masks_are_refused() -> None:
    targets = two_targets()
    maskless = [targets[0], Target(targets[1].boxes, targets[1].labels)]
    with pytest.raises(InputError, match="1 instances have no mask"):
        MaskBranch(LEVELS, 3, convs=0, channels=8).loss(pyramid(), samples(), maskless, SIZES)


# -- prediction


def batch_detections() -> tuple[BatchDetections, Tensor]:
    boxes = torch.tensor(
        [[[4.0, 6, 40, 50], [60, 10, 120, 70], [0, 0, 0, 0]], [[10, 8, 90, 60], [0, 0, 0, 0], [0, 0, 0, 0]]]
    )
    labels = torch.tensor([[2, 0, 0], [1, 0, 0]])
    return BatchDetections(boxes, torch.rand(2, 3), labels, torch.tensor([2, 1])), labels


def test_prediction_takes_the_channel_of_the_label() -> None:
    branch, features = MaskBranch(LEVELS, 3, convs=1, channels=8), pyramid()
    detections, labels = batch_detections()
    masks = branch.predict(features, detections)
    assert masks.shape == (2, 3, 28, 28)
    for n in range(2):
        for d in range(3):
            roi = torch.cat([torch.tensor([float(n)]), detections.boxes[n, d]])[None]
            assert torch.allclose(masks[n, d], branch(features, roi)[0, labels[n, d]].sigmoid(), atol=1e-6)


def test_pasting_by_hand() -> None:
    """A mask in a box of as many pixels as it has cells lands there as it is; what leaves the image is cut off."""
    mask = (torch.rand(4, 6) < 0.5).float()[:, :4]
    boxes = torch.tensor([[3.0, 2, 7, 6], [-2, -1, 2, 3], [8, 5, 12, 9], [5, 5, 5, 9], [3, 3, 9, 3]])
    pasted = paste_masks(mask.expand(5, 4, 4), boxes, (7, 10))
    expected = torch.zeros(5, 7, 10, dtype=torch.bool)
    expected[0, 2:6, 3:7] = mask.bool()
    expected[1, :3, :2] = mask[1:, 2:].bool()
    expected[2, 5:, 8:] = mask[:2, :2].bool()
    assert torch.equal(pasted, expected)  # a box without width or height has no pixel


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40))
def test_pasting_against_the_definition(seed: int, height: int, width: int) -> None:
    """MMDetection's: torch's grid_sample of the mask at the pixels' centers, zeros around, and a threshold."""
    torch.manual_seed(seed)
    masks, corner = torch.rand(3, 28, 28), torch.rand(3, 2) * 40 - 8
    boxes = torch.cat([corner, corner + 0.5 + torch.rand(3, 2) * 40], dim=1)
    x = (torch.arange(width) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (torch.arange(height) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([x[:, None].expand(3, height, width), y[:, :, None].expand(3, height, width)], dim=3)
    values = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    clear = (values - 0.5).abs() > 1e-4
    assert torch.equal((values >= 0.5)[clear], paste_masks(masks, boxes, (height, width))[clear])


def test_pasting_in_chunks_and_no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, boxes = torch.rand(7, 28, 28), torch.tensor([[1.0, 2, 30, 40]]).expand(7, 4)
    whole = paste_masks(masks, boxes, (50, 40))
    monkeypatch.setattr(module, "_PASTE_PIXELS", 3 * 50 * 40)
    assert torch.equal(paste_masks(masks, boxes, (50, 40)), whole)
    assert paste_masks(masks[:0], boxes[:0], (50, 40)).shape == (0, 50, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paste_masks(masks, boxes, (50, 40)), whole)


def test_crop_and_paste_round_trip() -> None:
    """`paste_masks` restores what `crop_masks` cropped, except for cells on the boundary."""
    boxes = torch.tensor([[10.0, 12, 90, 70]])
    mask = discs(boxes)
    zero = torch.zeros(1, dtype=torch.int64)
    crop = crop_masks([Target(boxes, zero, mask)], boxes, zero, zero, 28)
    back = paste_masks(crop, boxes, (96, 160))
    assert (back & mask).sum() / (back | mask).sum() > 0.95
