"""Tests on pairs against scipy and tables, intervals against what they should cover."""

import warnings

import numpy as np
import pytest
from scipy import stats

from nnunetv2_diffusion.evaluation.statistics import bootstrap_interval, compare_pairs, paired_t_test, wilcoxon_test

METHOD = np.array([0.91, 0.84, 0.77, 0.95, 0.62, 0.88, 0.70, 0.81])
REFERENCE = np.array([0.90, 0.80, 0.79, 0.90, 0.55, 0.85, 0.71, 0.73])


def test_both_tests_are_those_of_scipy_on_pairs():
    result = compare_pairs(METHOD, REFERENCE)
    expected = stats.ttest_rel(METHOD, REFERENCE)
    assert (result.t, result.p_t) == pytest.approx((expected.statistic, expected.pvalue))
    assert result.p_wilcoxon == pytest.approx(stats.wilcoxon(METHOD, REFERENCE).pvalue)


def test_t_test_by_hand():
    difference = np.array([1.0, 2.0, 3.0])  # mean 2, sd 1: t = 2 sqrt(3), two degrees of freedom
    t, p = paired_t_test(difference)
    assert t == pytest.approx(2 * np.sqrt(3))
    assert p == pytest.approx(1 - t / np.sqrt(2 + t**2))


def test_wilcoxon_by_hand():
    # all six have one sign: two of 2^6 assignments of signs are as extreme
    assert wilcoxon_test(np.arange(1.0, 7.0)) == pytest.approx(2 / 64)
    assert wilcoxon_test(-np.arange(1.0, 7.0)) == pytest.approx(2 / 64)


def test_pairs_without_a_difference_do_not_matter_to_wilcoxon():
    assert wilcoxon_test(np.array([1.0, 0, 2, 3, 0, 4, 5, 6])) == pytest.approx(2 / 64)


def test_exchange_of_methods_changes_signs_only():
    there, back = compare_pairs(METHOD, REFERENCE), compare_pairs(REFERENCE, METHOD)
    assert back.difference == pytest.approx(-there.difference)
    assert back.t == pytest.approx(-there.t)
    assert (back.p_t, back.p_wilcoxon) == pytest.approx((there.p_t, there.p_wilcoxon))
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]), abs=2e-3)
    assert there.won + back.won == 1


@pytest.mark.parametrize(("better", "won"), [(1, 2.5 / 4), (-1, 1.5 / 4)])
def test_ties_are_half_won(better, won):
    result = compare_pairs(np.array([2.0, 2, 3, 0]), np.array([1.0, 1, 3, 1]), better)
    assert result.won == won


def test_nothing_is_won_where_nothing_is_better():
    assert np.isnan(compare_pairs(METHOD, REFERENCE, better=0).won)


def test_undefined_pairs_are_left_out_of_everything_and_counted():
    method = np.array([*METHOD, np.nan, 0.5, np.inf])
    reference = np.array([*REFERENCE, 0.5, np.nan, 0.5])
    result, expected = compare_pairs(method, reference), compare_pairs(METHOD, REFERENCE)
    assert (result.pairs, result.left_out) == (8, 3)
    for name in ("difference", "interval", "t", "p_t", "p_wilcoxon", "won"):
        assert getattr(result, name) == getattr(expected, name), name


@pytest.mark.parametrize("pairs", [0, 1])
def test_below_two_pairs_there_is_no_test(pairs):
    result = compare_pairs(METHOD[:pairs], REFERENCE[:pairs])
    assert result.pairs == pairs
    assert np.isnan([result.t, result.p_t, result.p_wilcoxon, *result.interval]).all()
    assert np.isnan(result.difference) == (pairs == 0)


def test_equal_methods_do_not_differ():
    result = compare_pairs(METHOD, METHOD)
    assert (result.t, result.p_t, result.p_wilcoxon, result.won) == (0, 1, 1, 0.5)
    assert result.interval == (0, 0)


@pytest.mark.parametrize("difference", [[0.1] * 5, [0.1, 0.1], [0.0, 0.1], [0.1, 0.1, 0.2]])
def test_odd_pairs_make_no_warnings(difference):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = compare_pairs(np.array(difference), np.zeros(len(difference)))
    assert 0 <= result.p_t <= 1
    assert 0 <= result.p_wilcoxon <= 1


def test_lengths_must_agree():
    with pytest.raises(ValueError, match=r"shapes \(8,\) and \(7,\)"):
        compare_pairs(METHOD, REFERENCE[:7])


def coverage(draw, n, level, repeats=500):
    """Share of intervals of n draws that hold the true mean, 0."""
    hits = 0
    for seed in range(repeats):
        low, high = bootstrap_interval(draw(np.random.default_rng(seed), n), level, 1000, seed)
        hits += low <= 0 <= high
    return hits / repeats


def normal(generator, n):
    return generator.normal(size=n)


def skewed(generator, n):
    return generator.exponential(size=n) - 1


@pytest.mark.parametrize(
    ("draw", "n", "level", "lowest", "highest"),
    [
        (normal, 40, 0.8, 0.75, 0.85),
        (normal, 10, 0.95, 0.91, 0.98),  # the plain percentile interval covers 0.89
        (skewed, 40, 0.95, 0.91, 0.98),
    ],
)
def test_interval_covers_the_mean_as_often_as_it_says(draw, n, level, lowest, highest):
    assert lowest <= coverage(draw, n, level) <= highest


def test_interval_of_many_values_is_that_of_t():
    values = np.random.default_rng(0).normal(3, 2, 400)
    expected = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    assert bootstrap_interval(values, 0.95, 20000) == pytest.approx(expected, abs=0.01)


def test_seed_decides_the_interval_and_chunks_do_not(monkeypatch):
    first = bootstrap_interval(METHOD, 0.95, 1000, seed=1)
    assert bootstrap_interval(METHOD, 0.95, 1000, seed=1) == first
    assert bootstrap_interval(METHOD, 0.95, 1000, seed=2) != first
    monkeypatch.setattr("nnunetv2_diffusion.evaluation.statistics.CHUNK", 50)
    assert bootstrap_interval(METHOD, 0.95, 1000, seed=1) == first


@pytest.mark.parametrize(("level", "resamples"), [(0, 100), (1, 100), (0.9, 0)])
def test_interval_refuses_what_it_cannot_use(level, resamples):
    with pytest.raises(ValueError, match="level is "):
        bootstrap_interval(METHOD, level, resamples)
