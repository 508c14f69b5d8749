"""What is true of the dataset, as COCO's evaluators want it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset


def build_coco_ground_truth(dataset: DetectionDataset, *, masks: bool = True) -> dict[str, Any]:
    """The dataset as a COCO dataset: images, annotations (iscrowd = ignored, ids from 1), categories with their original ids.

    `masks=False` leaves out the segmentations.
    """
    ids, labels = dataset.image_ids.tolist(), dataset.labels.tolist()
    boxes, owner = xyxy_to_xywh(dataset.boxes.numpy()).tolist(), image_indices(dataset).tolist()
    annotations: list[dict[str, Any]] = [
        {
            "id": j + 1,
            "image_id": ids[owner[j]],
            "category_id": dataset.category_ids[labels[j]],
            "bbox": boxes[j],
            "area": area,
            "iscrowd": int(ignore),
        }
        for j, (area, ignore) in enumerate(zip(dataset.area.tolist(), dataset.ignore.tolist(), strict=True))
    ]
    if masks:
        for annotation, segment in zip(
            annotations, (s for record in dataset for s in record.segmentations), strict=True
        ):
            if segment is not None:
                annotation["segmentation"] = segment
    return {
        "images": [
            {"id": ids[i], "file_name": dataset.path(i).name, "height": h, "width": w}
            for i, (h, w) in enumerate(dataset.sizes.tolist())
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": name} for c, name in zip(dataset.category_ids, dataset.names, strict=True)],
    }


def xyxy_to_xywh(corners: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) x1, y1, x2, y2 as x, y, width, height."""
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def image_indices(dataset: DetectionDataset) -> np.ndarray:
    """The image of each object: (M,) positions in the dataset."""
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets.numpy()))


def count_per_class(dataset: DetectionDataset) -> tuple[np.ndarray, np.ndarray]:
    """Images that hold a class, and objects of it, both (K,); ignored objects are not counted."""
    keep = ~dataset.ignore.numpy()
    labels = dataset.labels.numpy()[keep]
    owner = image_indices(dataset)[keep]
    classes = len(dataset.names)
    once = np.unique(owner * classes + labels) % max(classes, 1)
    return np.bincount(once, minlength=classes), np.bincount(labels, minlength=classes)
