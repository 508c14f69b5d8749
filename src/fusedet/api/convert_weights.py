"""Converted weights: another project's checkpoint becomes a folder like a run's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fusedet import interop
from fusedet.api import run_dir
from fusedet.engine import checkpoint
from fusedet.errors import InputError


def convert(
    source: str | Path, target: str | Path, config: str | None = None, overrides: Sequence[str] = ()
) -> tuple[Path, interop.ConvertedCheckpoint]:
    """Convert a checkpoint of MMDetection or torchvision; where its weights are written, and what they are.

    target: a new folder, which then holds config.yaml, best.safetensors and run.json; or a file, NAME.safetensors.
    Raises InputError for a target that is there, and as `interop.convert_checkpoint` does; nothing is then written.
    """
    target = Path(target)
    alone = target.suffix == ".safetensors"
    if alone and target.exists():
        raise InputError(f"{target} exists: nothing is overwritten, choose another name")
    if not alone:
        run_dir.check(target)
    found = interop.convert_checkpoint(source, config, overrides)
    lists = {"names": json.dumps(found.names), "category_ids": json.dumps(found.category_ids)}
    meta = {"config": found.config.to_yaml(), "format": "fusedet", **lists}
    if alone:
        target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save_weights(target, found.weights, meta)
        return target, found
    file = run_dir.fresh(target) / "best.safetensors"
    checkpoint.save_weights(file, found.weights, meta)
    (target / "config.yaml").write_text(found.config.to_yaml(), encoding="utf-8")
    run_dir.write_json(target / "run.json", {"converted from": str(source), "config": config, "notes": found.notes})
    return file, found
