"""Overlaps of masks in run-length code (RLE), by faster-coco-eval's mask functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import mask as rle

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching as rule
from fusedet.evaluation.results import Result


def validate_masks(dataset: DetectionDataset, results: Sequence[Result]) -> None:
    """Raise InputError where an object or a result has no mask, or a result's mask is not of its image's size."""
    bare = sum(1 for record in dataset for segment in record.segmentations if segment is None)
    if bare:
        raise InputError(
            f"{bare} objects of {dataset.source} have no mask, so that iou_type 'segm' cannot be computed; use 'bbox'"
        )
    sizes = dict(zip(dataset.image_ids.tolist(), dataset.sizes.tolist(), strict=True))
    for i, result in enumerate(results):
        mask, size = result.get("segmentation"), sizes[result["image_id"]]
        if not isinstance(mask, dict) or "counts" not in mask or "size" not in mask:
            raise InputError(
                f"results: result {i} lacks 'segmentation', it must be an RLE {{size, counts}} for iou_type 'segm'"
            )
        if list(mask["size"]) != size:
            raise InputError(
                f"results: the mask of result {i} has size {list(mask['size'])}, it must be the image's {size}"
            )


def encode_rle(segment: Any, height: int, width: int) -> dict[str, Any]:
    """Polygons, or an RLE whose counts are a list, as a compressed RLE."""
    if isinstance(segment, list):
        return rle.merge(rle.frPyObjects(segment, height, width))
    return rle.frPyObjects(segment, height, width) if isinstance(segment["counts"], list) else segment


def compute_mask_area(segment: dict[str, Any]) -> float:
    """Pixels of an RLE."""
    return float(rle.area(encode_rle(segment, *segment["size"])))


def find_mask_pairs(det_group: np.ndarray, det: list[Any], objects: rule.Objects, masks: list[Any]) -> rule.Pairs:
    """All pairs of masks of the same group and their overlaps."""
    dets, objs, ious = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for group in np.intersect1d(det_group, objects.group):
        d = np.arange(*np.searchsorted(det_group, [group, group + 1]))
        o = np.arange(*np.searchsorted(objects.group, [group, group + 1]))
        iou = rle.iou([det[i] for i in d], [masks[j] for j in o], objects.crowd[o].astype(int).tolist())
        dets.append(np.repeat(d, len(o)))
        objs.append(np.tile(o, len(d)))
        ious.append(np.asarray(iou).ravel())
    return rule.Pairs(np.concatenate(dets), np.concatenate(objs), np.concatenate(ious))
