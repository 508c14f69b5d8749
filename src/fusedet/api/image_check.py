"""Check of the images before a training, and the record of those replaced in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from fusedet.api.run_dir import write_json
from fusedet.config import Config
from fusedet.data.bad_images import BadImageLog, count_allowed_bad_images, format_replacement_summary
from fusedet.data.dataset import DetectionDataset
from fusedet.data.validation import check_image_headers
from fusedet.errors import InputError


def check_images(config: Config, data: DetectionDataset, val: DetectionDataset, say: Callable[[str], None]) -> None:
    """Check the headers of all images: missing files, other file types, sizes that differ from the annotations.

    With `train.on_bad_image=skip`, a limited number of bad training images is reported and replaced in training.

    Raises:
        InputError: An image cannot be used, or with `skip` more than `train.max_bad_images` cannot.
    """
    skip, share = config.train.on_bad_image == "skip", config.train.max_bad_images
    for dataset in (data, val):
        bad = check_image_headers(dataset)
        passed = count_allowed_bad_images(len(data), share) if skip and dataset is data else 0
        if len(bad) > passed:
            limit = f", more than train.max_bad_images={share:g} allows" if passed else ""
            count = f"{len(bad)} of the {len(dataset)} images of {dataset.source} cannot be used{limit}, the first: "
            raise InputError((count if len(bad) > 1 else "") + bad[0])
        if bad:
            say(
                f"warning: {len(bad)} of the {len(data)} training images cannot be used and will be replaced, the "
                f"first: {bad[0]}"
            )


def record_replaced_images(ledger: BadImageLog, out: Path, say: Callable[[str], None]) -> None:
    """Report the images that a training replaced, and add their number to run.json; all processes call it."""
    rows = ledger.close()
    if ledger.rank == 0:
        about = json.loads((out / "run.json").read_text(encoding="utf-8"))
        about["replaced"] = {"images": len({row.image_id for row in rows}), "times": len(rows)}
        write_json(out / "run.json", about)
    if rows:
        say(format_replacement_summary(rows, out / "skipped.csv"))
