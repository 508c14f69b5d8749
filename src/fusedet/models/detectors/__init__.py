"""One-stage and two-stage detectors, and the functions that build them from a config."""

from fusedet.models.detectors.factory import (
    DetectorModule,
    build_detector,
    build_meta_detector,
    create_model,
    disable_pretrained,
    selection_options,
)
from fusedet.models.detectors.inference import prepare_for_inference
from fusedet.models.detectors.neck_chain import NeckChain
from fusedet.models.detectors.one_stage import OneStage
from fusedet.models.detectors.two_stage import TwoStage, TwoStageOutputs

__all__ = [
    "DetectorModule",
    "NeckChain",
    "OneStage",
    "TwoStage",
    "TwoStageOutputs",
    "build_detector",
    "build_meta_detector",
    "create_model",
    "disable_pretrained",
    "prepare_for_inference",
    "selection_options",
]
