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
        for j, (area, ignore) in enumerate(zip(dataset.area.tolist(), dataset.eval_ignore.tolist(), strict=True))
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


def xyxy_to_xywh(boxes: np.ndarray) -> np.ndarray:
    """Convert boxes (N, 4) from corners to x, y, width, height, restoring the decimal sizes of an annotation file.

    30.3 + 20.2 - 30.3 is not 20.2 in floating point, and one bit decides between ground truths of equal overlap. A size
    that is a number of 9 decimals but for the rounding of the corners is therefore taken as that number.
    """
    sizes = boxes[:, 2:] - boxes[:, :2]
    with np.errstate(over="ignore"):
        decimals = np.round(sizes, 9)
    rounding = 2 * np.spacing(np.maximum(np.abs(boxes[:, :2]), np.abs(boxes[:, 2:])))
    sizes = np.where(np.abs(decimals - sizes) <= rounding, decimals, sizes)
    return np.concatenate([boxes[:, :2], sizes], axis=1)


def image_indices(dataset: DetectionDataset) -> np.ndarray:
    """The image of each object: (M,) positions in the dataset."""
    return np.repeat(np.arange(len(dataset)), np.diff(dataset.offsets.numpy()))


def count_per_class(dataset: DetectionDataset) -> tuple[np.ndarray, np.ndarray]:
    """Images that hold a class, and objects of it, both (K,); ignored objects are not counted."""
    keep = ~dataset.eval_ignore.numpy()
    labels = dataset.labels.numpy()[keep]
    owner = image_indices(dataset)[keep]
    classes = len(dataset.names)
    once = np.unique(owner * classes + labels) % max(classes, 1)
    return np.bincount(once, minlength=classes), np.bincount(labels, minlength=classes)
