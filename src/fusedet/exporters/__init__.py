"""Export of detectors to torch.export, ONNX and OpenVINO, their comparison with PyTorch, and a runtime for the files.

An exported file takes `images`, uint8 RGB (N, 3, H, W), and `sizes`, int64 (N, 2), height and width inside the padding.
It returns `boxes`, `scores`, `labels`, `counts` and, of a detector with a mask branch, `masks`: `BatchDetections`.
"""

from fusedet.exporters.formats import FORMATS, write_format
from fusedet.exporters.graph import OUTPUTS, RAW_OUTPUTS, Shapes, trace
from fusedet.exporters.metadata import Metadata, find_export, read_export, write_description
from fusedet.exporters.runtime import ExportedDetector, open_session
from fusedet.exporters.verification import OutputComparison, Tolerance, compare_outputs, make_cases

__all__ = [
    "FORMATS",
    "OUTPUTS",
    "RAW_OUTPUTS",
    "ExportedDetector",
    "Metadata",
    "OutputComparison",
    "Shapes",
    "Tolerance",
    "compare_outputs",
    "find_export",
    "make_cases",
    "open_session",
    "read_export",
    "trace",
    "write_description",
    "write_format",
]
