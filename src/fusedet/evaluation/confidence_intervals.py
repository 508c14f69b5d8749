"""Confidence intervals: Student's t over seeds, percentiles over resamples."""

import math
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist, fmean, variance
from typing import NamedTuple

import numpy as np

from fusedet.errors import InputError

LEVEL = 0.95


class ConfidenceInterval(NamedTuple):
    """A value and the ends of its interval, NaN if it has no interval."""

    value: float
    low: float
    high: float


def compute_seed_interval(values: Sequence[float], level: float = LEVEL) -> ConfidenceInterval:
    """Compute the mean of a metric over training seeds with its t interval; a single run has no interval.

    It covers the choice of the seed (initial weights, order of the images) on these images, and assumes that the metric
    is normally distributed over seeds.

    Raises:
        InputError: No value.
    """
    if not values:
        raise InputError("an interval over seeds needs at least one value")
    return _interval(
        fmean(values), variance(values) / len(values) if len(values) > 1 else math.nan, len(values) - 1, level
    )


def compute_seed_difference(
    a: Sequence[float], b: Sequence[float], *, paired: bool, level: float = LEVEL
) -> ConfidenceInterval:
    """Compute the mean of b minus the mean of a with its t interval; none if a side has a single run.

    Args:
        a: Values of the reference.
        b: Values of the other side.
        paired: Whether a[i] and b[i] share a seed; the interval is then that of their differences. Otherwise it is
            Welch's, for independent runs of unequal variance.
        level: Confidence level.

    Raises:
        InputError: No value, or pairs of unequal number.
    """
    if paired:
        if len(a) != len(b):
            raise InputError(f"paired values must be of equal number, they are {len(a)} and {len(b)}")
        return compute_seed_interval([y - x for x, y in zip(a, b)], level)
    if not a or not b:
        raise InputError("an interval over seeds needs at least one value on each side")
    value = fmean(b) - fmean(a)
    if min(len(a), len(b)) < 2:
        return ConfidenceInterval(value, math.nan, math.nan)
    parts = [(variance(side) / len(side), len(side) - 1) for side in (a, b)]
    error = sum(part for part, _ in parts)
    freedom = error**2 / sum(part**2 / df for part, df in parts) if error else 1.0  # Welch and Satterthwaite
    return _interval(value, error, freedom, level)


def compute_percentile_interval(values: np.ndarray, count: int, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Compute the ends (low, high) of the expanded percentile interval.

    For many items the ends are the percentiles that enclose `level` of the values. For few items they lie further out,
    as Student's t does against the normal distribution, and because resamples vary less than new data, by (count - 1) /
    count. One item has no interval. NaN values are left out. The p-th percentile is the p (B + 1)-th smallest value,
    which a new value exceeds with probability 1 - p.

    Args:
        values: (..., B), a metric on B resamples.
        count: Items in each resample.
        level: Confidence level.

    References:
        Hesterberg, "What Teachers Should Know About the Bootstrap", The American Statistician 69 (2015), section 4.
    """
    ends = np.full((2, *values.shape[:-1]), np.nan)
    known = ~np.isnan(values).all(axis=-1)
    if count > 1 and known.any():
        reach = math.sqrt(count / (count - 1)) * t_quantile((1 + level) / 2, count - 1)
        tail = NormalDist().cdf(-reach)
        ends[:, known] = np.nanquantile(values[known], [tail, 1 - tail], axis=-1, method="weibull")
    return ends[0], ends[1]


@lru_cache(maxsize=1024)
def t_quantile(p: float, freedom: float) -> float:
    """Return the p quantile, 0 < p < 1, of Student's t with `freedom` > 0 degrees of freedom, not necessarily whole.

    >>> round(t_quantile(0.975, 2), 4)
    4.3027
    """
    if not 0 < p < 1 or not freedom > 0:
        raise InputError(f"a t quantile needs 0 < p < 1 and degrees of freedom above 0, got {p} and {freedom}")
    if p < 0.5:
        return -t_quantile(1 - p, freedom)
    # bisect x = freedom / (freedom + t²), whose regularized incomplete beta function is 2 (1 - p)
    low, high = 0.0, 1.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if _beta(middle, freedom / 2, 0.5) > 2 * (1 - p) else (middle, high)
    return math.sqrt(freedom * (1 - high) / high)


def _interval(value: float, error: float, freedom: float, level: float) -> ConfidenceInterval:
    """Return value +- t standard errors, given the squared standard error."""
    if math.isnan(error):
        return ConfidenceInterval(value, math.nan, math.nan)
    reach = t_quantile((1 + level) / 2, freedom) * math.sqrt(error)
    return ConfidenceInterval(value, value - reach, value + reach)


def _beta(x: float, a: float, b: float) -> float:
    """Return the regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges fast
        return 1 - _beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    value = 1.0
    for m in range(200, 0, -1):  # from the inside out; far more terms than double precision needs
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        value = 1 + odd / (1 + even / value)
    return front / value
