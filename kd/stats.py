"""What a handful of seeds supports: means with intervals, paired tests, corrections, rank correlation.

Values are fractions; nothing here knows what they measure. scipy is imported late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

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
    """The mean with Student's t interval and the sample standard deviation.

    No interval for one value, nor for values that are all equal: accuracies come in steps of one image, and a few that
    fall on the same step do not show how far they spread.

    Raises ValueError for no value at all.
    """
    n = len(values)
    if not n:
        raise ValueError("the mean of no values; expected at least one")
    centre = math.fsum(values) / n
    if n == 1:
        return Estimate(centre, n=1)
    from scipy.stats import t

    if max(values) == min(values):
        return Estimate(centre, n=n, sd=0.0)
    sd = math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (n - 1))
    half = float(t.ppf(0.5 + level / 2, n - 1)) * sd / math.sqrt(n)
    return Estimate(centre, centre - half, centre + half, n, sd)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> tuple[Estimate, float | None]:
    """Mean difference over the seeds that both have, with interval, and the p-value of the paired t-test (two-sided).

    The p-value is None below two pairs, and where all differences are equal and not zero; all zero give 1.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(ours)} and {sorted(theirs)}; a pair is one seed in both")
    gains = [ours[s] - theirs[s] for s in seeds]
    estimate = mean(gains)
    if len(gains) < 2:
        return estimate, None
    if not estimate.sd:
        return estimate, None if estimate.value else 1.0
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
    seeds, and is stretched to the value itself. Resamples of fewer than three different groups, or without variation,
    do not count; fewer than three groups give no interval, fewer than two no value (nan).
    """
    import numpy as np

    xs = np.array([x for x, _ in groups], float)  # (G,)
    means = np.array([np.mean(ys) for _, ys in groups])  # (G,)
    value = float(_rank_correlation(xs[None], means[None])[0]) if len(groups) > 1 else math.nan
    if len(groups) < 3 or math.isnan(value):
        return Estimate(value, n=len(groups))
    generator = np.random.default_rng(seed)
    picked = generator.integers(len(groups), size=(RESAMPLES, len(groups)))  # (R, G)
    varied = np.array([len(set(row)) > 2 for row in picked.tolist()])
    picked = picked[varied]
    found = _rank_correlation(xs[picked], _drawn_means([ys for _, ys in groups], picked, generator))
    found = found[~np.isnan(found)]
    if len(found) < RESAMPLES // 4:
        return Estimate(value, n=len(groups))
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), len(groups))


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's coefficient of each row, (R, G), (R, G) -> (R,); nan where a row has no variation."""
    import numpy as np
    from scipy.stats import rankdata

    a, b = (rankdata(v, axis=1) - (v.shape[1] + 1) / 2 for v in (x, y))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.divide((a * b).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)


def _drawn_means(values: Sequence[Sequence[float]], picked: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """For every picked group (R, G) the mean of as many draws from its values as it has, (R, G)."""
    import numpy as np

    counts = np.array([len(v) for v in values])
    table = np.array([np.resize(v, counts.max()) for v in values])  # (G, most)
    size = counts[picked][..., None]  # (R, G, 1)
    drawn = (generator.random((*picked.shape, counts.max())) * size).astype(int)
    kept = np.arange(counts.max()) < size
    return (table[picked[..., None], drawn] * kept).sum(-1) / size[..., 0]


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which (cost, gain) points no other beats: cost lower or equal and gain higher or equal, one of them strictly."""

    def beaten(i: int) -> bool:
        cost, gain = points[i]
        return any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in points)

    return [not beaten(i) for i in range(len(points))]
