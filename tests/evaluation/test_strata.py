"""Scores by the size of objects."""

from math import isnan

import numpy as np
import pytest

from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.evaluation.strata import (
    Lesions,
    ObjectScore,
    case_strata,
    check_thresholds,
    count_sizes,
    lesion_scores,
    object_strata,
    slice_scores,
    strata_of,
)


def mask(shape, *boxes):
    array = np.zeros(shape, bool)
    for box in boxes:
        array[box] = True
    array.flags.writeable = False  # whoever writes to it raises
    return array


@pytest.mark.parametrize(
    ("size", "names"),
    [
        (0, ["empty"]),
        (1, ["<100", "<500"]),
        (99, ["<100", "<500"]),
        (100, ["<500"]),
        (499, ["<500"]),
        (500, [">=500"]),
    ],
)
def test_small_objects_are_those_below_a_threshold(size, names):
    assert strata_of(size, (100, 500)) == names


@pytest.mark.parametrize("thresholds", [(), (0,), (5, 5), (9, 3)])
def test_thresholds_must_rise(thresholds):
    with pytest.raises(EvaluationError, match="rising sizes"):
        check_thresholds(thresholds)


# ---- lesions


def test_lesion_is_compared_with_all_that_touches_it():
    reference = mask((10, 12), np.s_[0:4, 0:4])  # 16 pixels
    prediction = mask((10, 12), np.s_[0:4, 0:1], np.s_[0:2, 3:6], np.s_[8:10, 8:10])  # 4, 6 (2 inside) and apart 4
    lesions = lesion_scores(reference, prediction)
    assert lesions == Lesions([ObjectScore(16, 2 * (4 + 2) / (16 + 4 + 6), True)], predicted=3, false=[4])


def test_lesions_are_told_apart_and_those_missed_score_0():
    reference = mask((4, 20), np.s_[0:2, 0:2], np.s_[0:2, 5:8], np.s_[0:1, 12:20])
    prediction = mask((4, 20), np.s_[0:2, 0:2], np.s_[1:3, 5:8])
    lesions = lesion_scores(reference, prediction)
    assert lesions.found == [ObjectScore(4, 1.0, True), ObjectScore(6, 0.5, True), ObjectScore(8, 0.0, False)]
    assert lesions.scores() == {
        "lesions_ref": 3,
        "lesions_detected": 2,
        "lesions_pred": 2,
        "lesions_false": 0,
        "lesion_Dice": 0.5,
    }


def test_prediction_that_joins_two_lesions_counts_for_both():
    reference = mask((1, 9), np.s_[0, 0:3], np.s_[0, 6:9])
    lesions = lesion_scores(reference, mask((1, 9), np.s_[0, :]))
    assert lesions.found == [ObjectScore(3, 2 * 3 / (3 + 9), True)] * 2
    assert lesions.predicted == 1


def test_voxels_that_share_a_corner_are_one_lesion():
    reference = mask((3, 3, 3), (0, 0, 0), (1, 1, 1), (2, 2, 2))
    assert [lesion.size for lesion in lesion_scores(reference, reference).found] == [3]


@pytest.mark.parametrize(("overlap", "detected"), [(0.0, True), (0.25, True), (0.26, False), (1.0, False)])
def test_detection_needs_the_share_that_is_asked_for(overlap, detected):
    found = lesion_scores(mask((1, 8), np.s_[0, 0:4]), mask((1, 8), np.s_[0, 3:8]), overlap).found
    assert [lesion.detected for lesion in found] == [detected]
    assert found[0].dice == pytest.approx(2 / 9)


def test_untouched_lesion_is_not_detected_without_a_threshold():
    lesions = lesion_scores(mask((1, 8), np.s_[0, 0:4]), mask((1, 8), np.s_[0, 5:8]))
    assert (lesions.found, lesions.false) == ([ObjectScore(4, 0.0, False)], [3])


@pytest.mark.parametrize("ndim", [2, 3])
def test_empty_masks_have_no_lesions(ndim):
    empty = np.zeros((4,) * ndim, bool)
    lesions = lesion_scores(empty, empty)
    assert lesions == Lesions([], 0, [])
    assert isnan(lesions.scores()["lesion_Dice"])
    assert lesion_scores(empty, ~empty) == Lesions([], 1, [4**ndim])
    assert lesion_scores(~empty, empty) == Lesions([ObjectScore(4**ndim, 0.0, False)], 0, [])


# ---- slices and cases


def test_slices_are_scored_where_the_reference_has_the_class():
    reference = mask((4, 5, 6), np.s_[0, :2, :2], np.s_[1, :2, :3], np.s_[3, 0, 0])
    prediction = mask((4, 5, 6), np.s_[0, :2, 1:3], np.s_[1, :2, :3], np.s_[2, 0, 0])
    assert slice_scores(reference, prediction) == [
        ObjectScore(4, 0.5, True),
        ObjectScore(6, 1.0, True),
        ObjectScore(1, 0.0, False),
    ]


def test_strata_of_objects_hold_rate_and_mean():
    objects = [ObjectScore(5, 1.0, True), ObjectScore(8, 0.0, False), ObjectScore(10, 0.8, True)]
    strata = object_strata(objects, (6, 10))
    assert strata["<6"] == {"n": 1, "detected": 1, "detection_rate": 1.0, "Dice": 1.0}
    assert strata["<10"] == {"n": 2, "detected": 1, "detection_rate": 0.5, "Dice": 0.5}
    assert strata[">=10"] == {"n": 1, "detected": 1, "detection_rate": 1.0, "Dice": 0.8}
    assert strata["all"] == {"n": 3, "detected": 2, "detection_rate": pytest.approx(2 / 3), "Dice": pytest.approx(0.6)}


def test_stratum_without_objects_has_no_rate():
    stratum = object_strata([], (10,))["<10"]
    assert (stratum["n"], stratum["detected"]) == (0, 0)
    assert isnan(stratum["detection_rate"])
    assert isnan(stratum["Dice"])


def test_sizes_are_counted_in_every_stratum_they_belong_to():
    assert count_sizes([3, 7, 50], (5, 10)) == {"<5": 1, "<10": 2, ">=10": 1, "all": 3}


def test_cases_are_grouped_by_the_size_in_the_reference():
    rows = [
        {"n_ref": 50, "Dice": 0.2, "HD95": np.nan},
        {"n_ref": 60, "Dice": 0.4, "HD95": 3.0},
        {"n_ref": 700, "Dice": 0.9, "HD95": 1.0},
        {"n_ref": 0, "Dice": np.nan, "HD95": np.nan},
    ]
    strata = case_strata(rows, (100, 500))
    assert {name: stratum["n"] for name, stratum in strata.items()} == {"<100": 2, "<500": 2, ">=500": 1, "empty": 1}
    assert strata["<100"]["mean"] == {"n_ref": 55, "Dice": pytest.approx(0.3), "HD95": 3.0}
    assert strata["<100"]["nan_ratio"] == {"n_ref": 0, "Dice": 0, "HD95": 0.5}
    assert isnan(strata["empty"]["mean"]["Dice"])
