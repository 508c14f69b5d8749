"""Ablation of a table, and its preview: the command `ablate`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import yaml
from rich.console import Group, RenderableType

from fusedet import config
from fusedet.ablation import experiment, plan, power, render, spec, summary, summary_text
from fusedet.ablation.estimate import parse_duration
from fusedet.ablation.plan_sheet import make_plan_sheet
from fusedet.api.results import CommandResult, format_paths, group_lines, list_files
from fusedet.api.settings import Settings, to_overrides
from fusedet.config.interval import format_duration
from fusedet.data import synthetic
from fusedet.errors import InputError, format_count, require_at_least, require_choice
from fusedet.process_ranks import get_ranks

Launcher = Literal["local", "slurm"]


@dataclass(frozen=True)
class AblationResult(CommandResult):
    """A finished ablation.

    Attributes:
        summary: Metrics, differences with intervals and conclusions of all rows, as table.json holds them.
        out: The directory of the runs and the report.
        files: The files written, by what they show.
    """

    summary: dict[str, Any]
    out: Path
    files: dict[str, Path]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary, the directory and the files."""
        return self.summary | {"out": str(self.out), "files": format_paths(self.files)}

    def __rich__(self) -> RenderableType:
        rows = (row for row in self.summary["rows"] if not row["cited"])
        text = [f"{row['label']}: {row['conclusion']}" for row in rows]
        text += [*summary_text.describe_coverage(self.summary), *summary_text.collect_notes(self.summary)]
        text.append(summary_text.describe_cost(self.summary))
        tables = map(render.sheet_table, render.make_sheets(self.summary))
        return Group(*tables, group_lines(text), list_files(self.files))


@dataclass(frozen=True)
class AblationPreview(CommandResult):
    """What an ablation would run.

    Attributes:
        title: Of the table.
        table: Its source.
        classes: Number of classes.
        seeds: Trainings of each row.
        rows: Published metrics, cost, runs to do (`left`) and their expected `seconds`, by row.
        basis: What the estimate rests on; empty without data.
    """

    title: str
    table: str
    classes: int
    seeds: int
    rows: list[dict[str, Any]]
    basis: str

    @property
    def seconds(self) -> float:
        """Expected seconds of all runs on one device; 0 where nothing is estimated."""
        return sum(row["seconds"] for row in self.rows if row["seconds"] is not None)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the title."""
        fields = {"table": self.table, "classes": self.classes, "rows": self.rows}
        return fields | {"seconds": self.seconds, "basis": self.basis}

    def __rich__(self) -> RenderableType:
        text = [f"about {format_duration(self.seconds)} on one device, by {self.basis}"] if self.seconds else []
        text += [] if self.basis or text else ["with data=PATH the time is estimated too"]
        table = render.sheet_table(make_plan_sheet(self.rows, self.classes, self.seeds))
        return Group(group_lines([self.title]), table, group_lines(text))


@dataclass(frozen=True)
class PowerEstimate(CommandResult):
    """How many seeds and images a table needs to show a difference of `power.EFFECT`.

    Attributes:
        table: Its source.
        metric: Metric of the table.
        baseline: Label of the row whose runs were read.
        noise: Noise of the metric in these runs.
        seeds_needed: Seeds of each row by number of images; None above `power.MOST_SEEDS`.
        images_needed: Images by number of seeds; None above `power.MOST_IMAGES`.
        visible: Smallest difference in percent shown on these images, by number of seeds.
    """

    table: str
    metric: str
    baseline: str
    noise: power.Noise
    seeds_needed: dict[int, int | None]
    images_needed: dict[int, int | None]
    visible: dict[int, float | None]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, and the difference and the probability that they are about."""
        return asdict(self) | {"effect": power.EFFECT, "probability": power.TARGET}

    def __rich__(self) -> RenderableType:
        noise = self.noise
        runs = f"{format_count(noise.runs, 'run')} of '{self.baseline}' on {noise.images} images"
        text = [
            f"{self.metric} of {runs}: standard error over images {noise.over_images:.2f}",
            f"between seeds {noise.between_seeds:.2f}; of two seeds' difference over images {noise.of_pairs:.2f}"
            if noise.of_pairs is not None and noise.between_seeds is not None
            else f"between seeds unknown, {power.ASSUMED_SEED_NOISE} assumed; a second run measures it",
            f"to conclude +{power.EFFECT:g} with a probability of {100 * power.TARGET:.0f} %:",
        ]
        text += [
            f"  {images:,} images: {'more than ' + str(power.MOST_SEEDS) if seeds is None else seeds} seeds per row"
            for images, seeds in self.seeds_needed.items()
        ]
        for seeds, images in self.images_needed.items():
            count, visible = "no number of" if images is None else f"{images:,}", self.visible[seeds]
            shown = "nothing" if visible is None else f"+{visible:.1f}"
            text.append(f"  {seeds} seeds per row: {count} images; {noise.images:,} images show {shown}")
        return group_lines(text)


