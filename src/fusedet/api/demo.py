"""Synthetic data, a small detector trained on it, and its predictions: the command `demo`, which downloads nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Unpack

from fusedet import config
from fusedet.api import run_dir
from fusedet.api.browse import draw_predictions
from fusedet.api.predictor import load
from fusedet.api.results import RunResult
from fusedet.api.settings import Settings, to_overrides
from fusedet.api.train import train
from fusedet.data import synthetic
from fusedet.data.readers.auto import read_dataset
from fusedet.errors import require_at_least

MODEL = "retinanet_tiny"
SHOWN = 16
"""Validation images whose predictions are drawn."""


def demo(
    *overrides: str,
    images: int = 800,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    **settings: Unpack[Settings],
) -> RunResult:
    """Generate a synthetic dataset, train `MODEL` on it, evaluate it and draw its predictions.

    Args:
        overrides: "key=value" texts for the model's config. `train.seed` is the seed of the images and of the training.
            `out` is the directory of data/, run/ and predictions.png, by default demo, demo-2, ...
        images: How many images are generated, 10 or more.
        say: Takes lines of progress.
        quiet: Whether the progress bar is left out.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A setting is wrong, or `out` is not empty.
    """
    require_at_least(10, images=images)
    texts = to_overrides(overrides, settings)
    options = config.load(MODEL, texts)
    target = run_dir.create_run_dir(options.out or run_dir.find_free_path(".", "demo"))
    data = synthetic.generate_dataset(target / "data", images=images, seed=options.train.seed)
    say(f"{images} generated images: {data}")
    trained = train(config.load(MODEL, [*texts, f"data={data}", f"out={target / 'run'}"]), say=say, quiet=quiet)
    dataset, drawn = read_dataset(data, "val"), target / "predictions.png"
    draw_predictions(load(trained.out), [dataset.path(i) for i in range(min(SHOWN, len(dataset)))], drawn)
    files = trained.files | {"predictions": drawn}
    return replace(trained, out=Path(target), files=files, title="RetinaNet on synthetic data: AP by object size")
