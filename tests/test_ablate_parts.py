"""Parts of an ablation without a training: budget, estimated durations, peak memory and conclusions."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from fusedet import config
from fusedet.ablation import cost, estimate, launcher, summary_text
from fusedet.ablation.plan import Run
from fusedet.ablation.plan_sheet import make_plan_sheet
from fusedet.config import Config, Train

# -- budget


def make_queue(
    seconds: dict[str, list[float]], budget: float | None, now: list[float], **options: Any
) -> launcher.Queue:
    """Three rows of two seeds."""
    work = {"FPN": 1.0, "PAFPN": 2.0, "BiFPN": 1.0}
    rows = [[Run(label, Config(train=Train(seed=s), out=f"{label}/{s}")) for s in (0, 1)] for label in work]
    queue = launcher.Queue(rows, estimate.Clock(work, seconds), budget, **options)
    queue.start = now[0]
    return queue


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The current time, to be set."""
    clock = [1000.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: clock[0])
    return clock


def take_all(queue: launcher.Queue, now: list[float], seconds: Callable[[Run], float]) -> list[tuple[str, int]]:
    order = []
    while run := queue.take_next():
        order.append((run.label, run.seed))
        now[0] += seconds(run)
        queue.clock.seconds.setdefault(run.label, []).append(seconds(run))
        queue.mark_finished(run)
    return order


def test_budget_goes_to_whole_rows_first(now: list[float]) -> None:
    """Rows take 10, 20 and 10 s a run, so whole ones 20, 40 and 20 s."""
    costs = {"FPN": 10.0, "PAFPN": 20.0, "BiFPN": 10.0}

    def spend(budget: float | None) -> list[tuple[str, int]]:
        now[0] = 1000.0
        return take_all(make_queue({}, budget, now), now, lambda run: costs[run.label])

    fpn, pafpn, bifpn = ([(label, s) for s in (0, 1)] for label in costs)
    assert spend(None) == fpn + pafpn + bifpn
    assert spend(80) == fpn + pafpn + bifpn
    assert spend(45) == fpn + bifpn  # PAFPN as a whole does not fit, BiFPN does
    assert spend(39) == fpn + bifpn[:1]  # no whole row fits any more, single runs do
    assert spend(20) == fpn
    assert spend(1) == fpn[:1]  # durations are unknown before the first run; `run_plan` times a step


def test_parallel_runs_share_the_budget(now: list[float]) -> None:
    known = {"FPN": [10.0], "PAFPN": [20.0], "BiFPN": [10.0]}
    alone, parallel = (make_queue(dict(known), 40, now, parallel=n) for n in (1, 2))
    assert alone.left_seconds == 80
    assert parallel.left_seconds == 40
    assert parallel.take_next() is not None
    tight = make_queue(known, 25, now, parallel=2)
    first, second = tight.take_next(), tight.take_next()
    assert first
    assert second
    assert [first.label, second.label] == ["FPN", "FPN"]
    # Both devices are busy for 6 s more, which leaves 15 s: neither two runs of 10 s nor one of 20 s fit on one device.
    now[0] += 4
    assert [run.label for run in (tight.take_next(), tight.take_next(), tight.take_next()) if run] == ["BiFPN", "BiFPN"]
    late = make_queue(known, 15, now, parallel=2)
    assert [run.label for run in (late.take_next(), late.take_next(), late.take_next()) if run] == [
        "FPN",
        "FPN",
    ]  # a third one would end at 20


def test_other_rows_are_estimated_by_their_work(now: list[float]) -> None:
    clock = make_queue({"FPN": [10.0, 14.0]}, None, now).clock
    assert (clock.expected("FPN"), clock.expected("PAFPN"), clock.expected("BiFPN")) == (12.0, 24.0, 12.0)
    assert estimate.Clock({"FPN": 3.0}, {}).expected("FPN") is None
    assert estimate.Clock({"FPN": 3.0}, {}, rate=2.0).expected("FPN") == 6.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), ("1d", 86400)]
)
def test_durations_are_parsed(text: str, seconds: float) -> None:
    assert estimate.parse_duration(text) == seconds


# -- cost and conclusions


def test_peak_memory_counts_tensors_alive_at_once() -> None:
    def call() -> None:
        a = torch.zeros(1 << 20)  # 4 MiB
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert 0 <= cost.measure_cpu_allocation(call) - (8 << 20) < 1024  # plus the scalars


AP = {"over_images": [0.2, 1.8], "over_seeds": [0.1, 1.9], "value": 1.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {},
            r"^AP 1\.00 higher than 'a', for other images of this kind \(\+0\.20 to \+1\.80\) and for other seeds \(\+0\.10 to",
        ),
        (
            {"value": -1.0, "over_images": [-1.8, -0.2], "over_seeds": [-1.9, -0.1]},
            r"^AP 1\.00 lower than 'a', for other images",
        ),
        (
            {"over_seeds": [-0.1, 2.1]},
            r"with these weights; another training may change the sign \(-0\.10 to \+2\.10\)",
        ),
        (
            {"over_images": [-0.1, 2.1]},
            r"on these images, for other seeds too .*; other images may change the sign",
        ),
        ({"over_images": [-1, 2], "over_seeds": [-1, 3]}, r"^No conclusion: both intervals contain 0"),
        (
            {"over_seeds": None},
            r"with these weights\. With fewer than two seeds on a side, other trainings are not covered",
        ),
        ({"over_seeds": None, "over_images": [-1, 2]}, r"^No conclusion: the interval over images"),
        ({"value": None, "over_images": None}, "no instance that counts"),
    ],
)
def test_conclusions(change: dict[str, Any], message: str) -> None:
    row = {"label": "b", "reference": "a", "measured": {"AP": {}}, "difference": {"AP": AP | change}}
    assert re.search(message, summary_text.draw_conclusion(row, "AP", {"a": "a", "b": "b"}, ["a"]))


