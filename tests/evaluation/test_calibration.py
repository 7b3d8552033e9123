"""Calibration scores are 0 where they should be, and their closed forms elsewhere."""

import numpy as np
import pytest

from nnunetv2_diffusion.evaluation.calibration import (
    NLL_CLIP,
    around_foreground,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from nnunetv2_diffusion.evaluation.probabilistic import calibration_scores, probabilistic_scores

SCORES = (expected_calibration_error, brier_score, negative_log_likelihood)


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture
def truth(generator):
    return generator.random((2, 5, 6, 7)) < 0.3


# ---- calibration error, Brier score, likelihood


def test_perfect_prediction_scores_0(truth):
    probabilities = truth.astype(np.float32)
    np.testing.assert_array_equal(expected_calibration_error(probabilities, truth), [0, 0])
    np.testing.assert_array_equal(brier_score(probabilities, truth), [0, 0])
    np.testing.assert_allclose(negative_log_likelihood(probabilities, truth), -np.log1p(-NLL_CLIP), rtol=1e-6)


def test_certain_and_always_wrong_prediction_scores_the_largest_values(truth):
    probabilities = (~truth).astype(np.float64)
    np.testing.assert_array_equal(expected_calibration_error(probabilities, truth), [1, 1])
    np.testing.assert_array_equal(brier_score(probabilities, truth), [1, 1])
    np.testing.assert_allclose(negative_log_likelihood(probabilities, truth), -np.log(NLL_CLIP))


def test_truth_drawn_from_the_probabilities_is_calibrated(generator):
    probabilities = generator.random((2, 300000))
    drawn = generator.random(probabilities.shape) < probabilities
    assert expected_calibration_error(probabilities, drawn).max() < 0.005
    # E (p - y)^2 = E p (1 - p) = 1/6, and E -log p = 1/2, for a uniform p
    np.testing.assert_allclose(brier_score(probabilities, drawn), 1 / 6, atol=0.002)
    np.testing.assert_allclose(negative_log_likelihood(probabilities, drawn), 1 / 2, atol=0.005)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.35, 1.0])
def test_one_probability_for_all_voxels_has_closed_forms(p):
    truth = np.array([[True, False, False, False]])
    probabilities = np.full(truth.shape, p)
    q = np.clip(p, NLL_CLIP, 1 - NLL_CLIP)
    assert expected_calibration_error(probabilities, truth)[0] == pytest.approx(abs(0.25 - p))
    assert brier_score(probabilities, truth)[0] == pytest.approx(0.25 * (1 - p) ** 2 + 0.75 * p**2)
    assert negative_log_likelihood(probabilities, truth)[0] == pytest.approx(-0.25 * np.log(q) - 0.75 * np.log(1 - q))


def test_brier_score_is_reliability_less_resolution_plus_uncertainty(generator):
    probabilities = generator.integers(0, 11, (1, 2000)) / 10
    truth = generator.random(probabilities.shape) < probabilities**2
    p, y = probabilities[0], truth[0]
    base, reliability, resolution = y.mean(), 0.0, 0.0
    for value in np.unique(p):
        share, hits = (p == value).mean(), y[p == value].mean()
        reliability += share * (value - hits) ** 2
        resolution += share * (hits - base) ** 2
    assert brier_score(probabilities, truth)[0] == pytest.approx(reliability - resolution + base * (1 - base))


def test_calibration_error_is_the_weighted_gap_of_bins():
    probabilities = np.array([[0.05, 0.15, 0.5, 0.9, 1.0]])
    truth = np.array([[False, True, True, False, True]])
    # two bins: [0, 0.5) has truth 1/2 and confidence 0.1; [0.5, 1] has 2/3 and 0.8
    expected = 2 / 5 * (1 / 2 - 0.1) + 3 / 5 * (0.8 - 2 / 3)
    assert expected_calibration_error(probabilities, truth, bins=2)[0] == pytest.approx(expected)


def test_opposite_errors_cancel_within_a_bin_only():
    probabilities = np.array([[0.3, 0.7]])
    truth = np.array([[True, False]])
    assert expected_calibration_error(probabilities, truth, bins=1)[0] == pytest.approx(0)
    assert expected_calibration_error(probabilities, truth, bins=2)[0] == pytest.approx(0.7)


def test_last_bin_holds_1_too():
    # 0.95 and 1, one hit: in one bin, the gap is 1/2 - 0.975; in two, it would be the mean of 0.05 and 1
    error = expected_calibration_error(np.array([[0.95, 1.0]]), np.array([[True, False]]), bins=10)
    assert error[0] == pytest.approx(0.475)


