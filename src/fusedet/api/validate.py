"""Validation of a run, a checkpoint or stored results: the command `val`."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Unpack

from rich.console import Console

from fusedet import evaluation
from fusedet.api import coco_submission, exported, run_dir
from fusedet.api.detection import AnyDetector
from fusedet.api.detector_evaluation import (
    Evaluation,
    evaluate_detector,
    evaluate_results,
    require_class_names,
    write_report,
)
from fusedet.api.distributed import join_processes
from fusedet.api.load_model import rebuild_detector, weights_file
from fusedet.api.predictor import prepare_detector
from fusedet.api.progress import say_nothing
from fusedet.api.results import RunResult
from fusedet.api.run_report import write_run_page
from fusedet.api.settings import Settings, refuse_other_keys, resolve_config, to_overrides
from fusedet.config import Config
from fusedet.data.dataset import DetectionDataset
from fusedet.data.split_checks import describe_crowded_images
from fusedet.data.splits import read_split
from fusedet.data.usable_targets import require_usable_targets
from fusedet.errors import InputError, make_unknown_error
from fusedet.process_ranks import get_ranks

SETTABLE = ("data", "test", "device", "out")
"""What can be set where a trained model is validated."""
SETTABLE_OF_RESULTS = ("data", "test.max_det", "test.size_bins", "out")
"""What can be set where stored results are validated."""


def validate(
    source: str | Path,
    *overrides: str,
    split: str | None = None,
    voc: bool = False,
    evaluator: str = evaluation.EVALUATORS[0],
    submission: bool = False,
    trust: bool = False,
    progress: Console | None = None,
    say: Callable[[str], None] = say_nothing,
    **settings: Unpack[Settings],
) -> RunResult:
    """Evaluate a run, a checkpoint or stored results on a split, and write metrics, results and plots.

    >>> fusedet.validate("runs/a").metrics["AP"]  # doctest: +SKIP

    Args:
        source: A run directory, a checkpoint, a name of published weights, an exported model, or a file of results in
            COCO's format (.json).
        overrides: "key=value" texts for `data`, `test`, `device` and `out`.
        split: The split, by default `data.val`.
        voc: Whether VOC's AP is computed too; for VOC data it always is.
        evaluator: One of `evaluation.EVALUATORS`.
        submission: Whether the files that COCO's test server takes are written.
        trust: Whether the checkpoint's config may name classes of other packages, whose code then runs.
        progress: Shows how many batches are done, if it is a terminal.
        say: Takes warnings.
        settings: The same settings as `overrides`, by keyword. The data are the run's own by default.

    Returns:
        Metrics and files. In other processes than the first one it is empty.

    Raises:
        InputError: The source, the split or the data do not exist or do not fit together.
    """
    if evaluator not in evaluation.EVALUATORS:
        raise make_unknown_error("evaluator", evaluator, evaluation.EVALUATORS)
    is_first = not get_ranks()[0]
    say = say if is_first else say_nothing
    texts, path = to_overrides(overrides, settings), Path(source)
    model = None if path.suffix == ".json" else open_model(source, texts, trust)
    options = model.options if model else _read_options(path, texts)
    scored = split or options.data.val_split
    dataset = read_split(options.data, scored, need_images=model is not None)
    run_dir.check_new_dir(options.out)
    server_split = coco_submission.server_split(dataset, options.test.max_det) if submission else None
    if server_split and (warning := coco_submission.warn_if_incomplete(dataset, server_split)):
        say(warning)
    has_objects = len(dataset.labels) > 0
    if not has_objects and not submission:
        raise InputError(
            f"{dataset.source} has no objects to score by: use fusedet predict, or for COCO's server --submission"
        )
    if has_objects:
        require_usable_targets(dataset, for_training=False)
        if crowded := describe_crowded_images(dataset, options.test.max_det):
            say(f"warning: {crowded.message}")
    stored = [] if model else evaluation.load_results(path, dataset)
    if model:
        require_class_names(dataset, model.names, str(model.file))
        if path.is_dir() and options.data == model.saved.data and scored == options.data.val_split:
            _warn_of_other_images(path, options, dataset, say)
    with ExitStack() as stack:
        if is_first:
            free = options.out or run_dir.find_free_path(run_dir.parent_of(path), f"val-{Path(scored).stem}")
            target = stack.enter_context(run_dir.reserve_run_dir(free))
        if model:
            evaluated = _evaluate_model(model, dataset, voc, evaluator, progress)
        else:
            boxed = evaluation.add_mask_boxes(stored) if has_objects else stored
            if boxed is not stored:
                say(f"{source} holds masks only: the metrics of boxes are those of the masks' bounding boxes")
            evaluated = evaluate_results(dataset, boxed, options.test, voc=voc, evaluator=evaluator)
        if not is_first:
            return RunResult(path, {}, {})
        files: dict[str, Path] = {}
        name = f"{path.name} on {scored}"
        title = f"{model.file if model else source} on {scored} of {options.data.path}"
        if server_split:
            run = path.name if path.is_dir() else path.stem
            rows = coco_submission.format_results(dataset, stored or evaluated.results)
            files |= coco_submission.write_submission(rows, server_split, run, target)
        if has_objects:
            files |= write_report(dataset, evaluated.results, evaluated.metrics, target, title=name)
            files |= write_run_page(
                target,
                dataset,
                evaluated,
                title=name,
                scored=title,
                device=options.device,
                say=say,
                size_bins=options.test.size_bins or (),
                run=path if path.is_dir() else None,
            )
    return RunResult(target, evaluated.metrics, files, title)


def _read_options(results: Path, texts: list[str]) -> Config:
    """Return the config of the overrides for stored results, which have none of their own."""
    refuse_other_keys(texts, *SETTABLE_OF_RESULTS, of="stored results")
    options = resolve_config(None, texts)
    if options.data.path is None:
        raise InputError(f"{results} holds results: add data=PATH, the dataset that they were made on")
    return options


class OpenedModel(NamedTuple):
    """A trained or exported model, its own config, the config with the overrides, class names and file."""

    detector: AnyDetector
    saved: Config
    options: Config
    names: list[str]
    file: Path


def open_model(source: str | Path, texts: list[str], trust: bool) -> OpenedModel:
    """Open the model of a run, checkpoint, name of published weights or export, to validate it.

    Raises:
        InputError: There is no model, or an override changes nothing for it.
    """
    if (model := exported.load_exported(source, trust)) is None:
        refuse_other_keys(texts, *SETTABLE)
        file = weights_file(source)
        detector, saved, names, _ = rebuild_detector(file, trust)
        return OpenedModel(detector, saved, resolve_config(saved.replace(out=None), texts), names, file)
    refuse_other_keys(texts, *exported.SETTABLE, of="an exported model")
    options = resolve_config(model.config.replace(out=None), texts)
    exported.check_preprocessing(options.data, model.config.data)
    exported.check_device(options.device)
    return OpenedModel(model.detector, model.config, options.replace(device="cpu"), model.names, model.file)


def _evaluate_model(
    model: OpenedModel, dataset: DetectionDataset, voc: bool, evaluator: str, progress: Console | None
) -> Evaluation:
    """Detect the objects of a split, in all processes, and compute the metrics."""
    with join_processes(model.options.device) as (rank, world, device):
        ready = prepare_detector(model.detector.to(device), model.options, names=model.names)
        options: dict[str, Any] = {"rank": rank, "world": world, "voc": voc, "evaluator": evaluator}
        return evaluate_detector(ready, model.options, dataset, device, progress=progress, **options)


def _warn_of_other_images(run: Path, options: Config, dataset: DetectionDataset, say: Callable[[str], None]) -> None:
    """Warn where a share is held out, but other images than in the training: some of them were trained on."""
    known = run_dir.read_fingerprints(run) if isinstance(options.data.val, float) else None
    if known and known.get("val") != dataset.fingerprint():
        say(
            f"warning: {options.data.path} has changed, so data.val={options.data.val} holds out other images than "
            f"in the training, which saw some of them: {run / 'split.json'} lists those of the training"
        )
