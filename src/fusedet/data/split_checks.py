"""Checks of one split and of two: usable targets, class names, crowded images, and images that are in both."""

from collections.abc import Sequence

import numpy as np

from fusedet.data import class_balance, class_names, usable_targets
from fusedet.data.annotation_cleaning import MARGIN
from fusedet.data.dataset import DetectionDataset
from fusedet.data.duplicate_images import ImagePrint, find_shared_images
from fusedet.data.findings import Finding
from fusedet.errors import format_count, shorten_list

NO_ANNOTATIONS = "classes without annotations"

_IMBALANCE = 20  # times as many images of the most frequent class
_REPEATED = 3  # times that images of the rarest class are seen with the advised balance
_BOX_CONVENTIONS = {
    "coco": "x, y, width, height, as COCO does",
    "imagefolder": "x, y, width, height, as COCO does",
    "yolo": "the center, width and height, as YOLO does",
}
_SHOWN = 3  # examples that a sentence names


def check_targets(dataset: DetectionDataset, *, for_training: bool = True) -> list[Finding]:
    """Return an error for a split without a usable target, or a warning where many are unusable."""
    groups = usable_targets.find_unusable_targets(dataset, for_training=for_training)
    if error := usable_targets.describe_unusable_split(dataset, groups):
        advice = groups[0].advice if groups else "add annotations"
        number = sum(group.number for group in groups)
        example = groups[0].example if groups else dataset.source
        return [Finding("error", error, "splits without a usable target", number, example, advice)]
    if warning := usable_targets.describe_many_unusable(dataset, groups):
        number = sum(group.number for group in groups)
        return [Finding("warning", warning, "unusable targets", number, groups[0].example, groups[0].advice)]
    return []


def check_box_convention(dataset: DetectionDataset) -> list[Finding]:
    """Return a warning where boxes are rather x1, y1, x2, y2 than what their format holds.

    All boxes then lie in their image when read so, and more than a fifth leaves it when read as the format's.
    """
    boxes = dataset.boxes.numpy()
    if dataset.dataset_format not in _BOX_CONVENTIONS or not len(boxes):
        return []
    image_indices = dataset.image_indices
    limits = dataset.sizes.numpy()[image_indices][:, ::-1]
    is_center = dataset.dataset_format == "yolo"
    start = boxes[:, :2] + (boxes[:, 2:] - boxes[:, :2]) / 2 * is_center  # the first two values as they are written
    end = boxes[:, 2:] - boxes[:, :2]  # the last two
    leaves = ((boxes[:, :2] < -MARGIN) | (boxes[:, 2:] > limits + MARGIN)).any(axis=1)
    is_pair = ((end > start) & (end <= limits + MARGIN) & (start >= -MARGIN)).all(axis=1)
    if not is_pair.all() or leaves.mean() <= usable_targets.MOST_UNUSABLE:
        return []
    example = str(dataset.path(int(image_indices[leaves.argmax()])))
    kind, advice = "boxes that look like x1, y1, x2, y2", f"write {_BOX_CONVENTIONS[dataset.dataset_format]}"
    message = (
        f"{kind}: {int(leaves.sum())} of {len(boxes)} leave their image, and none if read so; {advice} ({example})"
    )
    return [Finding("warning", message, kind, len(boxes), example, advice)]


def check_class_names(dataset: DetectionDataset) -> list[Finding]:
    """Return what is wrong with the class names: repeated, similar, or without annotations."""
    findings = []
    used, unused = class_names.describe_repeated_names(dataset)
    kind = "names that several classes share"
    findings += [Finding("error", s, kind, 1, dataset.source, "rename one, or give both one id") for s in used]
    findings += [Finding("warning", s, kind, 1, dataset.source, "remove those without annotations") for s in unused]
    findings += [
        Finding("warning", sentence, "similar class names", count, example, "write one name if they are one class")
        for sentence, count, example in class_names.describe_similar_names(dataset)
    ]
    counts = class_names.count_per_label(dataset)
    absent = [name for name, n in zip(class_names.label_classes(dataset), counts, strict=True) if n == 0]
    if absent:
        message = f"no annotation of {'class' if len(absent) == 1 else 'classes'} {', '.join(absent)}"
        advice = "add annotations, or remove the class"
        findings.append(Finding("warning", message, NO_ANNOTATIONS, len(absent), dataset.source, advice))
    return findings


