"""Classes and regions of a dataset.json as masks."""

import numpy as np
import pytest
from nnunetv2.evaluation.evaluate_predictions import label_or_region_to_key, region_or_label_to_mask
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_diffusion.evaluation import EvaluationError
from nnunetv2_diffusion.evaluation.labels import read_labels

CLASSES = {"labels": {"background": 0, "organ": 1, "tumour": 3}}
REGIONS = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "cyst": 3}, "regions_class_order": [1, 2, 3]}
IGNORE = {"labels": {"background": 0, "organ": 1, "tumour": 2, "ignore": 3}}


@pytest.mark.parametrize("dataset", [CLASSES, REGIONS, IGNORE], ids=["classes", "regions", "ignore"])
def test_keys_and_masks_are_those_of_nnunet(dataset):
    manager = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    expected = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    labels = read_labels(dataset, None, "dataset.json")
    values = np.random.default_rng(0).integers(0, 4, (4, 5, 6))
    assert [target.key for target in labels.targets] == [label_or_region_to_key(item) for item in expected]
    for target, item in zip(labels.targets, expected, strict=True):
        np.testing.assert_array_equal(labels.mask(values, target), region_or_label_to_mask(values, item))
    assert labels.heads == manager.num_segmentation_heads


def test_names_are_those_of_the_data_set():
    assert [t.name for t in read_labels(CLASSES, None, "").targets] == ["organ", "tumour"]
    assert [t.name for t in read_labels(REGIONS, None, "").targets] == ["whole", "core", "cyst"]


def test_heads_are_the_channels_that_nnunet_exports():
    assert [t.head for t in read_labels(CLASSES, None, "").targets] == [1, 2]  # after the background's
    assert [t.head for t in read_labels(REGIONS, None, "").targets] == [0, 1, 2]  # regions have no background


def test_masks_are_stacked_in_the_order_of_the_targets():
    masks = read_labels(REGIONS, None, "").masks(np.array([[0, 1], [2, 3]]))
    assert masks.dtype == bool
    assert masks.reshape(3, 4).astype(int).tolist() == [[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]


def test_ignored_voxels_are_not_valid():
    values = np.array([0, 1, 3, 2])
    assert read_labels(IGNORE, None, "").valid(values).tolist() == [True, True, False, True]
    assert read_labels(CLASSES, None, "").valid(values) is None


def test_label_manager_of_the_plans_is_used():
    labels = read_labels(CLASSES, {"plans_name": "x", "label_manager": "LabelManager"}, "dataset.json")
    assert labels == read_labels(CLASSES, None, "dataset.json")
    with pytest.raises(EvaluationError, match=r"dataset\.json"):
        read_labels(CLASSES, {"label_manager": "NoSuchManager"}, "dataset.json")


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
def test_labels_of_the_data_set_are_accepted_in_any_type(dtype):
    read_labels(CLASSES, None, "").check_values(np.array([[0, 1], [3, 0]], dtype), "file", ignore=False)


@pytest.mark.parametrize(
    ("value", "text"), [(2, "2"), (4, "4"), (-1, "-1"), (0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf"), (1e12, "1e+12")]
)
def test_values_that_are_no_label_are_named_with_their_file(value, text):
    values = np.array([0, 1, 3, value])
    with pytest.raises(EvaluationError) as error:
        read_labels(CLASSES, None, "").check_values(values, "case_1.nii.gz", ignore=False)
    assert str(error.value) == f"case_1.nii.gz: has the value(s) {text}, expected only the labels 0, 1, 3"


def test_only_references_may_have_the_ignore_label():
    labels, values = read_labels(IGNORE, None, ""), np.array([0, 1, 3])
    labels.check_values(values, "reference", ignore=True)
    with pytest.raises(EvaluationError, match="3, expected only the labels 0-2"):
        labels.check_values(values, "prediction", ignore=False)


@pytest.mark.parametrize(
    "dataset",
    [
        {},
        {"labels": {"organ": 1}},
        {"labels": {"background": 0}},
        {"labels": {"background": 0, "a": [1, 2], "b": 2}},  # regions without an order
        {"labels": {"background": 0, "a": 1, "ignore": 1}},
    ],
)
def test_labels_that_nnunet_cannot_use_are_an_error(dataset):
    with pytest.raises(EvaluationError, match=r"dataset\.json: 'labels'"):
        read_labels(dataset, None, "dataset.json")
