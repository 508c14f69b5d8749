"""What a summary says in words: what its figures cover, notes, and paths that tell nothing of the machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Found = Mapping[str, Any]


def shorten_path(word: str, keep: int = 1) -> str:
    """A word of a command or a path, an absolute path in it told from where the command was given.

    Of one that shares no folder with that place, the last `keep` names: more would be the machine's own.

    >>> shorten_path("train.epochs=2"), shorten_path(os.path.abspath("runs/a")), shorten_path("data=" + os.path.abspath("b"))
    ('train.epochs=2', 'runs/a', 'data=b')
    """
    key, sign, path = word.partition("=")
    if not sign:
        path = word
    if not os.path.isabs(path):
        return word
    here = Path.cwd()
    if Path(path).parts[:2] == here.parts[:2]:
        short = os.path.relpath(path, here)
    else:
        short = "/".join(("...", *Path(path).parts[1:][-keep:]))
    return f"{key}={short}" if sign else short


def describe_coverage(found: Found) -> list[str]:
    """What each interval and figure stands for, as sentences."""
    val, level = found["data"]["val"], f"{100 * found['level']:g} %"
    several = sum(bool(row.get("difference")) for row in found["rows"])
    lines = [
        f"Measured on {val['images']} images of {val['source']}; published on what the paper says. Other data or another recipe "
        "give other levels: compare differences within a column, not the columns.",
        f"Over seeds ({level}): Student's t of the mean, for differences Welch's. It covers another seed on these very images.",
    ]
    if found["drawn"]:
        lines.append(
            f"Over images ({level}): percentiles of {found['resamples']} paired resamples of the images, of the mean over seeds. It "
            "covers other images drawn in the same way, with these very weights."
        )
    else:
        lines.append(f"Over images: none. {found['figure']} is not resampled, so nothing is said of other images.")
    if found["chosen"]:
        lines.append(
            "The weights of each run are those of its best validation, on the very images that are scored here: levels may be a little "
            "too high."
        )
    if several > 1:
        lines.append(
            f"{several} rows are compared with another one: of twenty intervals of rows that differ in nothing, about one misses 0."
        )
    return lines


def collect_notes(found: Found) -> list[str]:
    """What the table and its rows have to say: notes, shared runs and weights, what failed, and which seeds are lacking."""
    texts = [found["note"]] if found["note"] else []
    texts += [f"{row['label']}: {row['note']}" for row in found["rows"] if row["note"]]
    texts += [
        f"{row['label']}: the same config as '{row['same_as']}', whose runs it shares"
        for row in found["rows"]
        if row.get("same_as")
    ]
    texts += [
        f"{row['label']}: the weights of '{row['weights_of']}', scored as this row's test section says"
        for row in found["rows"]
        if row.get("weights_of")
    ]
    for row in found["rows"]:
        texts += [
            f"{row['label']}, seed {run['seed']}: {run['reason']}" for run in row.get("runs", ()) if run["reason"]
        ]
    done = {row["label"]: count_finished(row) for row in found["rows"] if not row["cited"]}
    if lacking := [f"{label} {count}" for label, count in done.items() if count < found["seeds"]]:
        texts.append(
            f"Finished seeds, of {found['seeds']}: {', '.join(lacking)}{'; all in the other rows' * (len(lacking) < len(done))}."
        )
    return list(dict.fromkeys(texts))


def count_finished(row: Found) -> int:
    """How many seeds of a row have finished."""
    return sum(run["state"] == "finished" for run in row.get("runs", ()))


def describe_cost(found: Found) -> str:
    """What stands behind the figures of cost."""
    measured = [row["cost"] for row in found["rows"] if row.get("cost")]
    speeds = [cost["prediction"] for cost in measured if cost["prediction"]]
    sizes = dict.fromkeys("x".join(map(str, cost["image"])) for cost in measured)
    text = f"#Param are trainable ones; multiply-adds are of one image of {' or '.join(sizes)}."
    if speeds:
        text += (
            f" Latency: one image at a time on {speeds[0]['device']}, {speeds[0]['images']} images, the rows in turn. Peak memory: "
            "tensors alive at once in a prediction, weights included."
        )
    if places := dict.fromkeys(cost["training"]["device"] for cost in measured if cost["training"]):
        text += (
            f" Trained on {'; '.join(places)}. Training images per second are of each row's own training, at different moments: what "
            "else the machine did then is in them."
        )
    return text
