"""Latency of every published model that fusedet takes by name, on one thread of a CPU, beside RetinaNet R50.

    python benchmarks/zoo_latency.py ../shared/zoo/zoo.jsonl.gz docs/reference/latency.jsonl

writes a JSON line per architecture, after a first one about the machine; names with the same config share a line. A
second call continues where the first one stopped. A call takes one image from uint8 pixels to final boxes and masks,
with BatchNorm folded as `fusedet predict` does, without decoding and resizing of files. Each model takes turns with
RetinaNet R50. The milliseconds are those of the processor, which a busy machine hardly changes.

Weights are random, because they change nothing but the number of boxes that enter NMS. The score threshold is set so
that `CANDIDATES` boxes pass it, about as many as in an image with many objects.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision

from fusedet import config
from fusedet.api.benchmark_plan import draw_scene
from fusedet.api.timing import describe_machine, interleave, time_call
from fusedet.data.image_decoding import to_tensor
from fusedet.interop.conversion import count_classes
from fusedet.interop.mmdetection.detector_config import convert_config
from fusedet.interop.published_weights import find_published_weights, list_published_weights
from fusedet.interop.torchvision import convert_torchvision_weights
from fusedet.models.detectors import DetectorModule, TwoStage, build_detector, disable_pretrained, prepare_for_inference
from fusedet.types import Batch

SIZE = 256, 384
CANDIDATES = 500
REPEATS = 3
REFERENCE = "retinanet_r50"
Architecture = tuple[config.Config, int]


def list_architectures(zoo: Path) -> Iterator[tuple[str, Architecture]]:
    """Yield name, config and number of classes of all published weights; of two with one name the first."""
    left = set(list_published_weights())
    for name in sorted(left):
        if name.startswith("torchvision/"):
            yield name, convert_torchvision(name)
    with gzip.open(zoo, "rt", encoding="utf-8") as lines:
        for line in lines:
            model = json.loads(line)
            if (name := f"mmdet/{model['name']}") in left:
                left.remove(name)
                yield name, convert_mmdetection(model)


def convert_mmdetection(model: dict[str, Any]) -> Architecture:
    """Return config and number of classes of a model of the list."""
    with torch.device("meta"):
        state = {name: torch.empty(shape) for name, shape in model["keys"].items()}
    options = config.parse(convert_config({"model": model["model"]}, state).tree)
    return options, count_classes(state, options)


def convert_torchvision(name: str) -> Architecture:
    """Return config and number of classes of torchvision's weights, from names and shapes."""
    with torch.device("meta"):
        made = torchvision.models.get_model(name.partition("/")[2], weights=None, weights_backbone=None)
        converted = convert_torchvision_weights(made.state_dict(), find_published_weights(name).file)
    return config.parse(converted.tree), len(converted.names)


def identify(architecture: Architecture) -> str:
    """Return the same text for architectures of equal latency."""
    options, classes = architecture
    return json.dumps([options.model.model_dump(), options.test.model_dump(), classes], sort_keys=True, default=str)


def build(architecture: Architecture) -> DetectorModule:
    """Build the detector with random weights, folded for inference."""
    torch.manual_seed(0)
    options, classes = architecture
    return prepare_for_inference(build_detector(disable_pretrained(options), classes))


@torch.inference_mode()
def set_threshold(detector: DetectorModule, batch: Batch) -> None:
    """Set the score threshold so that `CANDIDATES` boxes pass it, or more of equal scores."""
    outputs = detector(batch.images, batch.sizes)
    if isinstance(detector, TwoStage):
        scores = detector.stages[-1].decode(outputs.raw, outputs.rois, outputs.counts).scores
    else:
        scores = detector.head.decode(outputs).scores
    if not scores.isfinite().all():
        raise ValueError("the scores are not finite")
    least = scores.flatten().topk(CANDIDATES).values[-1]
    detector.selection["score"] = least.nextafter(torch.zeros(())).item()  # equal scores pass too


def make_call(architecture: Architecture, batch: Batch) -> Callable[[], Any]:
    """Return the prediction of one image by a detector."""
    detector = build(architecture)
    set_threshold(detector, batch)
    return torch.inference_mode()(partial(detector.predict, batch))


def measure(call: Callable[[], Any], reference: Callable[[], Any]) -> dict[str, Any]:
    """Measure a prediction and the reference in turn; the ratio is that of processor times."""
    sides = {"model": partial(time_call, call), "reference": partial(time_call, reference)}
    results = interleave(sides, REPEATS, warmup=0)
    model, beside = ([span for _, span in results[side]] for side in sides)
    return {
        "processor_ms": round(1000 * statistics.median(span.processor for span in model), 1),
        "wall_ms": round(1000 * statistics.median(span.wall for span in model), 1),
        "ratio": round(statistics.median(a.processor / b.processor for a, b in zip(model, beside)), 3),
        "detections": len(results["model"][0][0][0]),
    }


def count_multiply_adds(group: tuple[Architecture, list[str]]) -> int:
    """Return the published multiply-adds of an architecture: the cheap ones are measured first."""
    return find_published_weights(group[1][0]).multiply_adds


def read_names(file: Path) -> set[str]:
    """Return the names that are measured already."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return {name for line in lines[1:] for name in json.loads(line)["names"]}


def main() -> None:
    """Measure what the file has not, and append to it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, help="the list of MMDetection's models")
    parser.add_argument("file", type=Path, help="the results, which are continued")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        image = to_tensor(draw_scene(SIZE, Path(folder) / "image.jpg"))
    batch = Batch(images=image[None], sizes=torch.tensor([SIZE]), ids=(0,), scales=torch.ones(1, 2))
    groups: dict[str, tuple[Architecture, list[str]]] = {}
    for name, architecture in list_architectures(options.zoo):
        groups.setdefault(identify(architecture), (architecture, []))[1].append(name)
    measured = read_names(options.file)
    reference = make_call((config.load(REFERENCE), 80), batch)
    with options.file.open("a", encoding="utf-8") as output:
        if not options.file.stat().st_size:
            about = {"size": SIZE, "candidates": CANDIDATES, "repeats": REPEATS, "reference": REFERENCE}
            output.write(json.dumps(about | {"machine": describe_machine()}) + "\n")
        for number, (architecture, names) in enumerate(sorted(groups.values(), key=count_multiply_adds), 1):
            if set(names) <= measured:
                continue
            result = measure(make_call(architecture, batch), reference)
            output.write(json.dumps({"names": names} | result) + "\n")
            output.flush()
            print(f"{number} of {len(groups)}: {names[0]} {result['processor_ms']} ms", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
