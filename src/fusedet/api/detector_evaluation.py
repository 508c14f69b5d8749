"""Evaluation of a detector on a split: results in COCO's format, their metrics, and the files that show them."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fusedet import evaluation, visualization
from fusedet.api.detection import AnyDetector, build_tta_transforms, check_tile_size, detect_images, get_strides
from fusedet.api.progress import track
from fusedet.api.run_dir import write_json
from fusedet.api.worst_images import draw_worst_images
from fusedet.atomic_io import write_atomically
from fusedet.collectives import gather_objects
from fusedet.config import Config, Test
from fusedet.data.dataset import DetectionDataset
from fusedet.data.loader import EvalLoader, build_eval_loader
from fusedet.errors import InputError, format_count, shorten_list
from fusedet.evaluation.results import Result
from fusedet.exporters import ExportedDetector
from fusedet.models.detectors import selection_options
from fusedet.models.protocols import InferenceDetector
from fusedet.models.roi import MaskBranch
from fusedet.types import Batch

BOX_METRICS = evaluation.COCO_METRICS
MASK_METRICS = tuple(f"mask_{name}" for name in BOX_METRICS)


@dataclass(frozen=True)
class Evaluation:
    """Detections of a split in COCO's result format, and their metrics."""

    results: list[Result]
    metrics: dict[str, Any]


def evaluate_detector(
    detector: AnyDetector,
    config: Config,
    dataset: DetectionDataset,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    voc: bool = False,
    evaluator: str = evaluation.EVALUATORS[0],
    progress: Console | None = None,
) -> Evaluation:
    """Run a detector on every image of a split and compute its metrics.

    Args:
        detector: In eval mode, on `device`.
        config: Its `data` and `test` say how the images are seen and how many at once.
        dataset: The split.
        device: Where the images go.
        rank: This process's number.
        world: How many processes share the images.
        voc: Whether VOC's AP is computed too; for VOC data it always is.
        evaluator: One of `evaluation.EVALUATORS`.
        progress: Shows how many batches the first process has done, if it is a terminal.

    Returns:
        Results of all processes, and their metrics; without objects in the dataset only the number of detections.
        Other processes than the first get no metrics.

    Raises:
        InputError: The detector predicts masks, and objects of the dataset have none.
    """
    if (masks := has_mask_branch(detector)) and len(dataset.labels):
        check_masks(dataset)
    check_tile_size("test.tiles.size", config.test.tiles.size, get_strides(detector))
    canvas = detector.canvas if isinstance(detector, ExportedDetector) else None
    loader = build_val_loader(config, dataset, rank, world, canvas, pin=device.type == "cuda")
    batches: Iterable[Batch] = loader if rank else track(loader, len(loader), label="images", console=progress)
    if not isinstance(detector, ExportedDetector):  # its thresholds are part of the file
        detector.selection = selection_options(config.test, dataset.names)
    results = detect(detector, batches, dataset, device, config.test.tiles.ios)
    if rank:
        return Evaluation(results, {})
    return evaluate_results(dataset, results, config.test, voc=voc, evaluator=evaluator, masks=masks)


def evaluate_results(
    dataset: DetectionDataset,
    results: list[Result],
    test: Test,
    *,
    voc: bool = False,
    evaluator: str = evaluation.EVALUATORS[0],
    masks: bool | None = None,
) -> Evaluation:
    """Compute COCO's metrics of results, those of masks and VOC's if asked for, per class too, and the stamp.

    Args:
        dataset: The split.
        results: In COCO's result format, with image and category ids of the dataset.
        test: Its `size_bins` are measured; above 100, metrics of `max_det` detections are added (AP@300).
        voc: Whether VOC's AP is computed too; for VOC data it always is.
        evaluator: One of `evaluation.EVALUATORS`.
        masks: Whether metrics of masks are computed too; by default where all results have one.

    Returns:
        The results, and metrics in 0..1 by name, mask_NAME of masks; lists `classes` and, if asked for, `size_bins`;
        `stamp`. Without objects in the dataset only the number of detections.

    Raises:
        InputError: The results do not fit the dataset, as in `evaluate_coco`.
    """
    if not len(dataset.labels):
        return Evaluation(results, {"detections": len(results)})
    if masks is None:
        masks = bool(results) and all("segmentation" in result for result in results)
    options: dict[str, Any] = {"evaluator": evaluator, "size_bins": test.size_bins or (), "max_det": test.max_det}
    metrics = evaluation.evaluate_coco(dataset, results, **options)
    if masks:
        metrics |= compute_mask_metrics(dataset, results, **options)
        for row, other in zip(metrics.get("size_bins", ()), metrics.pop("mask_size_bins", ())):
            row |= {f"mask_{name}": other[name] for name in ("AP", "AR")}
        for row, other in zip(metrics["classes"], metrics.pop("mask_classes")):
            row |= {f"mask_{name}": value for name, value in other.items() if name.startswith("AP")}
    if voc or dataset.dataset_format == "voc":
        area, eleven = evaluation.evaluate_voc(dataset, results), evaluation.evaluate_voc(dataset, results, points=11)
        metrics |= {"VOC_AP": area["mAP"], "VOC_AP_11_point": eleven["mAP"]}
        for row, a, b in zip(metrics["classes"], area["classes"], eleven["classes"]):
            row |= {"VOC_AP": a["AP"], "VOC_AP_11_point": b["AP"]}
    metrics["stamp"] = evaluation.create_stamp(
        dataset, results, evaluator, max_dets=evaluation.extend_max_dets(test.max_det)
    )
    return Evaluation(results, metrics)


