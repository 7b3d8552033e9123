"""Two methods on the same cases: paired tests, bootstrap interval, share of cases won."""

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import stats

CHUNK = 2**22  # values that are resampled at a time: 32 MiB


@dataclass(frozen=True)
class PairedComparison:
    """A method against a reference over cases.

    Attributes:
        pairs: cases that count.
        left_out: cases in which one value is NaN or infinite.
        difference: mean of method - reference over the pairs.
        interval: bootstrap interval of ``difference``, low and high.
        t: Student's t of the pairs.
        p_t: two-sided p-value of the paired t-test.
        p_wilcoxon: two-sided p-value of Wilcoxon's signed-rank test; pairs without a difference are dropped.
        won: share of pairs in which the method is better, ties counted half; NaN if it is not known what is better.
    """

    pairs: int
    left_out: int
    difference: float
    interval: tuple[float, float]
    t: float
    p_t: float
    p_wilcoxon: float
    won: float


def compare_pairs(
    method: np.ndarray,
    reference: np.ndarray,
    better: int = 1,
    level: float = 0.99,
    resamples: int = 10000,
    seed: int = 0,
) -> PairedComparison:
    """Compare the values of two methods case by case.

    Tests need two pairs: their p-values and the interval are NaN otherwise. Both p-values are 1 if no pair differs.

    Args:
        method: (cases,); NaN and infinite values are left out, with their partners.
        reference: (cases,), in the same order.
        better: 1 if higher is better, -1 if lower is, 0 if neither.
        level: of the interval, in (0, 1).
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: if the lengths differ.
    """
    method, reference = np.asarray(method, np.float64), np.asarray(reference, np.float64)
    if method.ndim != 1 or method.shape != reference.shape:
        raise ValueError(f"values have shapes {method.shape} and {reference.shape}, expected (cases,) twice")
    known = np.isfinite(method) & np.isfinite(reference)
    difference = method[known] - reference[known]
    pairs = len(difference)
    t, p_t = paired_t_test(difference)
    return PairedComparison(
        pairs=pairs,
        left_out=len(known) - pairs,
        difference=float(difference.mean()) if pairs else np.nan,
        interval=bootstrap_interval(difference, level, resamples, seed),
        t=t,
        p_t=p_t,
        p_wilcoxon=wilcoxon_test(difference),
        won=float((np.sign(difference) * better + 1).mean() / 2) if pairs and better else np.nan,
    )


def paired_t_test(difference: np.ndarray) -> tuple[float, float]:
    """Student's t and two-sided p-value of paired differences, (n,); NaN below two, 0 and 1 if all are 0."""
    if len(difference) < 2:
        return np.nan, np.nan
    if not difference.any():
        return 0.0, 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # equal differences: t is infinite, or near to it
        result = stats.ttest_1samp(difference, 0.0)
    return float(result.statistic), float(result.pvalue)


def wilcoxon_test(difference: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test of differences, (n,), zeros dropped; NaN below two.

    Exact or approximate as scipy decides by number and ties.
    """
    if len(difference) < 2:
        return np.nan
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few cases
        return float(stats.wilcoxon(difference).pvalue)


def bootstrap_interval(
    values: np.ndarray, level: float = 0.99, resamples: int = 10000, seed: int = 0
) -> tuple[float, float]:
    """Expanded percentile interval of the mean (Hesterberg 2015, arXiv:1411.5279).

    The plain percentile interval is too narrow for few cases, as if the normal and not the t quantile were used and
    the variance were divided by n. Here the percentiles are moved outwards by just that. No interval of resampled
    means goes beyond the extreme values: of less than about 10 cases, it covers less than its level all the same.

    Args:
        values: (n,), finite.
        level: nominal coverage, in (0, 1).
        resamples: means of n values drawn with replacement.
        seed: of the draws.

    Returns:
        Low and high; NaN of fewer than two values.

    Raises:
        ValueError: if level or resamples are out of range.
    """
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level is {level} and resamples {resamples}, expected one in (0, 1) and at least 1")
    n = len(values)
    if n < 2:
        return np.nan, np.nan
    generator = np.random.default_rng(seed)
    rows = max(1, CHUNK // n)
    means = np.concatenate(
        [
            values[generator.integers(n, size=(min(rows, resamples - start), n))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    tail = stats.norm.cdf(np.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1))
    low, high = np.quantile(means, (tail, 1 - tail))
    return float(low), float(high)
