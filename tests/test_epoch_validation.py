"""The validation of the last epoch is the evaluation of a run whose last weights are its best."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import fusedet


def test_the_last_weights_are_not_evaluated_twice(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the best, and their metrics are those of `validate` and of a resumed training, which detects again."""
    run = tmp_path / "run"
    config = fusedet.resolve_config(trained, [f"out={run}"])
    with monkeypatch.context() as once:
        once.setattr("fusedet.api.train.evaluate_detector", None)
        metrics = fusedet.train(config, quiet=True).metrics
    for again in (fusedet.train(run, resume=True, quiet=True), fusedet.validate(run)):
        assert json.dumps(again.metrics) == json.dumps(metrics)


def test_earlier_weights_that_are_the_best_are_evaluated(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second validation is not better, so the metrics are not those of its detections."""
    run, aps = tmp_path / "run", iter([0.5, 0.4])
    lower = SimpleNamespace(evaluate_coco=lambda *_, **__: {"AP": next(aps)})
    monkeypatch.setattr("fusedet.api.epoch_validation.evaluation", lower)
    config = fusedet.resolve_config(trained, ["train.epochs=2", "train.validate_every=1", f"out={run}"])
    metrics = fusedet.train(config, quiet=True).metrics
    assert json.dumps(metrics) == json.dumps(fusedet.validate(run).metrics)
