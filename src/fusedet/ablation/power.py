"""Power of an ablation: the probability that its intervals show a difference, by the noise of finished runs."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from fusedet.evaluation.bootstrap import ResampledMetrics
from fusedet.evaluation.confidence_intervals import t_quantile

EFFECT = 1.0
"""The difference, in percent, that a table should show."""
TARGET = 0.8
"""The probability with which it should show it."""
ASSUMED_SEED_NOISE = 0.4
"""Standard deviation between seeds, in percent, where one run does not show it.

The notes of MMDetection's configs state fluctuations of 0.2 (PAA), 0.3 (AutoAssign) and 0.4 (CenterNet).
"""
MOST_SEEDS, MOST_IMAGES = 64, 1_000_000
DRAWS = 20_000


@dataclass(frozen=True)
class Noise:
    """Standard deviations of a metric of one row, in percent.

    Attributes:
        runs: Number of runs, with a seed each.
        images: Number of validation images.
        between_seeds: Of one run over seeds, on these images; None for a single run.
        over_images: Of one run over images: the standard error of the bootstrap.
        of_pairs: Of the difference of two seeds over images, which both see: the standard error of the paired
            bootstrap; None for a single run.
    """

    runs: int
    images: int
    between_seeds: float | None
    over_images: float
    of_pairs: float | None

    @property
    def lasting(self) -> float:
        """Variance between seeds that more images do not reduce."""
        if self.between_seeds is None or self.of_pairs is None:
            return ASSUMED_SEED_NOISE**2
        return max(0.0, self.between_seeds**2 - self.of_pairs**2 / 2)

    def passing(self, images: int) -> float:
        """Compute the variance of a run that a number of images leaves and the other rows do not share.

        Of a single run it is bounded by the variance over images, because what rows share is unknown.
        """
        own = self.over_images**2 if self.of_pairs is None else self.of_pairs**2 / 2
        return own * self.images / images


def measure_noise(samples: Sequence[ResampledMetrics], metric: str) -> Noise | None:
    """Measure the noise of a metric on runs of equal config; None if a run lacks the metric.

    Args:
        samples: The runs, on the same resamples of the images.
        metric: One of their names.
    """
    values = 100 * np.stack([run.metrics[run.names.index(metric)] for run in samples])  # (runs, 1 + resamples)
    if np.isnan(values[:, 0]).any():
        return None
    between = pairs = None
    if len(values) > 1:
        between = float(values[:, 0].std(ddof=1))
        pairs = _root_mean_variance(np.stack([a - b for a, b in combinations(values, 2)]))
    return Noise(len(values), samples[0].images, between, _root_mean_variance(values), pairs)


def compute_power(noise: Noise, seeds: int, images: int, effect: float = EFFECT) -> float:
    """Compute the probability that a table concludes "higher" without reserve where a row truly is `effect` higher.

    The conclusion needs Welch's interval over seeds and the paired interval over images above 0. Both rows have the
    noise given: a lasting part that differs from seed to seed, and a part of each run that falls with the images. What
    a module changes on single images is taken to be what another seed changes. 20,000 tables are drawn.

    Args:
        noise: Noise of the baseline.
        seeds: Runs of each of the two rows, at least 2.
        images: Validation images.
        effect: True difference in percent.
    """
    rng = np.random.default_rng(0)
    passing = noise.passing(images)
    variance = noise.lasting + passing
    first, second = variance * rng.chisquare(seeds - 1, (2, DRAWS)) / (seeds - 1)
    least_freedom = seeds - 1
    freedom = least_freedom * (first + second) ** 2 / (first**2 + second**2 + 1e-300)  # Welch and Satterthwaite
    grid = 1 / np.linspace(1 / least_freedom, 0.5 / least_freedom, 8)
    reach = np.interp(freedom, grid, [t_quantile(0.975, df) for df in grid]) * np.sqrt((first + second) / seeds)
    over_images = t_quantile(0.975, max(1, images - 1)) * np.sqrt(2 * passing / seeds)
    differences = rng.normal(effect, np.sqrt(2 * variance / seeds), DRAWS)
    return float((differences > np.maximum(reach, over_images)).mean())


def count_needed_seeds(noise: Noise, images: int) -> int | None:
    """Count the seeds of each row that show `EFFECT` with probability `TARGET`; None above `MOST_SEEDS`."""
    return _find_least(range(2, MOST_SEEDS + 1), lambda seeds: compute_power(noise, seeds, images))


def count_needed_images(noise: Noise, seeds: int) -> int | None:
    """Count the images that show `EFFECT` with probability `TARGET`; None above `MOST_IMAGES`."""
    return _find_least(range(2, MOST_IMAGES + 1), lambda images: compute_power(noise, seeds, images))


def compute_visible_difference(noise: Noise, seeds: int) -> float | None:
    """Compute the smallest difference in percent that these images show with probability `TARGET`, to 0.001."""
    effects = range(1, 100_001)
    least = _find_least(effects, lambda effect: compute_power(noise, seeds, noise.images, effect / 1000))
    return None if least is None else least / 1000


def describe_power(noise: Noise, seeds: int) -> dict[str, Any]:
    """Return noise, the power of a table with `seeds` runs per row, and its smallest visible difference.

    Both are None below two seeds, of which there is no interval.
    """
    power, visible = None, None
    if seeds > 1:
        power, visible = compute_power(noise, seeds, noise.images), compute_visible_difference(noise, seeds)
    return asdict(noise) | {"seeds": seeds, "effect": EFFECT, "power": power, "visible_difference": visible}


def _find_least(values: range, power: Callable[[int], float]) -> int | None:
    """Return the least of ascending values with a power of at least `TARGET`; power ascends. None if it is none."""
    place = bisect_left(values, TARGET, key=power)
    return values[place] if place < len(values) else None


def _root_mean_variance(values: np.ndarray) -> float:
    """Return the standard deviation over the resamples of (R, 1 + B), its variance averaged over R."""
    return float(np.sqrt(np.nanvar(values[:, 1:], axis=1, ddof=1).mean()))