def test_rounding_errors_beyond_0_and_1_are_no_probabilities():
    probabilities, truth = np.array([[1.0005, -0.0005]]), np.array([[True, False]])
    assert brier_score(probabilities, truth)[0] == 0
    assert expected_calibration_error(probabilities, truth)[0] == 0


@pytest.mark.parametrize("score", SCORES)
def test_only_voxels_that_count_matter(score, truth, generator):
    probabilities = generator.random(truth.shape)
    where = generator.random(truth.shape[1:]) < 0.5
    expected = score(probabilities[:, where], truth[:, where])
    changed, other = probabilities.copy(), truth.copy()
    changed[:, ~where] = np.nan
    other[:, ~where] ^= True
    np.testing.assert_array_equal(score(changed, other, where), expected)
    assert not np.allclose(score(probabilities, truth), expected)


@pytest.mark.parametrize("score", SCORES)
def test_nothing_that_counts_is_nan_for_every_class(score, truth):
    values = score(truth.astype(float), truth, np.zeros(truth.shape[1:], bool))
    assert values.shape == (2,)
    assert np.isnan(values).all()


@pytest.mark.parametrize("score", SCORES)
def test_classes_are_scored_on_their_own(score, truth, generator):
    probabilities = generator.random(truth.shape)
    single = [score(probabilities[i : i + 1], truth[i : i + 1])[0] for i in range(2)]
    np.testing.assert_array_equal(score(probabilities, truth), single)


def test_single_precision_does_not_add_up_errors():
    probabilities = np.full((1, 2**21), 0.1, np.float32)
    assert brier_score(probabilities, np.zeros(probabilities.shape, bool))[0] == pytest.approx(0.01, rel=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"truth": np.zeros((2, 3), bool)}, r"truth has shape \(2, 3\), expected \(1, 3\)"),
        ({"truth": np.zeros((1, 3), int)}, "truth has dtype int64, expected bool"),
        ({"where": np.ones((1, 3), bool)}, r"where has shape \(1, 3\), expected \(3,\)"),
        ({"probabilities": np.array([[0.1, np.nan, 0.2]])}, "probabilities of class 0"),
        ({"probabilities": np.array([[0.1, 1.2, 0.2]])}, r"in \[0.1, 1.2\], expected \[0, 1\]"),
        ({"bins": 0}, "bins is 0"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"probabilities": np.full((1, 3), 0.5), "truth": np.zeros((1, 3), bool)} | change
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(**arguments)


# ---- region


def test_region_is_what_is_within_the_margin_along_every_axis():
    mask = np.zeros((9, 21), bool)
    mask[4, 10] = True
    region = around_foreground(mask, np.zeros_like(mask), spacing=(2.0, 0.5), margin=3.0)
    z, x = np.indices(mask.shape)
    np.testing.assert_array_equal(region, ((z - 4) * 2.0) ** 2 + ((x - 10) * 0.5) ** 2 <= 9)
    assert region[4, 4]  # at just the margin


def test_region_is_the_same_as_the_distance_to_all_foreground_gives(generator):
    truth, predicted = generator.random((2, 12, 13, 14)) < 0.002
    spacing = np.array([1.5, 0.7, 1.0])
    places = np.argwhere(truth | predicted) * spacing
    grid = np.stack(np.indices(truth.shape), -1) * spacing
    distance = np.linalg.norm(grid[..., None, :] - places, axis=-1).min(-1)
    np.testing.assert_array_equal(around_foreground(truth, predicted, spacing, 2.3), distance <= 2.3)


def test_region_without_a_margin_is_the_foreground_and_without_foreground_is_empty(truth):
    empty = np.zeros_like(truth[0])
    np.testing.assert_array_equal(around_foreground(truth[0], truth[1], (1, 1, 1), 0), truth[0] | truth[1])
    assert not around_foreground(empty, empty, (1, 1, 1), 10).any()


@pytest.mark.parametrize(
    ("spacing", "margin", "message"),
    [((1, 1), 1, "spacing"), ((1, 0, 1), 1, "spacing"), ((1, 1, 1), -1, "margin"), ((1, 1, 1), np.nan, "margin")],
)
def test_region_names_what_is_wrong(spacing, margin, message, truth):
    with pytest.raises(ValueError, match=f"{message} is "):
        around_foreground(truth[0], truth[1], spacing, margin)