def test_conclusions_about_a_metric_without_an_interval_over_images() -> None:
    def conclude(over_seeds: list[float] | None) -> str:
        change = {"value": 1.0, "over_images": None, "over_seeds": over_seeds}
        row = {"label": "b", "reference": "a", "measured": {"VOC_AP": {}}, "difference": {"VOC_AP": change}}
        return summary_text.draw_conclusion(row, "VOC_AP", {"a": "a", "b": "b"}, ["a"])

    assert conclude([0.1, 1.9]).startswith(
        "VOC_AP 1.00 higher than 'a' on these images, for other seeds too (+0.10 to +1.90). There is no"
    )
    assert conclude([-0.0001, 1.9]).startswith(
        "No conclusion: -0.0001 to +1.9000 contains 0. There is no interval over images"
    )
    assert "fewer than two seeds" in conclude(None)


@pytest.mark.parametrize(
    ("images", "seeds", "text"),
    [
        ([1, 2], [0.5, 3], "Both intervals exclude 0 for APs (+1.50); not for APm."),
        ([-2, -1], [-3, -0.5], "Both intervals exclude 0 for APs (+1.50); not for APm."),
        ([1, 2], [-1, 3], "No conclusion for APs, APm."),
        ([1, 2], None, "No conclusion for APs, APm."),
        (None, [1, 2], "No conclusion for APs, APm."),
    ],
)
def test_conclusions_about_object_sizes(images: list[float] | None, seeds: list[float] | None, text: str) -> None:
    """A size needs both intervals; one without instances is not named."""
    changes = {
        "APs": {"value": 1.5, "over_images": images, "over_seeds": seeds},
        "APm": {"value": 0.5, "over_images": [0, 1], "over_seeds": [0.2, 0.8]},
        "APl": {"value": None, "over_images": None, "over_seeds": None},
    }
    sizes = summary_text.list_sizes("AP", ())
    assert summary_text.conclude_sizes({"difference": changes}, sizes) == text
    assert summary_text.conclude_sizes({"difference": None}, sizes) == ""
    assert summary_text.list_sizes("mask_AP", ()) == ["mask_APs", "mask_APm", "mask_APl"]
    assert summary_text.list_sizes("AP", ["AP 4-8 px"]) == ["AP 4-8 px"]


def test_conclusions_without_a_difference() -> None:
    runs_of = {"a": "a", "b": "b", "c": "a"}
    measured = {"label": "b", "reference": "a", "measured": {"AP": {}}, "difference": None}

    def conclude(change: dict[str, Any], references: Sequence[str] = ("a",)) -> str:
        return summary_text.draw_conclusion(measured | change, "AP", runs_of, references)

    assert "'a' was not measured" in conclude({})
    assert "baseline was not measured" in conclude({"reference": None})
    assert conclude({"label": "a"}) == "The baseline of the other rows."
    assert conclude({"label": "a"}, ()) == "Compared with no other row."
    assert conclude({"label": "c"}) == "The same config as 'a'."
    assert "Not measured" in conclude({"measured": None})


# -- the table of a dry run


def test_dry_run_of_a_table_without_published_values() -> None:
    """A row of one's own has no column and no sentence about papers; one published value brings both back."""
    row: dict[str, Any] = {"label": "gate", "published": {}, "params_M": None, "time_ms": None, "seconds": None}
    row |= {"trainable": 12_030_000, "multiply_adds": 4_740_000_000, "left": 3}
    sheet = make_plan_sheet([row], classes=6, seeds=1)
    assert sheet.title == "Counted with 6 classes; 1 seed per row"
    assert sheet.head == ["row", "#Param (M)", "multiply-adds (G)", "runs to do"]
    assert sheet.rows == [["gate", "12.03", "4.74", "3"]]
    sheet = make_plan_sheet([row, row | {"published": {"AP": 36.4}, "params_M": 12.0}], classes=80, seeds=3)
    assert sheet.title == "Published metrics in percent; counted with 80 classes; 3 seeds per row"
    assert sheet.head[:3] == ["row", "AP", "#Param paper (M)"]
    assert [cells[1:3] for cells in sheet.rows] == [["-", "-"], ["36.4", "12.00"]]


def test_rows_with_other_numbers_of_detections_have_a_cost_of_their_own() -> None:
    """A mask branch runs on each of `test.max_det` detections."""
    configs = {str(n): config.load("mask_rcnn_tiny", [f"test.max_det={n}"]) for n in (100, 10)}
    counted = cost.count_costs(configs, 3)
    alone = cost.count_costs({"10": configs["10"]}, 3)
    assert counted["10"] == alone["10"]
    assert counted["10"]["multiply_adds"] < counted["100"]["multiply_adds"]