def ablate(
    table: str | Path | None,
    *overrides: str,
    seeds: int = 3,
    rows: Sequence[str] = (),
    budget: str | None = None,
    parallel: int = 1,
    launcher: Launcher = "local",
    slurm: Sequence[str] = (),
    resamples: int = 1000,
    say: Callable[[str], None] = print,
    quiet: bool = False,
    **settings: Unpack[Settings],
) -> AblationResult:
    """Train every row of a table with several seeds and compare the rows; the same call goes on where it stopped.

    >>> fusedet.ablate("smsl_table1", data="data/coco", out="ablations/smsl")  # doctest: +SKIP

    Args:
        table: A shipped table's name or a YAML file.
        overrides: "key=value" texts for all rows; `data` and `out` are needed.
        seeds: Trainings of each row.
        rows: Labels of the rows to run, by default all.
        budget: A time such as "2h": no run is started that would not fit.
        parallel: Runs at a time on each device; on a CPU they share its cores.
        launcher: "local": here, on all GPUs; "slurm": a job per run.
        slurm: Parameters of the jobs as "key=value" texts, such as "timeout_min=600"; submitit takes them.
        resamples: How often the bootstrap draws the images, 40 or more.
        say: Takes lines of progress.
        quiet: Whether progress bars are left out.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The table, a row, the data or `out` are wrong; nothing has run then.
        StorageError: A file cannot be written.
        Interrupted: Ctrl-C or SIGTERM; what was trained is kept.
    """
    require_choice("launcher", launcher, Launcher)
    require_at_least(1, parallel=parallel)
    require_at_least(40, resamples=resamples)
    _check_call(table, seeds)
    seconds = None if budget is None else parse_duration(budget)
    texts = to_overrides(overrides, settings)
    out, of_rows = _split_out(texts)
    if out is None:
        raise InputError("no output directory: add out=DIR")
    loaded = spec.load_table(str(table))
    of_rows = _add_synthetic_data(loaded, of_rows, out, say)
    made = plan.make_plan(loaded, of_rows, seeds=seeds, rows=rows, out=out, say=say)
    options = {
        "--seeds": [seeds],
        "--rows": rows,
        "--budget": [budget] if budget else [],
        "--parallel": [parallel] if parallel != 1 else [],
        "--slurm": slurm,
        "--launcher": [launcher] if launcher != "local" else [],
        "--resamples": [resamples],
    }
    arguments = [text for key, values in options.items() for value in values for text in (key, str(value))]
    command = ("fusedet", "ablate", str(table), *texts, *arguments)
    launch = experiment.LaunchOptions(seconds, launcher, parallel, dict(map(_parse_pair, slurm)), resamples, command)
    result, files = experiment.run_plan(made, launch, say=say, quiet=quiet)
    return AblationResult(result, made.out, files)


def preview_ablation(
    table: str | Path | None,
    *overrides: str,
    seeds: int = 3,
    rows: Sequence[str] = (),
    say: Callable[[str], None] = print,
    **settings: Unpack[Settings],
) -> AblationPreview:
    """Check a table as `ablate` does, and estimate its time if `data` is given; nothing is trained or written.

    Args:
        table: A shipped table's name or a YAML file.
        overrides: "key=value" texts for all rows.
        seeds: Trainings of each row.
        rows: Labels of the rows to run, by default all.
        say: Takes lines of progress.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The table, a row or the data are wrong.
    """
    _check_call(table, seeds)
    out, of_rows = _split_out(to_overrides(overrides, settings))
    loaded = spec.load_table(str(table))
    of_rows = _add_synthetic_data(loaded, of_rows, out)
    made = plan.make_plan(loaded, of_rows, seeds=seeds, rows=rows, out=out or "", need_data=False, say=say)
    preview, basis = experiment.preview_plan(made, say=say)
    return AblationPreview(made.table.title, made.table.source, made.classes, seeds, preview, basis)


