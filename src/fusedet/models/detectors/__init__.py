"""Detectors: parts in one row, or in two stages; and the way from a config's names to one."""

from fusedet.models.detectors.factory import Detector, bare, create_model, from_config, selection, without_weights
from fusedet.models.detectors.inference import for_inference
from fusedet.models.detectors.neck_chain import Chain
from fusedet.models.detectors.one_stage import OneStage
from fusedet.models.detectors.two_stage import Found, Regions, TwoStage

__all__ = [
    "Chain",
    "Detector",
    "Found",
    "OneStage",
    "Regions",
    "TwoStage",
    "bare",
    "create_model",
    "for_inference",
    "from_config",
    "selection",
    "without_weights",
]
