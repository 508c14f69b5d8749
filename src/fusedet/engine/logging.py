"""Logs of a training: metrics.csv and speed.csv always, TensorBoard, W&B and MLflow on request."""

import csv
import io
import os
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.loggers import Logger, TensorBoardLogger
from torch import Tensor

from fusedet.atomic_io import flush_to_disk, write_atomically
from fusedet.engine.checkpoint_validation import MeterState, TableState
from fusedet.errors import InputError, StorageError

MetricsRow = dict[str, float | int]


class MetricsTable:
    """A csv file of metrics: a row is appended at once, a new column widens the file.

    `epoch` and `step` count from 1. An empty cell means that the row has no such metric.
    """

    def __init__(self, path: Path, state: TableState | None = None) -> None:
        """Begin a new file, or go on from `state`; rows of later are dropped, and `lost` counts the missing ones."""
        self.path = path
        self.columns: list[str] = list(state["columns"]) if state else []
        kept = self._read()[: state["rows"]] if state else []
        self.rows, self.lost = len(kept), state["rows"] - len(kept) if state else 0
        self._rewrite(kept)

    def add(self, row: Mapping[str, float | int]) -> None:
        """Append one row. Raises StorageError where the disk is full."""
        if new := [name for name in row if name not in self.columns]:
            rows = self._read()
            self.columns += new
            self._rewrite(rows)
        try:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        except OSError as error:
            raise StorageError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.rows += 1

    def state(self) -> TableState:
        """Return how much there is, for a checkpoint, once the disk holds it."""
        flush_to_disk(self.path)
        return {"columns": list(self.columns), "rows": self.rows}

    def _read(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        text = self.path.read_text(encoding="utf-8", errors="replace")
        # a last line without its end was cut off when the process died
        return list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        if self.columns:
            writer = csv.DictWriter(text, self.columns, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        write_atomically(self.path, text.getvalue().encode())


class Meter:
    """The mean losses since the last row, summed on their device without a GPU synchronization."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.steps = 0

    def add(self, names: Sequence[str], values: Tensor) -> None:
        """Add one step's losses.

        Args:
            names: The loss terms.
            values: Their values (T,).
        """
        self.names, self.steps = list(names), self.steps + 1
        self.sums = values.clone() if self.sums is None else self.sums + values

    def pop_means(self, mean_over_ranks: Callable[[Tensor], Any]) -> dict[str, float]:
        """Return the means over the steps and the processes, and empty the meter."""
        assert self.sums is not None, "no step was added since the last row"
        means = mean_over_ranks(self.sums / self.steps)
        self.sums, self.steps = None, 0
        return dict(zip(self.names, means.tolist(), strict=True))

    def state(self) -> MeterState:
        """Return what a checkpoint keeps, so that a resumed run logs the same means."""
        return {"names": self.names, "sums": None if self.sums is None else self.sums.cpu(), "steps": self.steps}

    @staticmethod
    def mean(states: Sequence[MeterState]) -> MeterState:
        """Return the mean of the states of several processes, from which each of them can go on."""
        sums = [state["sums"] for state in states if state["sums"] is not None]
        return {**states[0], "sums": torch.stack(sums).mean(dim=0) if sums else None}

    def restore(self, state: MeterState, device: torch.device) -> None:
        """Go on from a state."""
        self.names, self.steps = state["names"], state["steps"]
        self.sums = None if state["sums"] is None else state["sums"].to(device)


def make_loggers(names: Sequence[str], out: Path) -> list[Logger]:
    """Make loggers that write into the run directory, or name their run after it.

    Args:
        names: Any of tensorboard, wandb and mlflow.
        out: The run directory.

    Raises:
        InputError: One is not installed; the message has the command to install it.
    """
    makers: dict[str, Callable[[Path], Logger]] = {
        "tensorboard": lambda directory: TensorBoardLogger(root_dir=directory, name="", version="tensorboard"),
        "wandb": WandB,
        "mlflow": MLflow,
    }
    for name in names:
        if find_spec(name) is None:
            raise InputError(f"the logger '{name}' is not installed: pip install {name}")
    return [makers[name](Path(out)) for name in names]


class _Service(Logger):
    """What W&B and MLflow share: a run named after the run directory, opened with the first row."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self._run: Any = None

    @property
    def name(self) -> str:
        return "fusedet"

    @property
    def version(self) -> str:
        return self.out.name

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Log nothing: the run directory holds its config."""


class WandB(_Service):
    """Weights & Biases as a Fabric logger; project, entity and mode come from its environment variables."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log one row."""
        import wandb

        if self._run is None:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", self.name), name=self.version, dir=str(self.out)
            )
        self._run.log(metrics, step=step)

    def finalize(self, status: str) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)


class MLflow(_Service):
    """MLflow as a Fabric logger; the server comes from MLFLOW_TRACKING_URI."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log one row."""
        import mlflow

        if self._run is None:
            self._run = mlflow.start_run(run_name=self.version)
        allowed = {name.replace("@", "_at_"): value for name, value in metrics.items()}  # it refuses AP@300
        mlflow.log_metrics(allowed, step=step)

    def finalize(self, status: str) -> None:
        """Close the run."""
        if self._run is not None:
            import mlflow

            mlflow.end_run("FINISHED" if status == "success" else "FAILED")
