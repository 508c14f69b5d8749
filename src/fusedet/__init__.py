"""fusedet: object detection with feature pyramids on plain PyTorch.

Every command of the command line is a function here with the same name and the same settings:

>>> import fusedet
>>> fusedet.train("retinanet_r50", data="data/coco", train={"epochs": 24}, out="runs/a")  # doctest: +SKIP
>>> fusedet.validate("runs/a").metrics["AP"]  # doctest: +SKIP
>>> fusedet.load("runs/a").predict("street.jpg").boxes  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DivergenceError": "errors",
    "InputError": "errors",
    "Prediction": "api.predict",
    "Predictor": "api.predict",
    "StorageError": "errors",
    "ablate": "ablation.command",
    "browse": "api.browse",
    "cam": "api.cam",
    "check_dataset": "api.check_dataset",
    "compare": "api.compare",
    "convert_dataset": "api.convert_dataset",
    "convert_weights": "api.convert_weights",
    "create_model": "models.detectors",
    "demo": "api.demo",
    "export": "api.export",
    "info": "api.info",
    "load": "api.predict",
    "predict": "api.predict_files",
    "preview_ablation": "ablation.command",
    "resolve_config": "api.settings",
    "progress_bar": "api.progress",
    "train": "api.train",
    "validate": "api.validate_run",
}
"""Public names and the modules that define them."""

__all__ = [
    "DivergenceError",
    "InputError",
    "Prediction",
    "Predictor",
    "StorageError",
    "__version__",
    "ablate",
    "browse",
    "cam",
    "check_dataset",
    "compare",
    "convert_dataset",
    "convert_weights",
    "create_model",
    "demo",
    "export",
    "info",
    "load",
    "predict",
    "preview_ablation",
    "progress_bar",
    "resolve_config",
    "train",
    "validate",
]

if TYPE_CHECKING:
    from fusedet.ablation.command import ablate, preview_ablation
    from fusedet.api.browse import browse
    from fusedet.api.cam import cam
    from fusedet.api.check_dataset import check_dataset
    from fusedet.api.compare import compare
    from fusedet.api.convert_dataset import convert_dataset
    from fusedet.api.convert_weights import convert_weights
    from fusedet.api.demo import demo
    from fusedet.api.export import export
    from fusedet.api.info import info
    from fusedet.api.predict import Prediction, Predictor, load
    from fusedet.api.predict_files import predict
    from fusedet.api.progress import progress_bar
    from fusedet.api.settings import resolve_config
    from fusedet.api.train import train
    from fusedet.api.validate_run import validate
    from fusedet.errors import DivergenceError, InputError, StorageError
    from fusedet.models.detectors import create_model


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and timm take seconds, which `fusedet --help` does without."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fusedet' has no attribute '{name}'")
    return getattr(import_module(f"fusedet.{_PUBLIC[name]}"), name)
