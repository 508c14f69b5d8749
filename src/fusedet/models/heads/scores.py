"""Scores of dense heads from class logits, and their fusion with a predicted quality or objectness."""

from torch import Tensor

from fusedet.models.ops.layers import flatten_maps
from fusedet.types import Candidates, Outputs


def class_scores(outputs: Outputs, num_classes: int) -> Tensor:
    """Compute the scores (N, P, K), float32, the sigmoids of the map "cls"."""
    return flatten_maps(outputs.maps["cls"], num_classes).float().sigmoid()


def scores_with_objectness(outputs: Outputs, num_classes: int) -> Tensor:
    """Compute the scores (N, P, K), class scores times the map "centerness" as objectness (AutoAssign, DW)."""
    return class_scores(outputs, num_classes) * flatten_maps(outputs.maps["centerness"], 1).float().sigmoid()


def fuse_quality(candidates: Candidates) -> Candidates:
    """Replace the scores by the roots of scores times predicted quality (PAA, eq. 11; OTA; BorderDet)."""
    boxes, scores, quality = candidates
    assert quality is not None
    return Candidates(boxes, (scores * quality[..., None]).sqrt())
