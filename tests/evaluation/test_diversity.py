"""Distances between sets of masks obey their laws."""

from itertools import permutations

import numpy as np
import pytest

from nnunetv2_diffusion.evaluation.diversity import hungarian_iou, mean_pairwise_dice, squared_energy_distance

SCORES = (squared_energy_distance, hungarian_iou)


def masks(*texts):
    """One mask a word, a voxel for each 1."""
    return [np.array([character == "1" for character in text]) for text in texts]


@pytest.fixture
def random_masks():
    return list(np.random.default_rng(0).random((6, 4, 5, 6)) < 0.4)


def test_equal_sets_have_distance_0_and_matched_iou_1(random_masks):
    shuffled = [random_masks[i] for i in (3, 1, 0, 5, 4, 2)]
    assert squared_energy_distance(random_masks, shuffled) == pytest.approx(0, abs=1e-12)
    assert hungarian_iou(random_masks, shuffled) == 1


def test_two_disjoint_masks_are_at_the_largest_distance():
    first, second = masks("1100", "0011")
    assert squared_energy_distance([first], [second]) == 2
    assert hungarian_iou([first], [second]) == 0


def test_distance_has_its_closed_form():
    raters, samples = masks("1100", "0000"), masks("1110")
    # IoU 2/3 and 0 between the sets; within the raters, of two pairs of four one mask is empty
    assert squared_energy_distance(raters, samples) == pytest.approx(2 * (1 - 1 / 3) - 1 / 2 - 0)


def test_two_empty_masks_are_equal_and_one_empty_mask_is_as_far_as_can_be():
    empty, full = masks("000", "111")
    assert squared_energy_distance([empty], [empty, empty]) == 0
    assert hungarian_iou([empty], [empty, empty]) == 1
    assert squared_energy_distance([empty], [full]) == 2
    assert mean_pairwise_dice([empty, full]) == 0


def test_diversity_like_that_of_raters_is_rewarded():
    raters = masks("1111", "1100", "0000")
    assert squared_energy_distance(raters, raters) < squared_energy_distance(raters, masks("1100", "1100", "1100"))


@pytest.mark.parametrize("score", SCORES)
def test_order_and_sides_change_nothing(score, random_masks):
    raters, samples = random_masks[:2], random_masks[2:5]
    expected = score(raters, samples)
    for order in permutations(samples):
        assert score(raters[::-1], order) == pytest.approx(expected, abs=1e-12)
    assert score(samples, raters) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("score", SCORES)
def test_repeating_every_mask_changes_nothing(score, random_masks):
    raters, samples = random_masks[:2], random_masks[2:5]
    assert score(raters * 3, samples) == pytest.approx(score(raters, samples), abs=1e-12)
    assert score(raters, samples * 4) == pytest.approx(score(raters, samples), abs=1e-12)


def test_matching_is_the_best_of_all_permutations(random_masks):
    def iou(a, b):
        return (a & b).sum() / (a | b).sum()

    raters, samples = random_masks[:3], random_masks[3:]
    best = max(np.mean([iou(a, b) for a, b in zip(raters, order, strict=True)]) for order in permutations(samples))
    assert hungarian_iou(raters, samples) == pytest.approx(best)


def test_sets_of_different_sizes_are_matched_by_shares():
    # of three samples, one and a half match each of the two raters: the third is wrong for a half of its share only
    raters, samples = masks("10", "01"), masks("10", "10", "01")
    assert hungarian_iou(raters, samples) == pytest.approx(5 / 6)


def test_pairwise_dice_is_the_mean_over_pairs():
    # Dice 2/3, 0 and 0
    assert mean_pairwise_dice(masks("1100", "1000", "0001")) == pytest.approx(2 / 9)
    assert mean_pairwise_dice(masks("1100", "1100", "1100")) == 1


def test_two_empty_samples_are_no_agreement():
    empty, full = masks("000", "111")
    assert np.isnan(mean_pairwise_dice([empty, empty, empty]))
    assert mean_pairwise_dice([empty, full, empty]) == 0
    assert mean_pairwise_dice([empty, full, full]) == pytest.approx(1 / 3)


def test_one_sample_has_no_pairwise_dice():
    assert np.isnan(mean_pairwise_dice(masks("11")))


def test_voxels_that_do_not_count_change_nothing(random_masks):
    where = np.zeros(random_masks[0].shape, bool)
    where[1:, 2:4] = True
    inside = [mask[where] for mask in random_masks]
    for score in SCORES:
        assert score(random_masks[:2], random_masks[2:], where) == score(inside[:2], inside[2:])
        assert score(random_masks[:2], random_masks[2:]) != score(inside[:2], inside[2:])
    assert mean_pairwise_dice(random_masks, where) == mean_pairwise_dice(inside)


def test_arguments_stay_as_they_are(random_masks):
    where = np.ones(random_masks[0].shape, bool)
    for array in (*random_masks, where):
        array.flags.writeable = False
    for score in SCORES:
        score(random_masks[:2], random_masks[2:], where)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    ("samples", "where", "message"),
    [
        ([], None, "sets of 1 and 0 masks"),
        (masks("110"), None, r"expected all of shape \(2,\) and bool"),
        ([np.array([1, 0])], None, "int64"),
        (masks("11"), np.ones(3, bool), r"where has shape \(3,\), expected \(2,\)"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(score, samples, where, message):
    with pytest.raises(ValueError, match=message):
        score(masks("10"), samples, where)
