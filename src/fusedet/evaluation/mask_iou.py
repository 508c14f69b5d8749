"""IoU of run-length encoded (RLE) masks, by the mask functions of faster-coco-eval."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval import mask as rle

from fusedet.data.dataset import DetectionDataset
from fusedet.errors import InputError
from fusedet.evaluation import coco_matching
from fusedet.evaluation.results import Result


def validate_masks(dataset: DetectionDataset, results: Sequence[Result]) -> None:
    """Raise InputError if an instance or a result has no mask, or a mask has another size than its image."""
    without_mask = sum(1 for record in dataset for segmentation in record.segmentations if segmentation is None)
    if without_mask:
        raise InputError(
            f"{without_mask} instances of {dataset.source} have no mask, "
            "so that iou_type 'segm' cannot be computed; use 'bbox'"
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


def encode_rle(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Encode polygons, or an RLE whose counts are a list, as a compressed RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation


def compute_mask_area(segmentation: dict[str, Any]) -> float:
    """Return the number of pixels of an RLE."""
    return float(rle.area(encode_rle(segmentation, *segmentation["size"])))


def add_mask_boxes(results: list[Result]) -> list[Result]:
    """Return results that hold masks only with the bounding box of each mask as `bbox`, any others as they are."""
    if not results or any("bbox" in r or not isinstance(r.get("segmentation"), dict) for r in results):
        return results
    boxes = rle.toBbox([encode_rle(r["segmentation"], *r["segmentation"]["size"]) for r in results])
    return [r | {"bbox": box} for r, box in zip(results, np.reshape(boxes, (-1, 4)).tolist(), strict=True)]


def find_mask_pairs(
    det_group: np.ndarray, det: list[Any], ground_truths: coco_matching.GroundTruths, masks: list[Any]
) -> coco_matching.OverlapPairs:
    """Find all pairs of masks of the same group with their IoU.

    Args:
        det_group: (D,) group of each detection, ascending.
        det: D RLEs.
        ground_truths: G instances; the IoU with a crowd is over the area of the detection.
        masks: G RLEs.
    """
    dets, gts, ious = [np.zeros(0, int)], [np.zeros(0, int)], [np.zeros(0)]
    for group in np.intersect1d(det_group, ground_truths.group):
        d = np.arange(*np.searchsorted(det_group, [group, group + 1]))
        o = np.arange(*np.searchsorted(ground_truths.group, [group, group + 1]))
        iou = rle.iou([det[i] for i in d], [masks[j] for j in o], ground_truths.crowd[o].astype(int).tolist())
        dets.append(np.repeat(d, len(o)))
        gts.append(np.tile(o, len(d)))
        ious.append(np.asarray(iou).ravel())
    return coco_matching.OverlapPairs(np.concatenate(dets), np.concatenate(gts), np.concatenate(ious))
