"""Speed, memory and size of a model in every installed engine, side by side: the command `benchmark`."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from rich.console import Console, Group, RenderableType

from fusedet import visualization
from fusedet.api import run_dir, tables
from fusedet.api.benchmark_plan import Candidate, plan_engines
from fusedet.api.engine_process import EngineProcess, Measurement
from fusedet.api.engines import ENGINES
from fusedet.api.export_options import check_size
from fusedet.api.load_model import is_config
from fusedet.api.progress import progress_bar, say_nothing
from fusedet.api.results import CommandResult, format_paths, group_lines, list_files
from fusedet.api.settings import Settings, split_overrides, to_overrides
from fusedet.api.timing import describe_machine, interleave, summarize_spans
from fusedet.errors import InputError, require_at_least, split_names

BATCHES = (1, 8)
RUNS = 10
WARMUP = 2
"""Turns before the measured ones: torch.compile compiles in the first two."""


@dataclass(frozen=True)
class BenchmarkResult(CommandResult):
    """The measurements.

    Attributes:
        size: Height and width of the image.
        runs: Measured calls of each engine and number of images.
        machine: Processor, cores, threads, load and versions.
        rows: One per engine, as `measure_engines` returns them.
        files: The files written, by what they show.
        out: Their directory.
    """

    size: tuple[int, int]
    runs: int
    machine: dict[str, Any]
    rows: list[dict[str, Any]]
    files: dict[str, Path]
    out: Path

    @property
    def fastest(self) -> dict[int, dict[str, Any]]:
        """The row with the lowest median latency from file to boxes, by number of images at once."""
        measured = [(part["batch"], part["file"]["p50_ms"], row) for row in self.rows for part in row["batches"]]
        counts = sorted({count for count, _, _ in measured})
        return {n: min((item for item in measured if item[0] == n), key=lambda item: item[1])[2] for n in counts}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and the fastest engine by number of images."""
        keys = ("model", "engine", "precision")
        fastest = {batch: {key: row[key] for key in keys} for batch, row in self.fastest.items()}
        return vars(self) | {"fastest": fastest, "files": format_paths(self.files), "out": str(self.out)}

    def __rich__(self) -> RenderableType:
        height, width = self.size
        threads, cores = self.machine["threads"], self.machine["cores"]
        title = f"{height} x {width} pixels, threads: {threads} on {cores} cores, medians of {self.runs} calls"
        best = [
            f"fastest with {batch} at once: {row['engine']} {row['precision']} ({row['model']})"
            for batch, row in self.fastest.items()
        ]
        failed = [f"{row['engine']} ({row['model']}): {row['error']}" for row in self.rows if row["error"]]
        return Group(tables.latency_table(self.rows, title), group_lines([*failed, *best]), list_files(self.files))


def benchmark(
    sources: str | Path | Iterable[str | Path],
    *overrides: str,
    size: Sequence[int] | None = None,
    formats: str | Iterable[str] = ENGINES,
    batch: Iterable[int] = BATCHES,
    runs: int = RUNS,
    trust: bool = False,
    say: Callable[[str], None] = say_nothing,
    progress: Console | None = None,
    **settings: Unpack[Settings],
) -> BenchmarkResult:
    """Measure latency, throughput, memory, file size and start time of a model in every engine that is installed.

    Each engine has a process of its own. The engines take turns, after a warm-up, so that a slow moment of the machine
    affects all of them. All of them are in memory at once. Test-time augmentation and tiles are left out.

    >>> fusedet.benchmark(["runs/a", "runs/a/export"], size=(800, 1216)).fastest[1]["engine"]  # doctest: +SKIP
    'openvino'

    Args:
        sources: A run directory, a checkpoint, a name of published weights, the name of a config (random weights) or an
            exported model, or several of these. Without an exported model among them, the others are exported in fp32
            to a temporary directory.
        overrides: "key=value" texts for `benchmark_plan.SETTABLE` and `out`; of a config, for `model` too. `out` is the
            directory of the results, by default benchmark, benchmark-2, ... in the directory of the first source.
        size: Height and width of the image, multiples of 32; by default the largest input of the first source.
        formats: Names of `engines.ENGINES`, or one text with commas.
        batch: Numbers of images that are predicted at once.
        runs: Measured calls of each engine and number of images.
        trust: As `fusedet.load` takes it; .pt2 files need it too.
        say: Takes warnings.
        progress: Where a progress bar is shown, if it is a terminal.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: A source does not exist, a format is unknown, or a number is wrong. An engine that cannot run here
            is no error: its row says why.
    """
    names = split_names("format", formats, ENGINES)
    paths = [sources] if isinstance(sources, (str, Path)) else list(sources)
    batches = sorted(set(batch))
    if not (paths and batches and names):
        raise InputError("name at least one run, checkpoint, config or exported model, format and number of images")
    require_at_least(1, runs=runs, batch=batches[0])
    shape = None if size is None else check_size(size)
    own, texts = split_overrides(to_overrides(overrides, settings), "out")
    out = own.out or _default_directory(paths[0])
    run_dir.check_new_dir(out)
    with ExitStack() as stack:
        candidates, used = stack.enter_context(plan_engines(paths, names, shape, texts, trust, say))
        if not candidates:
            raise InputError(
                f"nothing to measure: no format of {', '.join(map(str, paths))} is among {', '.join(names)}"
            )
        folder = stack.enter_context(run_dir.reserve_run_dir(out))
        total = sum(one.command is not None for one in candidates) * len(batches) * (WARMUP + runs)
        advance = stack.enter_context(progress_bar(progress, total, "calls"))
        rows = measure_engines(candidates, batches, runs, advance)
    files = {"measurements": folder / "benchmark.json"}
    if points := _list_points(rows):
        files["latency against AP"] = folder / "latency.png"
        title = f"{used[0]} x {used[1]} pixels, {batches[0]} at once"
        visualization.plot_latency(points, files["latency against AP"], title)
    result = BenchmarkResult(used, runs, describe_machine(), rows, files, folder)
    run_dir.write_json(files["measurements"], result.to_dict())
    return result


