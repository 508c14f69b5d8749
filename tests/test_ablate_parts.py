"""Parts of an ablation without a training: how a budget is spent, what is expected of a run, and what a row's intervals allow to say."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fusedet.ablation import cost, estimate, launcher, summary
from fusedet.ablation.plan import Run
from fusedet.config import Config, Train

# -- budget


def queue(seconds: dict[str, list[float]], budget: float | None, now: list[float], **options: Any) -> launcher.Queue:
    """Three rows of two seeds."""
    work = {"FPN": 1.0, "PAFPN": 2.0, "BiFPN": 1.0}
    rows = [[Run(label, Config(train=Train(seed=s), out=f"{label}/{s}")) for s in (0, 1)] for label in work]
    made = launcher.Queue(rows, estimate.Clock(work, seconds), budget, **options)
    made.began = now[0]
    return made


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    clock = [1000.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: clock[0])
    return clock


def taken(asked: launcher.Queue, now: list[float], seconds: Callable[[Run], float]) -> list[tuple[str, int]]:
    order = []
    while cell := asked.take():
        order.append((cell.label, cell.seed))
        now[0] += seconds(cell)
        asked.clock.seconds.setdefault(cell.label, []).append(seconds(cell))
        asked.mark_finished(cell)
    return order


def test_a_budget_goes_to_whole_rows_first(now: list[float]) -> None:
    """Rows take 10, 20 and 10 s a run, so whole ones 20, 40 and 20 s."""
    costs = {"FPN": 10.0, "PAFPN": 20.0, "BiFPN": 10.0}

    def spend(budget: float | None) -> list[tuple[str, int]]:
        now[0] = 1000.0
        return taken(queue({}, budget, now), now, lambda cell: costs[cell.label])

    fpn, pafpn, bifpn = ([(label, s) for s in (0, 1)] for label in costs)
    assert spend(None) == fpn + pafpn + bifpn
    assert spend(80) == fpn + pafpn + bifpn
    assert spend(45) == fpn + bifpn  # PAFPN as a whole does not fit, BiFPN does
    assert spend(39) == fpn + bifpn[:1]  # no whole row fits any more: single runs, as far as they fit
    assert spend(20) == fpn
    assert spend(1) == fpn[:1]  # nothing is known here before the first run; `ablate` times a step


def test_runs_side_by_side_share_the_budget(now: list[float]) -> None:
    known = {"FPN": [10.0], "PAFPN": [20.0], "BiFPN": [10.0]}
    alone, beside = (queue(dict(known), 40, now, beside=n) for n in (1, 2))
    assert alone.remaining == 80
    assert beside.remaining == 40
    assert beside.take() is not None
    tight = queue(known, 25, now, beside=2)
    first, second = tight.take(), tight.take()
    assert first
    assert second
    assert [first.label, second.label] == ["FPN", "FPN"]
    now[0] += (
        4  # both devices need 6 s more, which leaves 15: a run of 10 s does not fit two times on one of them, nor one of 20 s
    )
    assert [cell.label for cell in (tight.take(), tight.take(), tight.take()) if cell] == ["BiFPN", "BiFPN"]
    late = queue(known, 15, now, beside=2)
    assert [cell.label for cell in (late.take(), late.take(), late.take()) if cell] == [
        "FPN",
        "FPN",
    ]  # a third one would end at 20


def test_other_rows_are_expected_by_their_work(now: list[float]) -> None:
    clock = queue({"FPN": [10.0, 14.0]}, None, now).clock
    assert (clock.expected("FPN"), clock.expected("PAFPN"), clock.expected("BiFPN")) == (12.0, 24.0, 12.0)
    assert estimate.Clock({"FPN": 3.0}, {}).expected("FPN") is None
    assert estimate.Clock({"FPN": 3.0}, {}, rate=2.0).expected("FPN") == 6.0


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), ("1d", 86400)]
)
def test_times_are_read(text: str, seconds: float) -> None:
    assert estimate.parse_duration(text) == seconds


# -- cost and conclusions


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def call() -> None:
        a = torch.zeros(1 << 20)  # 4 MiB
        b = a + 1
        del a
        c = b + 1
        del b, c

    assert 0 <= cost._allocated(call) - (8 << 20) < 1024  # and the numbers that were filled in and added


AP = {"over_images": [0.2, 1.8], "over_seeds": [0.1, 1.9], "value": 1.0}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {},
            r"^AP 1\.00 higher than 'a', for other images such as these \(\+0\.20 to \+1\.80\) and for other seeds \(\+0\.10 to",
        ),
        (
            {"value": -1.0, "over_images": [-1.8, -0.2], "over_seeds": [-1.9, -0.1]},
            r"^AP 1\.00 lower than 'a', for other images",
        ),
        (
            {"over_seeds": [-0.1, 2.1]},
            r"with these weights; another training may give another sign \(-0\.10 to \+2\.10\)",
        ),
        (
            {"over_images": [-0.1, 2.1]},
            r"on these very images for other seeds too .*; other images may give another sign",
        ),
        ({"over_images": [-1, 2], "over_seeds": [-1, 3]}, r"^Nothing can be concluded: both intervals hold 0"),
        (
            {"over_seeds": None},
            r"with these weights\. With fewer than two seeds on a side nothing is known of other trainings",
        ),
        ({"over_seeds": None, "over_images": [-1, 2]}, r"^Nothing can be concluded: the interval over images"),
        ({"value": None, "over_images": None}, "no object that counts"),
    ],
)
def test_conclusions(change: dict[str, Any], said: str) -> None:
    one = {"label": "b", "reference": "a", "measured": {"AP": {}}, "difference": {"AP": AP | change}}
    assert re.search(said, summary.draw_conclusion(one, "AP", {"a": "a", "b": "b"}))


def test_conclusions_of_a_figure_without_an_interval_over_images() -> None:
    def said(over_seeds: list[float] | None) -> str:
        change = {"value": 1.0, "over_images": None, "over_seeds": over_seeds}
        one = {"label": "b", "reference": "a", "measured": {"VOC_AP": {}}, "difference": {"VOC_AP": change}}
        return summary.draw_conclusion(one, "VOC_AP", {"a": "a", "b": "b"})

    assert said([0.1, 1.9]).startswith(
        "VOC_AP 1.00 higher than 'a' on these very images for other seeds too (+0.10 to +1.90). Over images"
    )
    assert said([-0.0001, 1.9]).startswith(
        "Nothing can be concluded: -0.0001 to +1.9000 holds 0. Over images there is no interval"
    )
    assert "fewer than two seeds" in said(None)


def test_conclusions_without_a_difference() -> None:
    owners = {"a": "a", "b": "b", "c": "a"}
    measured = {"label": "b", "reference": "a", "measured": {"AP": {}}, "difference": None}
    assert "'a' was not measured" in summary.draw_conclusion(measured, "AP", owners)
    assert "baseline was not measured" in summary.draw_conclusion(measured | {"reference": None}, "AP", owners)
    assert summary.draw_conclusion(measured | {"label": "a"}, "AP", owners).startswith("The baseline:")
    assert summary.draw_conclusion(measured | {"label": "c"}, "AP", owners) == "The same config as 'a'."
    assert "Not measured" in summary.draw_conclusion(measured | {"measured": None}, "AP", owners)