def estimate_power(
    table: str | Path | None,
    *overrides: str,
    seeds: int = 3,
    resamples: int = 1000,
    say: Callable[[str], None] = print,
    **settings: Unpack[Settings],
) -> PowerEstimate:
    """Estimate, from the finished runs of a table's baseline, how many seeds and images show a difference of +1.

    Args:
        table: A shipped table's name or a YAML file.
        overrides: "key=value" texts for all rows, as in `ablate`; `out` is the directory with the runs.
        seeds: Seeds of each row that are planned; also how many runs of the baseline are read, as far as finished.
        resamples: How often the bootstrap draws the images, 40 or more.
        say: Takes lines of progress.
        settings: The same settings as `overrides`, by keyword.

    Raises:
        InputError: The table or the data are wrong, or the baseline has no finished run.
    """
    require_at_least(40, resamples=resamples)
    _check_call(table, seeds)
    out, of_rows = _split_out(to_overrides(overrides, settings))
    loaded = spec.load_table(str(table))
    made = plan.make_plan(loaded, _add_synthetic_data(loaded, of_rows, out), seeds=seeds, out=out or "", say=say)
    label = made.baseline
    if label is None or loaded.metric not in spec.RESAMPLED:
        raise InputError(f"{loaded.source}: power needs a baseline that is run and a COCO metric, not {loaded.metric}")
    finished = [run for run in made.runs(label) if run.state(made.data[label]) == "finished"]
    if not finished:
        raise InputError(
            f"out={out} has no finished run of the baseline '{label}', of which power needs one or two: train them "
            f"first with --rows '{label}' --seeds 2"
        )
    samples = summary.resample_runs(made, {label: finished}, resamples)[made.runs_of[label]]
    noise = power.measure_noise(samples, loaded.metric.removeprefix("mask_"))
    if noise is None:
        raise InputError(f"{made.val.source} has no instance of {loaded.metric}: there is no noise to measure")
    counts = sorted({2, max(2, seeds), 5, 8})
    return PowerEstimate(
        loaded.source,
        loaded.metric,
        label,
        noise,
        {images: power.count_needed_seeds(noise, images) for images in (noise.images, 4 * noise.images)},
        {count: power.count_needed_images(noise, count) for count in counts},
        {count: power.compute_visible_difference(noise, count) for count in counts},
    )


def _add_synthetic_data(
    table: spec.Table, texts: list[str], out: str | None, say: Callable[[str], None] | None = None
) -> list[str]:
    """Add the table's synthetic dataset in out/data to overrides without data; with `say` it is generated."""
    if table.synthetic is None or out is None or any(text.startswith(("data=", "data.path=")) for text in texts):
        return texts
    folder = Path(out) / plan.DATA
    if say and not folder.is_dir():
        say(f"generating {table.synthetic['images']} images in {folder}")
    if say or folder.is_dir():
        return [f"data.path={synthetic.generate_dataset(folder, **table.synthetic)}", *texts]
    return texts


def _split_out(texts: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the output directory and the overrides of the rows."""
    out = [text for text in texts if text.startswith("out=")]
    return config.parse(config.apply_overrides({}, out)).out, [text for text in texts if text not in out]


def _check_call(table: str | Path | None, seeds: int) -> None:
    """Raise InputError if no table or no seed is given, or for one of several processes."""
    require_at_least(1, seeds=seeds)
    if table is None:
        names = ", ".join(spec.list_tables())
        raise InputError(
            f"which table? Write fusedet ablate TABLE data=PATH out=DIR, with TABLE one of {names}, or a file"
        )
    if get_ranks()[1] > 1:
        raise InputError("fusedet ablate starts its own processes: call it without torchrun")


def _parse_pair(text: str) -> tuple[str, Any]:
    """Return the key and the value, which is YAML, of a job parameter."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise InputError(
            f"--slurm {text}: write KEY=VALUE, such as --slurm timeout_min=600 --slurm slurm_partition=gpu"
        )
    return key, yaml.safe_load(value)
