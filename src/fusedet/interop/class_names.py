"""Class names and category ids of a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

_LISTED = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, parking
meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag, tie,
suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis
racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog,
pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell
phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush
"""
COCO = tuple(" ".join(_LISTED.split()).split(", "))
_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(i for i in range(1, 91) if i not in _GAPS)


def resolve_class_names(meta: Any, count: int, notes: list[str]) -> tuple[list[str], list[int]]:
    """Return the class names and category ids of a checkpoint.

    The names are those of the checkpoint, else COCO's for 80 classes, else class_0, class_1, ... COCO's names have
    COCO's category ids, others have 1..K.

    Args:
        meta: The checkpoint's `meta`.
        count: Number of classes K of the weights.
        notes: Receives notes about assumptions.
    """
    names = _read_names(meta)
    if names and len(names) != count:
        notes.append(f"the checkpoint names {len(names)} classes, but its weights have {count}: the names are not used")
        names = None
    if names is None and count == len(COCO):
        notes.append("the checkpoint has no class names: its 80 classes are assumed to be COCO's")
        names = COCO
    if names is None:
        notes.append(f"the checkpoint has no class names: they are called class_0 to class_{count - 1}")
        names = [f"class_{i}" for i in range(count)]
    if [_normalize(name) for name in names] == [_normalize(name) for name in COCO]:  # 1.x has underscores
        return list(COCO), list(COCO_IDS)
    return list(names), list(range(1, count + 1))


def _read_names(meta: Any) -> Sequence[str] | None:
    """Return the class names in a checkpoint's meta, by the keys of 3.x, then of 2.x and 1.x."""
    holders = [meta.get("dataset_meta"), meta] if isinstance(meta, Mapping) else []
    for holder in (holder for holder in holders if isinstance(holder, Mapping)):
        for key in ("classes", "CLASSES"):
            names = [holder[key]] if isinstance(holder.get(key), str) else holder.get(key)
            if isinstance(names, (list, tuple)) and names and all(isinstance(name, str) for name in names):
                return names
    return None


def _normalize(name: str) -> str:
    return name.replace("_", " ").strip().lower()
