"""Images of a split with their ground truth and detections, those with the most errors first."""

from collections.abc import Callable

import torch
from PIL.Image import Image

from fusedet import evaluation, visualization
from fusedet.data.dataset import DetectionDataset
from fusedet.data.dataset_images import read_dataset_image
from fusedet.evaluation.results import Result

SHOWN = 0.3  # the least score of what is drawn


def draw_worst_images(dataset: DetectionDataset, results: list[Result], n: int = 12) -> Image | None:
    """Return the n images with the most errors: ground truth dashed, detections colored; None without any error."""
    drawn, captions = [], []
    paint = make_painter(dataset, results)
    for i, quality, misses, false in evaluation.find_worst_images(dataset, results, n=n, score=SHOWN):
        if (image := paint(i)) is not None:
            drawn.append(image)
            captions.append(f"{dataset.path(i).name}: F1 {quality:.2f}, {misses} missed, {false} false")
    return visualization.draw_image_grid(drawn, captions) if drawn else None


def make_painter(dataset: DetectionDataset, results: list[Result]) -> Callable[[int], Image | None]:
    """Return a function that draws the ground truth and detections of at least `SHOWN` in image i."""
    by_image: dict[int, list[Result]] = {}
    for result in results:
        if result["score"] >= SHOWN:
            by_image.setdefault(result["image_id"], []).append(result)
    labels = {c: k for k, c in enumerate(dataset.category_ids)}

    def paint(i: int) -> Image | None:
        record = dataset[i]
        if not record.path.is_file():  # results can be scored without the images
            return None
        detections = by_image.get(record.image_id, [])
        boxes = torch.tensor([r["bbox"] for r in detections]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        guess = (
            boxes,
            torch.tensor([labels[r["category_id"]] for r in detections]),
            torch.tensor([r["score"] for r in detections]),
        )
        counts = ~record.eval_ignore
        truth, ignore = (
            (torch.from_numpy(record.boxes[k]), torch.from_numpy(record.labels[k])) for k in (counts, ~counts)
        )
        return visualization.draw_comparison(
            read_dataset_image(dataset, record),
            truth,
            guess,
            dataset.names,
            score=SHOWN,
            ignore=ignore,
        )

    return paint
