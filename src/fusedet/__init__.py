"""fusedet: object detection with feature pyramids on plain PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["InputError", "Prediction", "Predictor", "__version__", "create_model", "load"]

_HOMES = {
    "InputError": "errors",
    "Prediction": "api.predict",
    "Predictor": "api.predict",
    "create_model": "models.detectors",
    "load": "api.predict",
}

if TYPE_CHECKING:
    from fusedet.api.predict import Prediction, Predictor, load
    from fusedet.errors import InputError
    from fusedet.models.detectors import create_model


def __getattr__(name: str) -> Any:
    """Import a name when it is first asked for: a loader's worker needs no models, and they take seconds to import."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fusedet' has no attribute '{name}'")
    return getattr(import_module(f"fusedet.{_HOMES[name]}"), name)
