"""What is true of the records, as COCO's evaluators want it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedet.data.dataset import Records


def coco_ground_truth(records: Records, *, masks: bool = True) -> dict[str, Any]:
    """The records as a COCO data set: images, annotations (iscrowd = ignored, ids from 1), categories with their original ids.

    `masks=False` leaves out the segmentations.
    """
    ids, labels = records.image_ids.tolist(), records.labels.tolist()
    boxes, owner = sizes_first(records.boxes.numpy()).tolist(), owners(records).tolist()
    annotations: list[dict[str, Any]] = [
        {
            "id": j + 1,
            "image_id": ids[owner[j]],
            "category_id": records.category_ids[labels[j]],
            "bbox": boxes[j],
            "area": area,
            "iscrowd": int(ignore),
        }
        for j, (area, ignore) in enumerate(zip(records.area.tolist(), records.ignore.tolist(), strict=True))
    ]
    if masks:
        for annotation, segment in zip(annotations, (s for record in records for s in record.segments), strict=True):
            if segment is not None:
                annotation["segmentation"] = segment
    return {
        "images": [
            {"id": ids[i], "file_name": records.path(i).name, "height": h, "width": w} for i, (h, w) in enumerate(records.sizes.tolist())
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": name} for c, name in zip(records.category_ids, records.names, strict=True)],
    }


def sizes_first(corners: np.ndarray) -> np.ndarray:
    """Boxes (N, 4) x1, y1, x2, y2 as x, y, width, height."""
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


def owners(records: Records) -> np.ndarray:
    """The picture of each object: (M,) positions in the records."""
    return np.repeat(np.arange(len(records)), np.diff(records.offsets.numpy()))


def counts(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Pictures that hold a class, and objects of it, both (K,); ignored objects are not counted."""
    keep = ~records.ignore.numpy()
    labels = records.labels.numpy()[keep]
    owner = owners(records)[keep]
    classes = len(records.names)
    once = np.unique(owner * classes + labels) % max(classes, 1)
    return np.bincount(once, minlength=classes), np.bincount(labels, minlength=classes)