def measure_engines(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    runs: int,
    advance: Callable[[int], None] = lambda calls: None,
) -> list[dict[str, Any]]:
    """Measure the engines in turn, each in its own process.

    Args:
        candidates: The engines.
        batches: Numbers of images at once, ascending, because peak memory is that since the start.
        runs: Measured calls of each engine and number of images.
        advance: Called with the number of further calls that are done.

    Returns:
        One row per engine, with the fields of `Candidate` but its command, and

        - start_seconds: of opening the model and of the first prediction,
        - imports_MiB: peak memory before that,
        - error: why it could not run, or stopped,
        - batches: for each number of images `batch`, peak_MiB and the parts that the engine measures, such as `network`
          and `file`, with p50_ms, p95_ms, processor_ms and images_per_second.
    """
    rows = []
    with ExitStack() as stack:
        # one after the other, so that each has the machine for itself while it starts
        engines = [
            None if one.command is None else stack.enter_context(EngineProcess(one.command)) for one in candidates
        ]
        running = {str(i): engine for i, engine in enumerate(engines) if engine is not None}
        measured: dict[str, list[dict[str, Any]]] = {key: [] for key in running}
        for count in batches:

            def call(engine: EngineProcess, count: int = count) -> Measurement | None:
                result = engine.measure(count)
                advance(1)
                return result

            sides = {key: lambda engine=engine: call(engine) for key, engine in running.items()}
            for key, results in interleave(sides, runs, WARMUP).items():
                complete = [result for result in results if result is not None]
                if len(complete) == runs:
                    measured[key].append(_summarize(complete, count))
        for i, (candidate, engine) in enumerate(zip(candidates, engines)):
            rows.append(
                {
                    "model": candidate.model,
                    "engine": candidate.engine,
                    "precision": candidate.precision,
                    "megabytes": candidate.megabytes,
                    "ap": candidate.ap,
                    "start_seconds": engine.start_seconds if engine else None,
                    "imports_MiB": engine.imports_memory if engine else None,
                    "error": engine.error if engine else candidate.reason,
                    "batches": measured.get(str(i), []),
                }
            )
    return rows


def _summarize(measurements: Sequence[Measurement], count: int) -> dict[str, Any]:
    parts = {
        name: summarize_spans([measurement.spans[name] for measurement in measurements], count)
        for name in measurements[0].spans
    }
    return {"batch": count, "peak_MiB": measurements[-1].peak, **parts}


def _list_points(rows: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """Return label, milliseconds and AP of the rows that have both, for the smallest number of images."""
    several = len({row["model"] for row in rows}) > 1
    return [
        (
            f"{row['engine']} {row['precision']}" + f", {row['model']}" * several,
            row["batches"][0]["file"]["p50_ms"],
            row["ap"],
        )
        for row in rows
        if row["ap"] is not None and row["batches"]
    ]


def _default_directory(source: str | Path) -> Path:
    if is_config(source):
        return run_dir.find_free_path("benchmarks", Path(source).stem)
    return run_dir.find_free_path(run_dir.parent_of(source), "benchmark")
