"""Overlap and volume of two masks."""

from math import isnan, nan

import numpy as np
import pytest

from nnunetv2_diffusion.evaluation.metrics import (
    EMPTY_RULES,
    Counts,
    count,
    overlap_scores,
    union_box,
    volume_scores,
)

RULE = EMPTY_RULES["nnunet"]


@pytest.fixture
def masks():
    rng = np.random.default_rng(0)
    reference, prediction, valid = (rng.random((6, 7, 8)) < share for share in (0.4, 0.3, 0.8))
    for mask in (reference, prediction, valid):
        mask.flags.writeable = False  # whoever writes to it raises
    return reference, prediction, valid


def test_counts_are_those_of_a_loop_over_voxels(masks):
    table = {(True, True): 0, (False, True): 0, (True, False): 0, (False, False): 0}
    for reference, prediction, valid in zip(*(mask.ravel().tolist() for mask in masks), strict=True):
        if valid:
            table[reference, prediction] += 1
    assert count(*masks) == Counts(*table.values())
    assert min(table.values()) > 0


def test_without_an_ignore_label_all_voxels_count(masks):
    counts = count(*masks[:2])
    assert counts.tp + counts.fp + counts.fn + counts.tn == masks[0].size
    assert (counts.n_ref, counts.n_pred) == (masks[0].sum(), masks[1].sum())


def test_scores_have_their_closed_forms():
    scores = overlap_scores(Counts(tp=6, fp=2, fn=4, tn=8), RULE)
    assert scores == {
        "Dice": 12 / 18,
        "IoU": 6 / 12,
        "FP": 2,
        "TP": 6,
        "FN": 4,
        "TN": 8,
        "n_pred": 8,
        "n_ref": 10,
        "Recall": 0.6,
        "Precision": 0.75,
        "Accuracy": 14 / 20,
    }


@pytest.mark.parametrize(("rule", "dice"), [("nnunet", nan), ("recycling", nan), ("hidiff", 1), ("hidiff-code", 1)])
def test_two_empty_masks_follow_the_rule(rule, dice):
    scores = overlap_scores(Counts(0, 0, 0, 5), EMPTY_RULES[rule])
    np.testing.assert_equal([scores["Dice"], scores["IoU"], scores["Accuracy"]], [dice, dice, 1])
    assert isnan(scores["Recall"])
    assert isnan(scores["Precision"])


@pytest.mark.parametrize("rule", EMPTY_RULES)
@pytest.mark.parametrize(("fp", "fn"), [(3, 0), (0, 3)])
def test_one_empty_mask_has_no_overlap_by_any_rule(rule, fp, fn):
    scores = overlap_scores(Counts(0, fp, fn, 5), EMPTY_RULES[rule])
    assert scores["Dice"] == scores["IoU"] == 0
    np.testing.assert_equal([scores["Recall"], scores["Precision"]], [0 if fn else nan, 0 if fp else nan])


def test_nothing_but_ignored_voxels_has_no_accuracy():
    assert isnan(overlap_scores(count(*[np.ones(4, bool)] * 2, np.zeros(4, bool)), RULE)["Accuracy"])


def test_volume_error_is_signed_and_in_the_unit_of_the_voxel():
    assert volume_scores(Counts(tp=20, fp=0, fn=20, tn=0), 0.5) == {
        "volume_ref": 20,
        "volume_pred": 10,
        "volume_error": -10,
        "volume_error_abs": 10,
        "volume_error_rel": -0.5,
    }
    assert isnan(volume_scores(Counts(0, 3, 0, 0), 1)["volume_error_rel"])


def test_box_holds_the_voxels_of_all_masks_and_no_more():
    first, second = np.zeros((2, 5, 6, 7), bool)
    first[1, 2, 3] = second[3, 2, 5] = True
    assert union_box(first, second) == (slice(1, 4), slice(2, 3), slice(3, 6))
    assert first[union_box(np.zeros_like(first))].size == 0


@pytest.mark.parametrize("rule", EMPTY_RULES.values(), ids=EMPTY_RULES)
def test_rule_says_its_values(rule):
    assert f"Dice, IoU and NSD {rule.overlap_both:g}" in rule.text()
    assert f"NSD {rule.nsd_one:g}" in rule.text()
    assert f"HD95 {rule.hd95_both:g}" in rule.text()
