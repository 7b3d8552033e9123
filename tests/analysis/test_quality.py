"""Distances, calibration and soft Dice of a prediction, and whether variance points at errors: numbers by hand."""

import numpy as np
import pytest
import torch

from nnunetv2_diffusion.analysis.cases import MEAN, LabelledCase
from nnunetv2_diffusion.analysis.quality import (
    distance_scores,
    error_correlation,
    length_unit,
    probability_scores,
    with_mean,
)
from nnunetv2_diffusion.evaluation.labels import read_labels

LABELS = read_labels({"labels": {"background": 0, "left": 1, "right": 2}}, None, "here")
IGNORING = read_labels({"labels": {"background": 0, "left": 1, "right": 2, "ignore": 3}}, None, "here")


def case_of(reference, spacing=(1.0, 1.0, 1.0)):
    reference = np.asarray(reference)
    return LabelledCase("a", torch.zeros(1), {"spacing": list(spacing)}, np.zeros(reference.shape), reference)


def boxes(shift=0, shape=(12, 12, 12)):
    """Two cubes, moved along the last axis."""
    values = np.zeros(shape, int)
    values[2:6, 2:6, 2 + shift : 6 + shift] = 1
    values[7:11, 7:11, 2 + shift : 6 + shift] = 2
    return values


def one_hot(mask):
    return np.stack([mask == 1, mask == 2]).astype(float)


def test_a_shift_is_as_far_as_it_is_in_mm():
    scores = distance_scores(LABELS, case_of(boxes(), (1.0, 1.0, 2.5)), boxes(2))
    assert scores["left"]["HD95"] == scores["right"]["HD95"] == scores[MEAN]["HD95"] == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("spacing", "unit", "expected"),
    [((999 * 0.5, 0.5, 0.5), "px", 2.0), ((5.0, 0.5, 0.5), "mm", 1.0)],
)
def test_lengths_of_2d_images_are_pixels_and_those_of_a_slice_of_a_volume_mm(spacing, unit, expected):
    reference = boxes()[3:4]
    case = case_of(reference, spacing)
    assert length_unit(case) == unit
    assert distance_scores(LABELS, case, boxes(2)[3:4])["left"]["HD95"] == pytest.approx(expected)


def test_distances_are_unknown_where_a_class_is_not_found_and_the_mean_leaves_it_out():
    mask = np.where(boxes(1) == 2, 0, boxes(1))
    scores = distance_scores(LABELS, case_of(boxes()), mask)
    assert np.isnan(scores["right"]["HD95"])
    assert scores[MEAN]["HD95"] == scores["left"]["HD95"] == pytest.approx(1.0)


def test_a_single_slice_is_an_image_and_not_a_volume_of_surface():
    reference = boxes()[3:4]
    mask = reference.copy()
    mask[0, 3:5, 3:5] = 0  # the outline alone is left; in a volume, the reference's inner voxels were surface as well
    scores = distance_scores(LABELS, case_of(reference, (999.0, 1.0, 1.0)), mask)
    assert scores["left"]["HD95"] == 0
    sure = probability_scores(LABELS, case_of(reference, (999.0, 1.0, 1.0)), mask, one_hot(mask))
    assert sure["left"]["soft_dice"] == 1


def test_ignored_voxels_are_no_distance_and_no_error():
    reference, mask = boxes(), boxes()
    reference[:, :, 8:] = 3
    mask[2:6, 2:6, 9:12] = 1
    case = case_of(reference)
    assert distance_scores(IGNORING, case, mask)[MEAN]["HD95"] == 0
    assert probability_scores(IGNORING, case, mask, one_hot(mask))[MEAN]["ECE"] == pytest.approx(0, abs=1e-12)
    variance = (reference != mask).astype(float)
    assert np.isnan(error_correlation(IGNORING, case, mask, variance)), "no error is left"


def test_soft_dice_is_that_of_the_probabilities_with_the_mask():
    mask = boxes()
    p = 0.75 * one_hot(mask)
    scores = probability_scores(LABELS, case_of(mask), mask, p)
    assert scores["left"]["soft_dice"] == pytest.approx(2 * 0.75 / 1.75)
    p[0] += 0.25 * (mask == 0)  # what is not in the mask is paid for too
    less = probability_scores(LABELS, case_of(mask), mask, p)
    outside = 0.25 * (mask == 0).sum() / (mask == 1).sum()
    assert less["left"]["soft_dice"] == pytest.approx(2 * 0.75 / (1.75 + outside))
    assert less["right"] == scores["right"]


def test_a_model_that_finds_nothing_has_no_soft_dice():
    nothing = np.zeros_like(boxes())
    scores = probability_scores(LABELS, case_of(boxes()), nothing, 0.3 * one_hot(boxes()))
    assert scores["left"]["soft_dice"] == scores[MEAN]["soft_dice"] == 0
    scores = probability_scores(LABELS, case_of(nothing), nothing, 0 * one_hot(nothing))
    assert scores[MEAN]["soft_dice"] == 0
    assert np.isnan(scores[MEAN]["ECE"]), "nothing is near any foreground"


def test_calibration_is_that_of_the_frequency():
    mask = np.ones((1, 10, 10), int)
    reference = mask.copy()
    reference[0, :4] = 2  # 40 % are wrong
    p = np.stack([np.full(mask.shape, 0.6), np.full(mask.shape, 0.4)])
    good = probability_scores(LABELS, case_of(reference), mask, p)
    assert good[MEAN]["ECE"] == pytest.approx(0, abs=1e-9)
    sure = probability_scores(LABELS, case_of(reference), mask, one_hot(mask))
    assert sure[MEAN]["ECE"] == pytest.approx(0.4)


def test_variance_that_marks_the_errors_is_fully_correlated():
    reference, mask = boxes(), boxes(1)
    errors = (reference != mask).astype(float)
    case = case_of(reference)
    assert error_correlation(LABELS, case, mask, 0.2 * errors) == pytest.approx(1)
    assert error_correlation(LABELS, case, mask, 1 - errors) == pytest.approx(-1)
    assert np.isnan(error_correlation(LABELS, case, mask, 0 * errors)), "a single sample has no variance"
    assert np.isnan(error_correlation(LABELS, case, reference, errors)), "no error"


def test_far_background_is_not_counted_as_agreement():
    small = np.zeros((30, 30, 30), int)
    small[2:6, 2:6, 2:6] = 1
    mask = np.roll(small, 1, 2)
    variance = np.random.default_rng(0).random(small.shape)
    near = error_correlation(LABELS, case_of(small), mask, variance)
    changed = variance.copy()
    changed[15:] = 7.0
    assert error_correlation(LABELS, case_of(small), mask, changed) == near


def test_the_mean_of_nothing_known_is_unknown():
    scores = with_mean({"a": {"x": float("nan")}, "b": {"x": float("nan")}})
    assert np.isnan(scores[MEAN]["x"])
