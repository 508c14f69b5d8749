"""Weights of other projects: MMDetection's and torchvision's detectors, read as data and renamed."""

from fusedet.interop.conversion import Converted, convert

__all__ = ["Converted", "convert"]
