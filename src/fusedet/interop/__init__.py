"""Weights of other projects: MMDetection's and torchvision's detectors, read as data and renamed."""

from fusedet.interop.conversion import ConvertedCheckpoint, convert_checkpoint

__all__ = ["ConvertedCheckpoint", "convert_checkpoint"]
