"""Laws of the statistics, against hand-computed values and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kd import stats


def test_mean_has_students_interval():
    found = stats.mean([0.9, 0.92, 0.94])
    low, high = scipy_stats.t.interval(0.95, 2, loc=0.92, scale=scipy_stats.sem([0.9, 0.92, 0.94]))
    assert (found.value, found.n) == (pytest.approx(0.92), 3)
    assert found.sd == pytest.approx(0.02)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_one_value_has_no_interval():
    found = stats.mean([0.5])
    assert (found.value, found.low, found.high, found.sd) == (0.5, None, None, None)
    assert not found.resolved


def test_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        stats.mean([])


def test_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    inside = [e.low <= 0 <= e.high for e in (stats.mean(list(generator.normal(size=3))) for _ in range(1500))]
    assert 0.93 < np.mean(inside) < 0.97


def test_paired_takes_common_seeds_and_equals_scipy():
    ours, theirs = {0: 0.9, 1: 0.95, 2: 0.93, 7: 0.1}, {0: 0.88, 1: 0.9, 2: 0.92}
    found, p = stats.paired(ours, theirs)
    assert found.n == 3
    assert found.value == pytest.approx((0.02 + 0.05 + 0.01) / 3)
    assert p == pytest.approx(scipy_stats.ttest_rel([0.9, 0.95, 0.93], [0.88, 0.9, 0.92]).pvalue)


@pytest.mark.parametrize(("gain", "p"), [(0.0, 1.0), (0.25, None)])
def test_paired_without_variation(gain, p):
    found, value = stats.paired({0: 0.5 + gain, 1: 0.25 + gain}, {0: 0.5, 1: 0.25})
    assert (value, found.low, found.resolved) == (p, None, False)  # steps of one image: two equal ones prove nothing


def test_paired_without_common_seeds_names_them():
    with pytest.raises(ValueError, match=r"\[0\] and \[1\]"):
        stats.paired({0: 0.5}, {1: 0.5})


def test_one_pair_has_no_test():
    assert stats.paired({0: 0.5}, {0: 0.25})[1] is None


def test_holm_by_hand():
    assert stats.holm([0.01, 0.04, 0.03, None]) == [pytest.approx(0.03), pytest.approx(0.06), pytest.approx(0.06), None]


def test_holm_never_lowers_and_keeps_order():
    p = list(np.random.default_rng(0).uniform(size=20))
    corrected = stats.holm(p)
    assert all(c >= v for c, v in zip(corrected, p, strict=True))
    assert list(np.argsort(p)) == list(np.lexsort((p, corrected)))


def test_spearman_equals_scipy_on_means():
    generator = np.random.default_rng(2)
    groups = [(x, list(x + generator.normal(scale=0.05, size=3))) for x in generator.uniform(size=8)]
    found = stats.spearman(groups)
    expected = scipy_stats.spearmanr([x for x, _ in groups], [np.mean(y) for _, y in groups]).statistic
    assert found.value == pytest.approx(expected)
    assert found.low <= found.value <= found.high
    assert found.resolved


def test_spearman_of_noise_is_not_resolved_and_repeatable():
    generator = np.random.default_rng(3)
    groups = [(x, list(generator.normal(size=3))) for x in generator.uniform(size=8)]
    assert not stats.spearman(groups).resolved
    assert stats.spearman(groups) == stats.spearman(groups)


def test_spearman_of_too_little():
    assert math.isnan(stats.spearman([(0.5, [0.5])]).value)
    assert stats.spearman([(0.5, [0.5]), (0.6, [0.7])]).low is None
    assert math.isnan(stats.spearman([(0.5, [0.5]), (0.5, [0.7]), (0.5, [0.1])]).value)


def test_pareto_front():
    points = [(1.0, 0.9), (2.0, 0.95), (2.0, 0.94), (3.0, 0.95), (0.5, 0.2)]
    assert stats.pareto(points) == [True, True, False, False, True]
    assert stats.pareto([(1.0, 0.5), (1.0, 0.5)]) == [True, True]