# ---- scores of a case


def disc(size, radius):
    """One class, (1, size, size), and soft probabilities for it."""
    y, x = np.indices((size, size)) - size // 2
    distance = np.hypot(y, x)
    return (distance <= radius)[None], (1 / (1 + np.exp(distance - radius - 1)))[None]


def test_scores_of_a_case_do_not_depend_on_the_field_of_view():
    truth, probabilities = disc(41, 6)
    pad = [(0, 0), (30, 30), (30, 30)]
    small = probabilistic_scores([truth], probabilities, None, (1, 1))
    large = probabilistic_scores([np.pad(truth, pad)], np.pad(probabilities, pad), None, (1, 1))
    assert large[0] == pytest.approx(small[0])
    assert expected_calibration_error(np.pad(probabilities, pad), np.pad(truth, pad))[0] < small[0]["ECE"] / 2


def test_ignored_voxels_change_no_score_of_a_case():
    truth, probabilities = disc(41, 6)
    valid = np.ones(truth.shape[1:], bool)
    valid[:, :10] = False
    samples = [probabilities > 0.4, probabilities > 0.6]
    before = probabilistic_scores([truth], probabilities, samples, (1, 1), valid)
    changed = np.where(valid, probabilities, 1.0)
    samples = [np.where(valid, sample, True) for sample in samples]
    after = probabilistic_scores([np.where(valid, truth, True)], changed, samples, (1, 1), valid)
    assert after == before


def test_predicted_mask_decides_where_scores_count():
    truth = np.zeros((1, 30), bool)
    truth[0, 5] = True
    probabilities = np.where(truth, 0.9, 0.0)
    probabilities[0, 25] = 0.4  # of two classes it may be the most probable one
    predicted = np.zeros(30, bool)
    predicted[25] = True
    near = probabilistic_scores([truth], probabilities, None, (1,), margin=1)
    both = probabilistic_scores([truth], probabilities, None, (1,), predicted=predicted, margin=1)
    assert near[0]["Brier"] == pytest.approx(0.1**2 / 3)
    assert both[0]["Brier"] == pytest.approx((0.1**2 + 0.4**2) / 6)


def test_case_has_the_scores_of_what_is_given():
    truth, probabilities = disc(21, 4)
    calibration, sampling = {"ECE", "Brier", "NLL"}, {"GED2", "HungarianIoU", "PairwiseDice"}
    for has_probabilities in (True, False):
        for samples in (None, [truth, truth]):
            scores = probabilistic_scores([truth], probabilities if has_probabilities else None, samples, (1, 1))
            expected = (calibration if has_probabilities else set()) | (sampling if samples else set())
            assert set(scores[0]) == expected


def test_case_is_scored_class_by_class_and_leaves_its_arguments_alone(generator):
    references = list(generator.random((2, 3, 8, 9)) < 0.4)
    samples = list(generator.random((4, 3, 8, 9)) < 0.4)
    probabilities = np.mean(samples, axis=0)
    valid = generator.random((8, 9)) < 0.8
    arrays = [*references, *samples, probabilities, valid]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    scores = probabilistic_scores(references, probabilities, samples, (1, 1), valid, margin=100)
    assert sorted(scores) == [0, 1, 2]
    for index in scores:
        (expected,) = calibration_scores(probabilities[index : index + 1], references[0][index : index + 1], valid)
        assert {name: scores[index][name] for name in expected} == expected
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"references": []}, "no references"),
        ({"samples": []}, "0 masks"),
        ({"samples": [np.zeros((2, 4), bool)]}, r"samples\[0\] has shape \(2, 4\)"),
        ({"probabilities": np.zeros((2, 5))}, r"probabilities\[0\] has shape \(2, 5\), expected \(1, 5\)"),
        ({"references": [np.zeros((1, 5), bool), np.zeros((1, 4), bool)]}, r"references\[1\]"),
        ({"valid": np.ones(4, bool)}, r"valid has shape \(4,\)"),
        ({"predicted": np.ones(1, bool)}, r"predicted has shape \(1,\)"),
    ],
)
def test_case_names_the_array_that_is_wrong(change, message):
    mask = np.zeros((1, 5), bool)
    arguments = {"references": [mask], "probabilities": np.zeros((1, 5)), "samples": [mask], "spacing": (1,)} | change
    with pytest.raises(ValueError, match=message):
        probabilistic_scores(**arguments)
