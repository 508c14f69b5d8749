"""The data types validate their fields, move to devices and convert to supervised formats."""

import pytest
import torch

from fusedet.types import Batch, Detections, Levels, Priors, Target


def detections() -> Detections:
    return Detections(torch.tensor([[10.0, 20, 40, 60], [0, 0, 5, 5]]), torch.tensor([0.9, 0.5]), torch.tensor([1, 0]))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Levels((1, 2), (8,)),
        lambda: Levels((), ()),
        lambda: Levels((1, 2), (16, 8)),
        lambda: Priors(torch.zeros(3, 5), torch.zeros(3), (3,)),
        lambda: Priors(torch.zeros(3, 4), torch.zeros(2), (3,)),
        lambda: Target(torch.zeros(2, 4), torch.zeros(3)),
        lambda: Target(torch.zeros(4), torch.zeros(1)),
        lambda: Target(torch.zeros(2, 4), torch.zeros(2), masks=torch.zeros(1, 5, 5)),
        lambda: Detections(torch.zeros(2, 4), torch.zeros(2), torch.zeros(1)),
        lambda: Batch(torch.zeros(1, 3, 4, 4), torch.zeros(1, 2), (0,), torch.zeros(1, 2)),  # not uint8
        lambda: Batch(torch.zeros(1, 0, 4, 4, dtype=torch.uint8), torch.zeros(1, 2), (0,), torch.zeros(1, 2)),
        lambda: Batch(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2), (0,), torch.zeros(1, 2)),
        lambda: Batch(
            torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2), (0,), torch.zeros(1, 2), targets=()
        ),
    ],
)
def test_wrong_shapes_are_refused(make) -> None:
    with pytest.raises(ValueError):
        make()


def test_frozen() -> None:
    with pytest.raises(AttributeError):
        detections().scores = torch.zeros(2)


def test_all_tensors_move() -> None:
    target = Target(torch.zeros(1, 4), torch.zeros(1), ignore=torch.zeros(2, 4))
    batch = Batch(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.zeros(1, 2), (7,), torch.zeros(1, 2), (target,))
    moved = batch.to("meta")
    assert moved.ids == (7,)
    assert {t.device.type for t in (moved.images, moved.sizes, moved.scales)} == {"meta"}
    assert {t.device.type for t in (moved.targets[0].boxes, moved.targets[0].labels, moved.targets[0].ignore)} == {
        "meta"
    }
    assert moved.targets[0].masks is None


def test_conversion_to_other_formats() -> None:
    converted = detections()
    assert set(converted.to_dict()) == {"boxes", "scores", "labels"}
    rows = converted.to_coco(5, category_ids=[3, 17])
    assert rows[0] == {"image_id": 5, "category_id": 17, "bbox": [10, 20, 30, 40], "score": pytest.approx(0.9)}
    assert rows[1]["category_id"] == 3
    assert converted.to_coco(5)[0]["category_id"] == 1
    supervised = converted.to_supervision()
    assert supervised.xyxy.tolist() == converted.boxes.tolist()
    assert supervised.class_id.tolist() == [1, 0]
