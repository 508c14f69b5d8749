"""The prediction of an image: detections with class names, as COCO results, as a table and drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from fusedet.data.large_images import LargeImage
from fusedet.types import Detections


@dataclass(frozen=True)
class Prediction(Detections):
    """Detections in pixels of the given image, with the class names and the image itself.

    Attributes:
        image: (3, H, W) uint8; with `test.tiles`, a `LargeImage` where the file is too large for memory.
        names: (K,) class names.
        category_ids: (K,) category ids of the dataset.
        path: The file of the image, if it came from a file.
        track_ids: (D,) int64 numbers of tracks in a video, -1 for none; None where nothing is tracked.
    """

    image: Tensor | LargeImage | None = None
    names: tuple[str, ...] = ()
    category_ids: tuple[int, ...] = ()
    path: Path | None = None
    track_ids: Tensor | None = None

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return what `Detections.to_coco` returns, by default with the dataset's category ids, and any `track_id`."""
        results = super().to_coco(image_id, category_ids or self.category_ids)
        for result, track in zip(results, [] if self.track_ids is None else self.track_ids.tolist()):
            if track >= 0:
                result["track_id"] = track
        return results

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame`, a row per detection: file, x1, y1, x2, y2, score, label, class, category_id.

        Raises:
            ImportError: pandas is not installed; the message has the command that installs it.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs the package pandas: pip install pandas") from error
        labels = self.labels.tolist()
        corners = dict(zip(("x1", "y1", "x2", "y2"), self.boxes.float().cpu().numpy().T))
        columns = {"file": str(self.path or ""), **corners, "score": self.scores.float().cpu().numpy(), "label": labels}
        columns["class"] = [self.names[label] if self.names else "" for label in labels]
        columns["category_id"] = [self.category_ids[label] if self.category_ids else label for label in labels]
        return pandas.DataFrame(columns, index=range(len(labels)))

    def plot(self, path: str | Path | None = None, score: float = 0.3) -> Image.Image:
        """Draw the boxes and masks on the image.

        Args:
            path: Where to save the figure; the extension chooses the format. None saves nothing.
            score: Least score of a drawn detection, in 0..1.

        Returns:
            The figure, in pixels of the image.

        Raises:
            ValueError: The prediction holds no image.
        """
        from fusedet import visualization  # it imports matplotlib, which predictions that are not drawn never need

        if self.image is None:
            raise ValueError("this prediction holds no image to draw on")
        keep = self.scores >= score
        masks = None if self.masks is None else self.masks[keep]
        image = self.image.read() if isinstance(self.image, LargeImage) else self.image
        tracks = None if self.track_ids is None else self.track_ids[keep]
        drawn = visualization.draw_boxes(
            image, self.boxes[keep], self.labels[keep], self.names, self.scores[keep], masks, track_ids=tracks
        )
        if path is not None:
            drawn.save(path)
        return drawn
