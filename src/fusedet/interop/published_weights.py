"""Published detection weights by name: those of torchvision and MMDetection that can be converted."""

import gzip
import json
import os
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fusedet.errors import InputError, make_unknown_error

SOURCES = ("torchvision", "mmdet")
"""First parts of the names."""
_CONVERTED = re.compile(r"(retinanet|fcos|fasterrcnn|maskrcnn)_(resnet\d+)_fpn(_v2)?")
_TABLE = files("fusedet") / "interop" / "mmdetection" / "published.jsonl.gz"


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that another project publishes.

    Attributes:
        name: SOURCE/NAME, by which commands take them.
        family: The detector's family, as the source names it.
        backbone: timm's name of the backbone.
        dataset: The dataset that they were trained on.
        box_ap: AP of boxes in percent, as the source publishes it; None if it does not.
        mask_ap: The same of masks.
        megabytes: Size of the file; of MMDetection's, of the weights in it.
        parameters: Number of parameters; of torchvision's as it states it.
        multiply_adds: Of an image of 800 x 1280 pixels; of torchvision's as it states it, of its own image size.
        license: The license of the project that publishes them.
        address: Where the file is published.
        config: MMDetection's config of the model, with `test_pipeline`; None of torchvision.
    """

    name: str
    family: str
    backbone: str
    dataset: str
    box_ap: float | None
    mask_ap: float | None
    megabytes: float
    parameters: int
    multiply_adds: int
    license: str
    address: str
    config: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def file(self) -> str:
        """The file's name."""
        return unquote(self.address.rpartition("/")[2])

    @property
    def sha256(self) -> str:
        """The beginning of the file's SHA-256 in hexadecimal digits, which its name ends with."""
        return Path(self.file).stem.rpartition("-")[2]


def is_published_name(source: object) -> bool:
    """Return whether a source is a name of published weights, known or not, and no file or directory."""
    text = source.as_posix() if isinstance(source, Path) else source
    if not isinstance(text, str) or text.partition("/")[0] not in SOURCES or "/" not in text:
        return False
    return not os.path.exists(text)  # pathlib's raises for a name that is too long


@cache
def list_published_weights() -> dict[str, PublishedWeights]:
    """Return all published weights by name; no file is fetched."""
    return {weights.name: weights for weights in (*_list_torchvision(), *_list_mmdetection())}


def find_published_weights(name: str | Path) -> PublishedWeights:
    """Return the published weights of a name.

    Raises:
        InputError: The name is unknown.
    """
    text = name.as_posix() if isinstance(name, Path) else name
    known = list_published_weights()
    if text not in known:
        raise make_unknown_error("name of published weights", text, known, lister="fusedet weights")
    return known[text]


def require_source(name: str | Path) -> None:
    """Raise InputError for a name of published weights whose source is left out or misspelt.

    Args:
        name: A name that is no file, directory or config.
    """
    last = Path(name).name
    if meant := [known for known in list_published_weights() if known.partition("/")[2] == last]:
        raise InputError(f"'{name}' does not exist: did you mean the published weights '{meant[0]}'?")


def _list_torchvision() -> list[PublishedWeights]:
    """List torchvision's COCO detection weights; names, addresses, AP and sizes are its own."""
    from torchvision.models import detection, get_model_weights, list_models

    listed = []
    for name in list_models(module=detection):
        if (match := _CONVERTED.fullmatch(name)) is None:
            continue
        for weights in get_model_weights(name):
            average_precision = weights.meta["_metrics"]["COCO-val2017"]
            listed.append(
                PublishedWeights(
                    name=f"torchvision/{name}",
                    family=match[1],
                    backbone=match[2],
                    dataset="coco",
                    box_ap=average_precision.get("box_map"),
                    mask_ap=average_precision.get("mask_map"),
                    megabytes=weights.meta["_file_size"] * 2**20 / 1e6,  # theirs are MiB
                    parameters=weights.meta["num_params"],
                    multiply_adds=round(weights.meta["_ops"] * 1e9),
                    license="BSD-3-Clause",
                    address=weights.url,
                )
            )
    return listed


def _list_mmdetection() -> list[PublishedWeights]:
    """List MMDetection's weights from the table that `tests/zoo/write_table.py` writes."""
    try:
        lines = gzip.decompress(_TABLE.read_bytes()).decode().splitlines()
    except OSError as error:
        raise InputError(f"{_TABLE} is missing or damaged: install fusedet again") from error
    listed = []
    for line in lines:
        row = json.loads(line)
        config = {"model": row.pop("model"), "test_pipeline": [row.pop("resize")]}
        name = f"mmdet/{row.pop('name')}"
        listed.append(PublishedWeights(name=name, license="Apache-2.0", config=config, **row))
    return listed
