"""fusedet: object detection with feature pyramids on plain PyTorch."""

__version__ = "0.1.0"

from fusedet.detectors import create_model
from fusedet.errors import InputError
from fusedet.verbs.predict import Prediction, Predictor, load

__all__ = ["InputError", "Prediction", "Predictor", "__version__", "create_model", "load"]
