"""Detectors: parts in one row, or in two stages; and the way from a config's names to one."""

from fusedet.detectors.chain import Chain
from fusedet.detectors.inference import for_inference
from fusedet.detectors.making import Detector, bare, create_model, from_config, selection, without_weights
from fusedet.detectors.one_stage import OneStage
from fusedet.detectors.two_stage import Found, Regions, TwoStage

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
