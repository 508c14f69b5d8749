"""The comparison of an exported file with PyTorch, without which no file is kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from fusedet.data.shape_drawing import draw_image
from fusedet.data.transforms import keep_ratio_size
from fusedet.errors import InputError
from fusedet.types import MULTIPLE

Array = np.ndarray
Run = Callable[[Array, Array], Mapping[str, Array]]
"""Function of images (N, 3, H, W) uint8 and sizes (N, 2) int64 to outputs by name."""


@dataclass(frozen=True)
class Tolerance:
    """What counts as equal.

    Attributes:
        corner: Largest difference of a corner, in pixels; or
        iou: Least IoU of the boxes.
        score: Largest difference of scores.
        mask: Largest difference of a mask's probabilities.
        noise: Relative change of the outputs of PyTorch's head that shows which detections rounding decides.
    """

    corner: float = 0.05
    iou: float = 0.99
    score: float = 1e-3
    mask: float = 1e-2
    noise: float = 1e-5


TOLERANCES = {
    "fp32": Tolerance(),
    "fp16": Tolerance(corner=0.5, iou=0.97, score=0.01, mask=0.05, noise=2e-3),
    "bf16": Tolerance(corner=2.0, iou=0.9, score=0.05, mask=0.2, noise=2e-2),
}
"""The tolerance of each precision. int8 has its price in AP instead."""
MAX_UNDECIDED = 0.5
"""The largest share of all detections that rounding may decide."""


class Case(NamedTuple):
    """An input: its name, images (N, 3, H, W) uint8, and sizes (N, 2) int64."""

    name: str
    images: Array
    sizes: Array


@dataclass(frozen=True)
class OutputComparison:
    """How far a file is from PyTorch for one input.

    Attributes:
        case: Name of the input.
        shape: Its shape.
        detections: Detections in PyTorch; without the final selection, candidates.
        undecided: Detections without partner that PyTorch itself loses or adds after a change by `Tolerance.noise`.
        box: Largest difference of a corner of partners, in pixels.
        score: Largest difference of their scores.
        mask: Largest difference of their masks' probabilities; None without masks.
        reached_limit: Whether an image has `max_det` detections.
    """

    case: str
    shape: list[int]
    detections: int
    undecided: int
    box: float
    score: float
    mask: float | None
    reached_limit: bool

    def to_dict(self) -> dict[str, Any]:
        """Return all fields."""
        return asdict(self)


def make_cases(
    short: int, long: int, canvas: tuple[int, int] | None = None, batch: int | None = None, least: int = MULTIPLE
) -> list[Case]:
    """Make the inputs: scenes of different sizes, noise, black, several images, no detection, many objects.

    Args:
        short: Short side of resized images, in pixels.
        long: Maximum of their long side.
        canvas: Height and width of the input; None for multiples of 32.
        batch: Images per input; None for one, and three in one case.
        least: Least height and width of the input.
    """
    rng = np.random.default_rng(0)

    def place(images: Sequence[Array], sizes: Sequence[tuple[int, int]] | None = None) -> tuple[Array, Array]:
        """Fill the batch with images (H, W, 3) on a common canvas."""
        images = [images[i % len(images)] for i in range(batch or len(images))]
        sides = [image.shape[:2] for image in images]
        height, width = canvas or (-(-max(least, *side) // MULTIPLE) * MULTIPLE for side in zip(*sides))
        canvases = np.zeros((len(images), 3, height, width), np.uint8)
        for into, image in zip(canvases, images):
            into[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
        inside = sides if sizes is None else [sizes[0]] * len(images)
        return canvases, np.array(inside, np.int64)

    def fit(height: int, width: int, part: float = 1.0) -> tuple[int, int]:
        h, w = keep_ratio_size(height, width, max(1, round(short * part)), max(1, round(long * part)))
        shrink = min(1.0, canvas[0] / h, canvas[1] / w) if canvas else 1.0
        return max(1, int(h * shrink)), max(1, int(w * shrink))

    def scene(height: int, width: int) -> Array:
        side = max(height, width, 32)
        return draw_image(rng, (side, side))[0][:height, :width]

    def noise(height: int, width: int) -> Array:
        return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)

    def mosaic(height: int, width: int, tiles: int = 4) -> Array:
        rows, columns = -(-height // tiles), -(-width // tiles)
        grid = [np.concatenate([scene(rows, columns) for _ in range(tiles)], axis=1) for _ in range(tiles)]
        return np.concatenate(grid)[:height, :width]

    wide, tall, small = fit(3, 4), fit(3, 2), fit(5, 7, 0.6)
    inputs = {
        "landscape scene": place([scene(*wide)]),
        "portrait scene": place([scene(*tall)]),
        "small scene": place([scene(*small)]),
        "noise": place([noise(*wide)]),
        "black": place([np.zeros((*wide, 3), np.uint8)]),
        "batch of three": place([scene(*wide), scene(*tall), scene(*small)]),
        "no detection": place([scene(*small)], [(0, 0)]),
        "many objects": place([mosaic(*wide)]),
    }
    return [Case(name, *arrays) for name, arrays in inputs.items()]


def compare_outputs(
    case: Case,
    expected: Mapping[str, Array],
    actual: Mapping[str, Array],
    tolerance: Tolerance,
    source: str,
    nudged: Callable[[], Iterable[Mapping[str, Array]]] = tuple,
) -> OutputComparison:
    """Compare the outputs of a file with those of PyTorch, detection by detection.

    Every detection needs a partner of the same label, with a box and a score within the tolerance; order does not
    count. Where two scores are equal up to rounding, or one lies at a threshold, PyTorch itself detects something else
    after a small change. A detection without partner that appears or disappears in such a run is
    undecided. Without the final selection, candidates are compared one by one.

    Args:
        case: The input.
        expected: PyTorch's outputs by name.
        actual: The file's outputs by name.
        tolerance: What counts as equal.
        source: The file, for messages.
        nudged: Yields PyTorch's outputs after changes by `tolerance.noise`; as many are computed as are needed.

    Raises:
        InputError: A detection has no partner.
    """
    if "counts" not in expected:
        return _compare_candidates(case, expected, actual, tolerance, source)
    worst, undecided, place = (
        {"box": 0.0, "score": 0.0, "mask": 0.0},
        0,
        f"{source} differs from PyTorch in '{case.name}'",
    )
    for i in range(len(expected["counts"])):
        ours, theirs = _detections(expected, i), _detections(actual, i)
        partners = _match(ours, theirs, tolerance)
        for a, b in partners.items():
            values = {"box": (ours["boxes"][a] - theirs["boxes"][b]).abs().max()}
            values["score"] = (ours["scores"][a] - theirs["scores"][b]).abs()
            if "masks" in ours:
                values["mask"] = (ours["masks"][a] - theirs["masks"][b]).abs().max()
            worst = {name: max(value, float(values.get(name, 0))) for name, value in worst.items()}
        missing = [a for a in range(len(ours["scores"])) if a not in partners]
        extra = [b for b in range(len(theirs["scores"])) if b not in partners.values()]
        if not missing and not extra:
            continue
        lost, added = set(missing), set(extra)
        for outputs in nudged():
            run = _detections(outputs, i)
            lost &= _match(ours, run, tolerance).keys()
            added -= set(_match(run, theirs, tolerance).values())
            if not lost and not added:
                break
        if lost:
            raise InputError(f"{place}, image {i}: {_nearest(ours, min(lost), theirs)}; nothing was written")
        if added:
            raise InputError(
                f"{place}, image {i}, by one too many: {_nearest(theirs, min(added), ours)}; nothing was written"
            )
        undecided += max(len(missing), len(extra))
    count = int(expected["counts"].sum())
    if worst["mask"] > tolerance.mask:
        raise InputError(f"{place}: a mask differs by {worst['mask']:.3f}; nothing was written")
    mask = worst["mask"] if "masks" in expected else None
    reached = bool((expected["counts"] == expected["scores"].shape[1]).any())
    shape = list(case.images.shape)
    return OutputComparison(case.name, shape, count, undecided, worst["box"], worst["score"], mask, reached)


def compute_similarity(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> float:
    """Compute how alike two sets of detections of the same images are: 0 to 1, for equal ones.

    Every expected detection has a best partner of its label, by IoU times the ratio of the smaller to the larger score.
    The result is the mean of these products, weighted by the expected scores; 1 where nothing is expected.
    """
    total, weight = 0.0, 0.0
    for i in range(len(expected["counts"])):
        ours, theirs = _detections(expected, i), _detections(actual, i)
        weight += float(ours["scores"].sum())
        if len(ours["scores"]) and len(theirs["scores"]):
            a, b = ours["scores"][:, None], theirs["scores"]
            alike = box_iou(ours["boxes"], theirs["boxes"]) * torch.minimum(a, b) / torch.maximum(a, b)
            alike = torch.where(ours["labels"][:, None] == theirs["labels"], alike, 0.0)
            total += float((alike.amax(dim=1) * ours["scores"]).sum())
    return total / weight if weight else 1.0


def _detections(outputs: Mapping[str, Array], i: int) -> dict[str, Tensor]:
    """Return the real detections of image i."""
    count = int(outputs["counts"][i])
    return {name: torch.from_numpy(np.asarray(outputs[name][i][:count])) for name in outputs if name != "counts"}


def _match(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: Tolerance) -> dict[int, int]:
    """Give each detection of an image the nearest partner that is left, if one is within the tolerance."""
    if not len(ours["scores"]) or not len(theirs["scores"]):
        return {}
    corners = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=2)  # (D, D')
    fits = (corners <= tolerance.corner) | (box_iou(ours["boxes"], theirs["boxes"]) >= tolerance.iou)
    fits &= ours["labels"][:, None] == theirs["labels"]
    fits &= (ours["scores"][:, None] - theirs["scores"]).abs() <= tolerance.score
    distance, partners = torch.where(fits, corners, torch.inf), {}
    for k in range(len(distance)):
        least, index = distance[k].min(dim=0)
        if least.isfinite():
            partners[k] = int(index)
            distance[:, index] = torch.inf
    return partners


def _nearest(ours: dict[str, Tensor], k: int, theirs: dict[str, Tensor]) -> str:
    """Describe detection k and the nearest one on the other side."""

    def describe(side: dict[str, Tensor], i: int) -> str:
        box = ", ".join(f"{x:.2f}" for x in side["boxes"][i].tolist())
        return f"label {int(side['labels'][i])}, score {float(side['scores'][i]):.4f}, box [{box}]"

    own = f"the detection of {describe(ours, k)} has no partner"
    if not len(theirs["scores"]):
        return own
    corners = (ours["boxes"][k] - theirs["boxes"]).abs().amax(dim=1)
    return f"{own}, the nearest has {describe(theirs, int(corners.argmin()))}"


def _compare_candidates(
    case: Case, expected: Mapping[str, Array], actual: Mapping[str, Array], tolerance: Tolerance, source: str
) -> OutputComparison:
    limits = {"boxes": tolerance.corner, "scores": tolerance.score, "quality": tolerance.score}
    worst = {}
    for name, ours in expected.items():
        worst[name] = float(np.abs(ours - actual[name]).max()) if ours.shape == actual[name].shape else float("inf")
        if not worst[name] <= limits[name]:
            raise InputError(
                f"{source} differs from PyTorch in the case '{case.name}': its {name} by {worst[name]:g}, more than "
                f"{limits[name]:g}; nothing was written"
            )
    shape, count = list(case.images.shape), expected["scores"].size
    return OutputComparison(
        case.name, shape, count, 0, worst["boxes"], max(worst["scores"], worst.get("quality", 0)), None, False
    )
