"""Images of a split with their ground truth and detections, those with the most errors first."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL.Image import Image

from fusedet import evaluation, visualization
from fusedet.data.dataset import DetectionDataset
from fusedet.data.dataset_images import read_dataset_image
from fusedet.evaluation.image_matching import IGNORED, match_images
from fusedet.evaluation.results import DetectionTable, Result, build_detection_table

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


def make_painter(
    dataset: DetectionDataset, results: Sequence[Result] | DetectionTable
) -> Callable[[int], Image | None]:
    """Return a function that draws the ground truth and detections of at least `SHOWN` in image i."""
    table = build_detection_table(dataset, results)

    def paint(i: int) -> Image | None:
        record = dataset[i]
        if not record.path.is_file():  # results can be scored without the images
            return None
        pairs = match_images(dataset, table.select(table.images == i), score=SHOWN)
        return visualization.draw_comparison(
            read_dataset_image(dataset, record),
            (record.boxes, record.labels, record.eval_ignore),
            (pairs.boxes, pairs.labels, pairs.scores, pairs.matches == IGNORED),
            np.where(pairs.matches < 0, -1, pairs.matches - int(dataset.offsets[i])),
            dataset.names,
        )

    return paint
