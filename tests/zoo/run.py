"""Try to convert every model of a list of MMDetection's published models: config, names and shapes of the weights.

    python tests/zoo/run.py ../shared/zoo/zoo.jsonl.gz

prints a line per model, `NAME ok` or `NAME refused: sentence`, and at the end the number of converted ones. A model is
`ok` if its config converts, the detector is built, and every weight has a counterpart of the same shape. Weights and
detectors have shapes only, no values.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fusedet import config
from fusedet.errors import InputError
from fusedet.interop.conversion import convert_mmdetection_weights, count_classes
from fusedet.interop.mmdetection.detector_config import convert_config


def convert(model: dict[str, Any]) -> tuple[config.Config, int]:
    """Convert a model of the list and return its config and number of classes.

    Raises:
        InputError: The model is not supported.
    """
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in model["keys"].items()}
        options = config.parse(convert_config({"model": model["model"]}, state).tree)
        count = count_classes(state, options)
        convert_mmdetection_weights(state, options, count, model["name"])
    return options, count


def run(file: Path, step: int = 1) -> Iterator[tuple[dict[str, Any], tuple[config.Config, int] | InputError]]:
    """Yield every model, or each `step`-th, with its config and number of classes or with the refusal."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in list(lines)[::step]:
            model = json.loads(line)
            try:
                made = convert(model)
            except InputError as error:
                yield model, error
            else:
                yield model, made


if __name__ == "__main__":
    count = converted = 0
    for model, made in run(Path(sys.argv[1])):
        is_converted = not isinstance(made, InputError)
        print(model["name"], "ok" if is_converted else f"refused: {made}", flush=True)
        count, converted = count + 1, converted + is_converted
    print(f"converted {converted} of {count}")
