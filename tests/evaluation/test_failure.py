"""Area under the risk-coverage curve: closed forms, and cases of equal confidence."""

from itertools import permutations

import numpy as np
import pytest

from nnunetv2_diffusion.evaluation.failure import aurc, excess_aurc, failure_scores, selective_risk


@pytest.mark.parametrize("n", [1, 2, 7, 50])
def test_perfect_ranking_has_the_closed_form(n):
    risk = np.arange(1, n + 1) / n  # the k surest have mean risk (k + 1) / (2 n)
    assert aurc(-risk, risk) == pytest.approx((n + 3) / (4 * n))
    assert excess_aurc(-risk, risk) == 0


@pytest.mark.parametrize("n", [2, 7, 50])
def test_reversed_ranking_has_the_closed_form(n):
    risk = np.arange(1, n + 1) / n  # the k surest are the k worst: 1 - (k - 1) / (2 n)
    assert aurc(risk, risk) == pytest.approx(1 - (n - 1) / (4 * n))
    assert excess_aurc(risk, risk) == pytest.approx((1 - (n - 1) / (4 * n)) - (n + 3) / (4 * n))


def test_constant_confidence_has_the_mean_risk():
    risk = np.array([0.1, 0.5, 0.9, 0.2])
    np.testing.assert_allclose(selective_risk(np.ones(4), risk), risk.mean())
    assert aurc(np.ones(4), risk) == pytest.approx(risk.mean())


def test_curve_ends_at_the_mean_risk_and_starts_at_the_surest_case():
    curve = selective_risk([0.2, 0.9, 0.5], [0.6, 0.1, 0.2])
    np.testing.assert_allclose(curve, [0.1, 0.15, 0.3])


def test_ties_are_the_mean_over_all_orders():
    confidence, risk = np.array([3, 2, 2, 2, 1]), np.array([0.1, 0.9, 0.2, 0.4, 0.3])
    curves = []
    for order in permutations((1, 2, 3)):
        curves.append(np.cumsum(risk[[0, *order, 4]]) / np.arange(1, 6))
    np.testing.assert_allclose(selective_risk(confidence, risk), np.mean(curves, axis=0))


def test_order_of_cases_changes_no_bit():
    generator = np.random.default_rng(0)
    confidence, risk = generator.integers(0, 5, 60) / 7, generator.random(60)
    for _ in range(20):
        order = generator.permutation(60)
        assert aurc(confidence[order], risk[order]) == aurc(confidence, risk)
        assert excess_aurc(confidence[order], risk[order]) == excess_aurc(confidence, risk)


def test_only_the_order_of_confidence_matters():
    generator = np.random.default_rng(0)
    confidence, risk = generator.random((2, 30))
    assert aurc(np.exp(5 * confidence), risk) == aurc(confidence, risk)


def test_undefined_cases_are_left_out_and_counted():
    scores = failure_scores([0.9, np.nan, 0.5, 0.7], [0.8, 0.9, 0.4, np.nan])
    assert (scores["cases"], scores["left_out"]) == (2, 2)
    assert scores["AURC"] == pytest.approx((0.2 + 0.4) / 2)
    assert scores["ExcessAURC"] == 0


def test_no_case_that_counts_has_no_score():
    scores = failure_scores([np.nan], [0.5])
    assert (scores["cases"], scores["left_out"]) == (0, 1)
    assert np.isnan([scores["AURC"], scores["ExcessAURC"]]).all()


@pytest.mark.parametrize(
    ("confidence", "risk", "message"),
    [
        ([], [], "no cases"),
        ([1, 2], [1], r"shape \(2,\) and risk \(1,\)"),
        ([np.nan], [1], "NaN"),
        ([1], [np.inf], "NaN"),
    ],
)
def test_cases_that_cannot_be_ranked_are_refused(confidence, risk, message):
    with pytest.raises(ValueError, match=message):
        aurc(confidence, risk)
