"""The ground truth of a dataset in the form that COCO evaluators read."""

from typing import Any

import numpy as np

from fusedet.data.dataset import DetectionDataset


def build_coco_ground_truth(dataset: DetectionDataset, *, masks: bool = True) -> dict[str, Any]:
    """Build a COCO dictionary: images, annotations with ids from 1, categories with their original ids.

    `iscrowd` marks what evaluation ignores. `masks=False` leaves out the segmentations.
    """
    ids, labels = dataset.image_ids.tolist(), dataset.labels.tolist()
    boxes, image_index = xyxy_to_xywh(dataset.boxes.numpy()).tolist(), dataset.image_indices.tolist()
    annotations: list[dict[str, Any]] = [
        {
            "id": j + 1,
            "image_id": ids[image_index[j]],
            "category_id": dataset.category_ids[labels[j]],
            "bbox": boxes[j],
            "area": area,
            "iscrowd": int(ignore),
        }
        for j, (area, ignore) in enumerate(zip(dataset.area.tolist(), dataset.eval_ignore.tolist(), strict=True))
    ]
    if masks:
        for annotation, segmentation in zip(
            annotations, (s for record in dataset for s in record.segmentations), strict=True
        ):
            if segmentation is not None:
                annotation["segmentation"] = segmentation
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


def count_per_class(dataset: DetectionDataset) -> tuple[np.ndarray, np.ndarray]:
    """Count images with a class, and its instances, both (K,), without ignored instances."""
    keep = ~dataset.eval_ignore.numpy()
    labels = dataset.labels.numpy()[keep]
    image_index = dataset.image_indices[keep]
    classes = len(dataset.names)
    once = np.unique(image_index * classes + labels) % max(classes, 1)
    return np.bincount(once, minlength=classes), np.bincount(labels, minlength=classes)
