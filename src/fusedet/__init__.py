"""fusedet: object detection with feature pyramids on plain PyTorch."""

from fusedet.detectors import create_model
from fusedet.errors import InputError

__version__ = "0.1.0"

__all__ = ["InputError", "__version__", "create_model"]
