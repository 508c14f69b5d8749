"""fusedet: object detection with feature pyramids on plain PyTorch.

Every command of the command line is a function here with the same name and the same settings:

>>> import fusedet
>>> fusedet.train("retinanet_r50", data="data/coco", train={"epochs": 24}, out="runs/a")  # doctest: +SKIP
>>> fusedet.validate("runs/a").metrics["AP"]  # doctest: +SKIP
>>> fusedet.load("runs/a").predict("street.jpg").boxes  # doctest: +SKIP
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_PUBLIC = {
    "DivergenceError": "errors",
    "InputError": "errors",
    "Interrupted": "engine.signals",
    "Prediction": "api.prediction",
    "Predictor": "api.predictor",
    "StorageError": "errors",
    "ablate": "ablation.command",
    "benchmark": "api.benchmark",
    "browse": "api.browse",
    "cam": "api.cam",
    "check_dataset": "api.check_dataset",
    "compare": "api.compare",
    "convert_dataset": "api.convert_dataset",
    "convert_weights": "api.convert_weights",
    "create_app": "app.command",
    "create_model": "models.detectors",
    "demo": "api.demo",
    "estimate_power": "ablation.command",
    "export": "api.export",
    "get_weights": "api.weights",
    "info": "api.info",
    "list_weights": "api.weights",
    "load": "api.predictor",
    "locate_weights": "api.weights",
    "measure_tiles": "api.tiles_help",
    "predict": "api.predict",
    "preview_ablation": "ablation.command",
    "read_dataset": "data.readers.auto",
    "resolve_config": "api.settings",
    "serve_app": "app.command",
    "train": "api.train",
    "validate": "api.validate",
}
"""Public names and the modules that define them."""

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # the aliases mark public names
    from fusedet.ablation.command import ablate as ablate
    from fusedet.ablation.command import estimate_power as estimate_power
    from fusedet.ablation.command import preview_ablation as preview_ablation
    from fusedet.api.benchmark import benchmark as benchmark
    from fusedet.api.browse import browse as browse
    from fusedet.api.cam import cam as cam
    from fusedet.api.check_dataset import check_dataset as check_dataset
    from fusedet.api.compare import compare as compare
    from fusedet.api.convert_dataset import convert_dataset as convert_dataset
    from fusedet.api.convert_weights import convert_weights as convert_weights
    from fusedet.api.demo import demo as demo
    from fusedet.api.export import export as export
    from fusedet.api.info import info as info
    from fusedet.api.predict import predict as predict
    from fusedet.api.prediction import Prediction as Prediction
    from fusedet.api.predictor import Predictor as Predictor
    from fusedet.api.predictor import load as load
    from fusedet.api.settings import resolve_config as resolve_config
    from fusedet.api.tiles_help import measure_tiles as measure_tiles
    from fusedet.api.train import train as train
    from fusedet.api.validate import validate as validate
    from fusedet.api.weights import get_weights as get_weights
    from fusedet.api.weights import list_weights as list_weights
    from fusedet.api.weights import locate_weights as locate_weights
    from fusedet.app.command import create_app as create_app
    from fusedet.app.command import serve_app as serve_app
    from fusedet.data.readers.auto import read_dataset as read_dataset
    from fusedet.engine.signals import Interrupted as Interrupted
    from fusedet.errors import DivergenceError as DivergenceError
    from fusedet.errors import InputError as InputError
    from fusedet.errors import StorageError as StorageError
    from fusedet.models.detectors import create_model as create_model


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and timm take seconds, which `fusedet --help` does without."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fusedet' has no attribute '{name}'")
    return getattr(import_module(f"fusedet.{_PUBLIC[name]}"), name)