def describe_rare_classes(dataset: DetectionDataset) -> Finding | None:
    """Return a note about classes that are in far fewer images than the most frequent one; None without any.

    It says when `train.balance` helps, and the value that shows images of the rarest class about three times.
    """
    counts = class_balance.count_images_per_class(dataset)
    used = counts[counts > 0]
    if not len(used) or used.max() < _IMBALANCE * used.min():
        return None
    rare = (counts > 0) & (counts * _IMBALANCE <= counts.max())
    least = int(np.where(rare, counts, counts.max()).argmin())
    threshold = float(f"{min(1.0, _REPEATED**2 * used.min() / len(dataset)):.1g}")
    names = [dataset.names[k] for k in np.flatnonzero(rare)]
    advice = f"train.balance={threshold:g} repeats their images"
    frequent = f"{dataset.names[int(counts.argmax())]} in {int(counts.max())}"
    fewest = f"{dataset.names[least]} is in {format_count(int(used.min()), 'image')}"
    message = (
        f"{format_count(len(names), 'rare class')} ({shorten_list(names, _SHOWN)}): {fewest}, {frequent}; {advice}"
    )
    return Finding("warning", message, "rare classes", len(names), dataset.source, advice, is_harmless=True)


def describe_crowded_images(dataset: DetectionDataset, max_det: int) -> Finding | None:
    """Return a warning about images with more objects than the evaluation looks at; None without any."""
    counted = np.concatenate([[0], np.cumsum(~dataset.eval_ignore.numpy())])
    per_image = np.diff(counted[dataset.offsets.numpy()])
    is_crowded = per_image > max_det
    if not is_crowded.any():
        return None
    most, example = int(per_image.max()), str(dataset.path(int(per_image.argmax())))
    images = format_count(int(is_crowded.sum()), "image")
    return Finding(
        "warning",
        f"{images} of {dataset.source} with more than test.max_det={max_det} objects, up to {most} ({example}): the "
        f"others cannot be detected; set test.max_det={most}, and see AP@{most}",
        "images with more objects than test.max_det",
        int(is_crowded.sum()),
        example,
        f"set test.max_det={most}",
    )


def compare_splits(
    train: DetectionDataset,
    val: DetectionDataset,
    train_prints: Sequence[ImagePrint | None] = (),
    val_prints: Sequence[ImagePrint | None] = (),
) -> list[Finding]:
    """Return what does not agree between two splits, and the images that are in both.

    Args:
        train: The training split.
        val: The validation split.
        train_prints: What identifies the training images, where they were decoded.
        val_prints: The same of the validation images.
    """
    findings = [
        Finding("error", sentence, "class names that differ between the splits", 1, val.source, "use the same classes")
        for sentence in class_names.compare_class_names(train, val)
    ]
    paths = [[dataset.path(i) for i in range(len(dataset))] for dataset in (val, train)]
    shared = find_shared_images(paths[0], paths[1], val_prints, train_prints)
    for pairs, kind in (
        (shared.same_file, "validation images that are files of the training split"),
        (shared.same_content, "validation images with the content of training images"),
        (shared.similar, "validation images that look nearly like training images"),
    ):
        if pairs:
            some = shorten_list((f"{paths[0][i]} = {paths[1][j]}" for i, j in pairs), _SHOWN)
            message = f"{kind}: {len(pairs)} of {len(val)}, so that metrics are too high: {some}"
            findings.append(
                Finding("warning", message, kind, len(pairs), str(paths[0][pairs[0][0]]), "remove them from one split")
            )
    return findings
