"""What a handful of seeds supports: means with intervals, paired tests, corrections, rank correlation.

Values are fractions; nothing here knows what they measure. scipy is imported late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LEVEL = 0.95
RESAMPLES = 4000


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `low` and `high` are None where the data give none."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    sd: float | None = None

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low is not None and not self.low <= 0 <= self.high


def mean(values: Sequence[float], level: float = LEVEL) -> Estimate:
    """The mean with Student's t interval and the sample standard deviation; no interval for one value.

    Raises ValueError for no value at all.
    """
    n = len(values)
    if not n:
        raise ValueError("the mean of no values; expected at least one")
    centre = math.fsum(values) / n
    if n == 1:
        return Estimate(centre, n=1)
    from scipy.stats import t

    sd = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.5 + level / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(centre, centre - half, centre + half, n, sd)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[Estimate, float | None]:
    """Mean difference over the seeds that both have, with interval, and the p-value of the paired t-test (two-sided).

    The p-value is None below two pairs. Differences that are all equal and not zero give p = 0, all zero p = 1.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(ours)} and {sorted(theirs)}; a pair is one seed in both")
    gains = [ours[s] - theirs[s] for s in seeds]
    estimate = mean(gains)
    if len(gains) < 2:
        return estimate, None
    if not estimate.sd:
        return estimate, 0.0 if estimate.value else 1.0
    from scipy.stats import ttest_1samp

    return estimate, float(ttest_1samp(gains, 0.0).pvalue)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for many comparisons - Holm 1979 (Scand. J. Statist. 6, 65); None stays None."""
    order = sorted((i for i, p in enumerate(p_values) if p is not None), key=lambda i: p_values[i])
    corrected: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, p_values[i] * (len(order) - rank)))
        corrected[i] = worst
    return corrected


def spearman(groups: Sequence[tuple[float, Sequence[float]]], level: float = LEVEL, seed: int = 0) -> Estimate:
    """Rank correlation of x with the mean of its y values over groups (x, ys), with a percentile bootstrap interval.

    Groups are drawn with replacement, and within each its y values: the interval covers the choice of teachers and the
    seeds, and is stretched to the value itself. Resamples without variation are drawn again; fewer than three groups
    give no interval, fewer than two no value (nan).
    """
    import numpy as np
    from scipy.stats import rankdata

    def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
        a, b = rankdata(x), rankdata(y)
        if a.std() == 0 or b.std() == 0:
            return math.nan
        return float(np.corrcoef(a, b)[0, 1])

    xs = np.array([x for x, _ in groups], float)
    value = rank_correlation(xs, np.array([np.mean(ys) for _, ys in groups])) if len(groups) > 1 else math.nan
    if len(groups) < 3 or math.isnan(value):
        return Estimate(value, n=len(groups))
    generator, found, tries = np.random.default_rng(seed), [], 0
    while len(found) < RESAMPLES and tries < 2 * RESAMPLES:
        tries += 1
        picked = generator.integers(len(groups), size=len(groups))
        if len(set(picked.tolist())) < 3:
            continue
        ys = [np.mean(generator.choice(groups[i][1], len(groups[i][1]))) for i in picked]
        drawn = rank_correlation(xs[picked], np.array(ys))
        if not math.isnan(drawn):
            found.append(drawn)
    if len(found) < RESAMPLES // 2:
        return Estimate(value, n=len(groups))
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), len(groups))


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, gain) points no other beats: cost lower or equal and gain higher or equal, one of them strictly."""

    def beaten(i: int) -> bool:
        cost, gain = points[i]
        return any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points)

    return [not beaten(i) for i in range(len(points))]