def build_val_loader(
    config: Config,
    dataset: DetectionDataset,
    rank: int = 0,
    world: int = 1,
    canvas: tuple[int, int] | None = None,
    masks: bool = False,
    *,
    pin: bool = False,
) -> EvalLoader:
    """Build a loader of every image of a split once, preprocessed as for `predict`.

    Args:
        config: Its `data` and `test` say how the images are seen, and how many at once.
        dataset: The split.
        rank: Rank of this process.
        world: Number of processes that share the images.
        canvas: Height and width that images must fit; None for no limit.
        masks: Whether targets have masks.
        pin: Whether batches are in page-locked memory, from which a GPU copies without a synchronization.

    Raises:
        InputError: As for `build_eval_loader`.
    """
    # every process gets as many images of a batch, at least one
    batch = max(world, (config.test.batch or config.train.total_batch // config.train.accumulate) // world * world)
    first, *others = build_tta_transforms(config, canvas)
    options: dict[str, Any] = {"batch": batch, "workers": config.data.workers, "rank": rank, "world": world}
    options |= {"pin": pin, "tta_transforms": others, "masks": masks, "tiles": config.test.tiles}
    return build_eval_loader(dataset, first, **options, min_visible=config.data.min_visible)


def detect(
    detector: InferenceDetector,
    loader: Iterable[Batch],
    dataset: DetectionDataset,
    device: torch.device,
    ios: float | None = None,
) -> list[Result]:
    """Detect the objects of a split and collect the detections of all processes.

    Args:
        detector: In eval mode, on `device`.
        loader: This process's batches.
        dataset: The split.
        device: Where the batches go.
        ios: Threshold of `test.tiles.ios`.

    Returns:
        Detections in COCO's result format, in every process: boxes in pixels of the original images, ids and categories
        of the dataset.
    """
    results: list[Result] = []
    for image_id, detections in detect_images(detector, loader, device, ios):
        results += detections.to_coco(image_id, dataset.category_ids)
    return [result for of_rank in gather_objects(results) for result in of_rank]


def has_mask_branch(detector: AnyDetector) -> bool:
    """Return whether a detector predicts masks too; it then needs data with masks."""
    if isinstance(detector, ExportedDetector):
        return detector.has_masks
    return any(isinstance(part, MaskBranch) for part in detector.modules())


def check_masks(dataset: DetectionDataset) -> None:
    """Check the data of a detector that predicts masks.

    Raises:
        InputError: Objects have no mask.
    """
    if count := int((dataset.segmentations.offsets.diff() == 0).sum()):
        raise InputError(
            f"{count} of the {len(dataset.labels)} objects of {dataset.source} have no mask, but the detector predicts "
            "masks: use data with masks, such as COCO's, or a detector without them"
        )


def compute_mask_metrics(
    dataset: DetectionDataset,
    results: list[Result],
    evaluator: str = evaluation.EVALUATORS[0],
    **options: Any,
) -> dict[str, Any]:
    """Return COCO's metrics by the IoU of masks, each as mask_NAME; options as for `evaluate_coco`."""
    metrics = evaluation.evaluate_coco(dataset, results, iou_type="segm", evaluator=evaluator, **options)
    return {f"mask_{name}": value for name, value in metrics.items()}


def write_report(
    dataset: DetectionDataset, results: list[Result], metrics: dict[str, Any], out: Path, title: str
) -> dict[str, Path]:
    """Write results, metrics and plots of a split into a directory.

    Args:
        dataset: The split.
        results: In COCO's result format, with image and category ids of the dataset.
        metrics: As `evaluate_results` computes them.
        out: The directory, which exists.
        title: Title of the plots.

    Returns:
        The files by what they show.

    Raises:
        StorageError: A file cannot be written.
    """
    files = {
        "results": out / "val.bbox.json",
        "metrics": out / "metrics.json",
        "precision-recall curves": out / "precision_recall.png",
        "confusion matrix": out / "confusion.png",
        "AP by object size": out / "sizes.png",
        "worst images": out / "worst.png",
    }
    stored = evaluation.to_dataset_ids(results, dataset)
    boxes = [{name: value for name, value in result.items() if name != "segmentation"} for result in stored]
    write_atomically(files["results"], json.dumps(boxes).encode())
    if "mask_AP" in metrics:
        files["mask results"] = out / "val.segm.json"
        masks = [{name: value for name, value in result.items() if name != "bbox"} for result in stored]
        write_atomically(files["mask results"], json.dumps(masks).encode())
    write_json(files["metrics"], metrics)
    visualization.plot_precision_recall(
        evaluation.compute_precision_recall(dataset, results), files["precision-recall curves"], title
    )
    visualization.plot_confusion_matrix(
        evaluation.compute_confusion_matrix(dataset, results), dataset.names, files["confusion matrix"]
    )
    visualization.plot_ap_by_size(metrics, files["AP by object size"], title)
    if (grid := draw_worst_images(dataset, results)) is None:
        del files["worst images"]
    else:
        visualization.save_image(grid, files["worst images"])
    return files


def require_class_names(dataset: DetectionDataset, names: Iterable[str], source: str) -> None:
    """Check that the data's classes are those of the model, in the same order.

    Raises:
        InputError: They differ.
    """
    names = tuple(names)
    if names != dataset.names:
        raise InputError(
            f"{source} knows the {format_count(len(names), 'class')} {shorten_list(names)}, but {dataset.source} has "
            "the "
            f"{format_count(len(dataset.names), 'class')} {shorten_list(dataset.names)}: use data with the same class "
            "names"
        )
