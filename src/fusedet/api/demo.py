"""The demo: generated data, a small detector trained on it, what it finds; no download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from fusedet import config
from fusedet.api import run_dir
from fusedet.api.browse import predictions
from fusedet.api.predict import load
from fusedet.api.train import Trained, train
from fusedet.data import synthetic as scenes
from fusedet.data.readers.auto import read_dataset

MODEL = "retinanet_tiny"


def demo(
    overrides: Sequence[str], images: int, seed: int, *, say: Callable[[str], None] = print, quiet: bool = False
) -> Trained:
    """Generate `images` images, train on them as the overrides vary the model's config, draw 16 predictions.

    All of it goes into out=FOLDER, or demo, demo-2, ...: data/, run/ and predictions.png. Raises InputError as `train` does.
    """
    options = config.load(MODEL, overrides)
    target = run_dir.fresh(options.out) if options.out else run_dir.numbered(".", "demo")
    data = scenes.generate_dataset(target / "data", images=images, seed=seed)
    say(f"{images} generated images: {data}")
    trained = train(config.load(MODEL, [*overrides, f"data={data}", f"out={target / 'run'}"]), say=say, quiet=quiet)
    dataset, image = read_dataset(data, "val"), target / "predictions.png"
    predictions(load(trained.out), [dataset.path(i) for i in range(min(16, len(dataset)))], image)
    return replace(trained, files=trained.files | {"predictions": image})
