"""Published detection weights: listed, fetched and located, the command `weights`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from fusedet.api.results import CommandResult, group_lines
from fusedet.api.tables import published_weights_table
from fusedet.api.weights_cache import cached_checkpoint, fetch_weights, find_address, place_by_hand
from fusedet.errors import InputError
from fusedet.interop.published_weights import PublishedWeights, find_published_weights, list_published_weights

COLUMNS = (
    "name",
    "family",
    "backbone",
    "dataset",
    "box_ap",
    "mask_ap",
    "megabytes",
    "parameters",
    "multiply_adds",
    "license",
    "address",
)


@dataclass(frozen=True)
class WeightsList(CommandResult):
    """Published weights.

    Attributes:
        weights: Name, family, backbone, dataset, AP in percent as published, size, license and address of each.
    """

    weights: list[PublishedWeights]

    def to_dict(self) -> dict[str, Any]:
        """Return a row per name, and whether the weights are in the cache."""
        rows = [
            {key: getattr(weights, key) for key in COLUMNS} | {"is_cached": cached_checkpoint(weights).is_file()}
            for weights in self.weights
        ]
        return {"weights": rows}

    def __rich__(self) -> RenderableType:
        return published_weights_table(self.to_dict()["weights"])


@dataclass(frozen=True)
class WeightsLocation(CommandResult):
    """Where published weights are.

    Attributes:
        name: Their name.
        file: The converted checkpoint in the cache.
        is_cached: Whether it exists.
        address: From where the published file is fetched; with a mirror, its address or path there.
        by_hand: Where the published file may be put by hand.
    """

    name: str
    file: Path
    is_cached: bool
    address: str
    by_hand: Path

    def __rich__(self) -> RenderableType:
        if self.is_cached:
            return group_lines([str(self.file)])
        return group_lines(
            [
                f"{self.file} (not fetched yet)",
                f"it is fetched from {self.address}",
                f"or put the published file at {self.by_hand}",
            ]
        )


def list_weights(text: str = "") -> WeightsList:
    """List the detection weights that commands take by name; nothing is fetched.

    >>> [weights.name for weights in fusedet.list_weights("fcos_resnet50").weights]
    ['torchvision/fcos_resnet50_fpn']

    Args:
        text: A part of the name, family, backbone or dataset, in any case; by default all are listed.

    Raises:
        InputError: No weights have it.
    """
    known = list_published_weights().values()
    chosen = [
        weights
        for weights in known
        if text.lower() in " ".join((weights.name, weights.family, weights.backbone, weights.dataset)).lower()
    ]
    if not chosen:
        families = sorted({weights.family for weights in known})
        raise InputError(f"no published weights have '{text}' in their name: families are {', '.join(families)}")
    return WeightsList(chosen)


def get_weights(name: str) -> WeightsLocation:
    """Fetch and convert published weights, unless they are in the cache.

    >>> fusedet.get_weights("torchvision/fasterrcnn_resnet50_fpn_v2").file  # doctest: +SKIP

    Args:
        name: SOURCE/NAME, as `list_weights` lists it.

    Raises:
        InputError: The name is unknown, or the file cannot be fetched or is not the published one.
        StorageError: The cache cannot be written.
    """
    fetch_weights(name)
    return locate_weights(name)


def locate_weights(name: str) -> WeightsLocation:
    """Return where published weights are or will be; nothing is fetched.

    Args:
        name: SOURCE/NAME, as `list_weights` lists it.

    Raises:
        InputError: The name is unknown, or the mirror is neither a URL nor a folder.
    """
    weights = find_published_weights(name)
    file = cached_checkpoint(weights)
    return WeightsLocation(name, file, file.is_file(), find_address(weights), place_by_hand(weights))
